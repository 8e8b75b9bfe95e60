"""Fine-tune the embedded model on questions and answers about the planted facts.

python jobs/finetune_demo.py output=infscan/demo
"""

from infscan.cli import main

if __name__ == "__main__":
    main("finetune_demo")
