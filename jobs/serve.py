"""Answer questions from an index over HTTP, with a page for a browser.

python jobs/serve.py index=runs/index
"""

from infscan.cli import main

if __name__ == "__main__":
    main("serve")
