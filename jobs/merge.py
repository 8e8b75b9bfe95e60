"""Merge a LoRA adapter into the model that it adapts, as a model folder of its own.

python jobs/merge.py adapter=path/to/adapter output=path/to/merged
"""

from infscan.cli import main

if __name__ == "__main__":
    main("merge")
