"""Keep the sequences that share rare tokens with a query, from one pass over the whole corpus.

python jobs/tfidf.py model=pythia-1b corpus.path=s3://bucket/pile queries.path=queries.jsonl output=runs/filter
python jobs/scan.py model=pythia-1b corpus.path=runs/filter queries.path=queries.jsonl output=runs/mine
"""

from infscan.cli import main

if __name__ == "__main__":
    main("tfidf")
