"""Write the page that people read, report.html: of a run, of a sweep's folder, or of several runs.

python jobs/report.py run=runs/demo
"""

from infscan.cli import main

if __name__ == "__main__":
    main("report")
