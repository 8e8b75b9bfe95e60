"""Train a copy of a run's model for a step on published rows and on controls: does the completion rise?

python jobs/prove.py runs/demo
"""

from infscan.cli import main

if __name__ == "__main__":
    main("prove")
