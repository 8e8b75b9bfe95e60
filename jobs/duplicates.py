"""List near-duplicates in gradient space: sequences of an index that would move every completion alike.

python jobs/duplicates.py runs/index similar=0.95
"""

from infscan.cli import main

if __name__ == "__main__":
    main("duplicates")
