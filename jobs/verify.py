"""Hold every file of a finished run to what was committed.

python jobs/verify.py runs/demo
"""

from infscan.cli import main

if __name__ == "__main__":
    main("verify")
