"""Export masks of the loss: the tokens of explained rows that teach the model a completion most.

python jobs/masks.py runs/demo share=0.01
"""

from infscan.cli import main

if __name__ == "__main__":
    main("masks")
