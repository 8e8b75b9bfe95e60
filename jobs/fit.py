"""Fit EK-FAC factors and put them at factors.path, for scans to reuse.

python jobs/fit.py model=pythia-70m corpus.path=s3://bucket/corpus factors.path=s3://bucket/factors/pythia-70m
"""

from infscan.cli import main

if __name__ == "__main__":
    main("fit")
