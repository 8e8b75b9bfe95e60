"""Take scores apart by layer and by token: rows of a finished run, or any text.

python jobs/explain.py run=runs/demo query_ids=[astrobia] rows=2
"""

from infscan.cli import main

if __name__ == "__main__":
    main("explain")
