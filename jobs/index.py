"""Index a corpus: a code of every sequence's gradient, by which later questions are answered without a scan.

python jobs/index.py model=demo corpus=demo output=runs/index
"""

from infscan.cli import main

if __name__ == "__main__":
    main("index")
