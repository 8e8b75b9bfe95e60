"""Rebuild the embedded demo: its corpus, tokenizer, model, queries and record.

python jobs/train_demo.py output=infscan/demo
"""

from infscan.cli import main

if __name__ == "__main__":
    main("train_demo")
