"""Make a corpus addressable: tokenise, pack and number it into <output>/corpus.

python jobs/prepare.py model=pythia-70m corpus.path='data/*.jsonl.zst' output=s3://bucket/pile
"""

from infscan.cli import main

if __name__ == "__main__":
    main("prepare")
