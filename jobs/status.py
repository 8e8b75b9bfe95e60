"""Show how far a run or a sweep is, also while it goes on.

python jobs/status.py runs/demo
"""

from infscan.cli import main

if __name__ == "__main__":
    main("status")
