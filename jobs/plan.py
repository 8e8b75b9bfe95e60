"""Say what a scan would cost before anything runs; arguments as for jobs/scan.py.

python jobs/plan.py model=pythia-1b corpus.path=s3://bucket/pile/ queries.path=queries.jsonl plan.device=h100
"""

from infscan.cli import main

if __name__ == "__main__":
    main("plan")
