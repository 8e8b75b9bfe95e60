"""Count the planted facts' forward documents among each question's ten strongest, run by run.

python jobs/answers.py runs.multi-stage=runs/answers runs.single-stage=runs/answers-single
"""

from infscan.cli import main

if __name__ == "__main__":
    main("answers")
