"""Study a finished run: a table, a figure, and what they say and cannot say.

python jobs/study.py run=runs/demo study=layers
"""

from infscan.cli import main

if __name__ == "__main__":
    main("study")
