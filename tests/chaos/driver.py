"""One driver of the job, as a process of its own: `jobs/scan.py`'s work on a Ray that runs already.

It says to whom it hands out each unit of work, and may be told to kill itself with SIGKILL at the n-th.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from infscan.errors import InfscanError
from infscan.runtime.group import WorkerGroup
from jobs.scan import answer
from tests.runtime.builders import compose


def main(argv: list[str]) -> int:
    """argv: a JSON file with `address`, `overrides`, `kill_at` (0: never), `report` and `progress`.

    progress gets a line per unit handed out: when, the worker's number, the process id of a rank of it.
    0, or 2 for a user's error.
    """
    order = json.loads(Path(argv[0]).read_text())
    ray.init(address=order["address"], log_to_driver=False, logging_level="ERROR")
    handed_out = 0
    progress = open(order["progress"], "a")  # noqa: SIM115 (a driver that is killed closes nothing)
    submit = WorkerGroup.submit

    def counted(self: WorkerGroup, unit: int, function: Callable[..., Any], *arguments: Any, halvings: int = 0) -> None:
        nonlocal handed_out
        handed_out += 1
        # An idle rank says at once which process it is.
        pid = ray.get(self.actors[-1].run.remote(lambda _: os.getpid(), 0))
        submit(self, unit, function, *arguments, halvings=halvings)
        progress.write(f"{time.time()} {self.index} {pid}\n")
        progress.flush()
        if handed_out == order["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    WorkerGroup.submit = counted  # type: ignore[method-assign]
    try:
        answer(compose("scan", *order["overrides"]))
    except InfscanError as error:
        Path(order["report"]).write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 2
    Path(order["report"]).write_text(json.dumps({"handed_out": handed_out}))
    return 0
