"""Judge EK-FAC on a small model, and its rivals, against a ground truth.

python jobs/validate.py truth=cg output=runs/validate
"""

from infscan.cli import main

if __name__ == "__main__":
    main("validate")
