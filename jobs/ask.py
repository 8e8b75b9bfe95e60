"""Ask an index: which sequences most raised (or lowered) the probability of these completions?

python jobs/ask.py index=runs/index queries=queries.jsonl output=runs/answer
"""

from infscan.cli import main

if __name__ == "__main__":
    main("ask")
