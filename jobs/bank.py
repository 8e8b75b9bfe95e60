"""Train a bank of models from scratch on half-subsets of a corpus, with several recipes.

python jobs/bank.py corpus.path=runs/small/corpus queries.path=queries.jsonl output=runs/bank
"""

from infscan.cli import main

if __name__ == "__main__":
    main("bank")
