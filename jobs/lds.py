"""Judge scores by retraining: LDS on half-subsets, QLD without each query's strongest sequences.

python jobs/lds.py corpus.path=runs/small/corpus output=runs/lds
"""

from infscan.cli import main

if __name__ == "__main__":
    main("lds")
