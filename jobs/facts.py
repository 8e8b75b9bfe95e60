"""Make queries, and texts in the six partitions of the word-order study, of a list of facts.

python jobs/facts.py runs/facts facts=facts.jsonl
"""

from infscan.cli import main

if __name__ == "__main__":
    main("facts")
