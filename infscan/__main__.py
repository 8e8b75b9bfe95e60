"""`infscan status <uri>`, or `python -m infscan status <uri>`: where a run or a sweep stands, from its folder alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from infscan.report.status import show_status, show_sweep
from infscan.results.status import read_status, read_sweep
from infscan.telemetry import sentences


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; an error that a user can mend ends it with its sentence and status 2."""
    parser = argparse.ArgumentParser(prog="infscan", description="Look at runs. They are started by jobs/.")
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser("status", help="where a run stands, also while it goes on; nothing is written")
    status.add_argument("uri", help="the run's folder: what it was given as output=; or a sweep's")
    status.add_argument(
        "--top", type=int, default=3, metavar="K", help="strongest rows per query and side (3; 0: none)"
    )
    status.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    with sentences():
        if cells := read_sweep(asked.uri):
            if asked.json:
                print(json.dumps({name: found.to_json() for name, found in cells.items()}, indent=2))
            else:
                show_sweep(asked.uri, cells)
            return
        found = read_status(asked.uri, rows=max(0, asked.top))
        if asked.json:
            print(json.dumps(found.to_json(), indent=2))
        else:
            show_status(found)


if __name__ == "__main__":
    main()
