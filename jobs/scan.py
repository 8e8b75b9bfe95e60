"""Scan a corpus: which of its sequences most raised (or lowered) the probability of each query's completion?

python jobs/scan.py model=demo corpus=demo queries=demo output=runs/demo

The method, in order, is infscan/pipeline.py; each of its steps is one file of infscan/steps/.
"""

from infscan.cli import main

if __name__ == "__main__":
    main("scan")
