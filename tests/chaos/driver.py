"""One driver of the job, as a process of its own: `jobs/scan.py`'s work on a Ray that runs already.

It writes down what its workers are at, and may be told to kill itself with SIGKILL at the n-th unit it hands out.
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

from infscan.engine.recovery import RecoveryLog
from infscan.engine.worker_group import WorkerGroup
from infscan.errors import InfscanError
from infscan.pipeline import answer
from tests.steps.runs import compose


def main(argv: list[str]) -> int:
    """argv: a JSON file with `address`, `overrides`, `kill_at` (0: never), `pause_s`, `report`, `progress` and
    `spans`.

    progress gets a line when a unit is handed out or found done: when, `handed` or `done`, the worker's number, and
    the process id of a rank of it (0 when done). spans gets one from the rank as a unit ends there: when it began,
    when it ended, the worker, the function. 0, or 2 for a user's error.
    """
    order = json.loads(Path(argv[0]).read_text())
    ray.init(address=order["address"], log_to_driver=False, logging_level="ERROR")
    handed_out = 0
    pids: dict[Any, int] = {}
    progress = open(order["progress"], "a")  # noqa: SIM115 (a driver that is killed closes nothing)
    submit, done = WorkerGroup.submit, RecoveryLog.unit_finished

    def note(what: str, worker: int, pid: int = 0) -> None:
        progress.write(f"{time.time()} {what} {worker} {pid}\n")
        progress.flush()

    def counted(self: WorkerGroup, unit: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        nonlocal handed_out
        handed_out += 1
        actor = self.actors[-1]
        if actor not in pids:
            # It is idle, and says at once which process it is. Asked once: by the next time it may be stopped.
            pids[actor] = ray.get(actor.run.remote(lambda _: os.getpid(), 0))
        submit(
            self,
            unit,
            timed(function, self.index, order["pause_s"], order["spans"]),
            *arguments,
            **options,
        )
        note("handed", self.index, pids[actor])
        if handed_out == order["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    def noted(self: RecoveryLog, worker: int, unit: Any) -> None:
        note("done", worker)
        done(self, worker, unit)

    WorkerGroup.submit = counted  # type: ignore[method-assign]
    RecoveryLog.unit_finished = noted  # type: ignore[method-assign]
    try:
        answer(compose("scan", *order["overrides"]))
    except InfscanError as error:
        Path(order["report"]).write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        return 2
    Path(order["report"]).write_text(json.dumps({"handed_out": handed_out}))
    return 0


def timed(function: Callable[..., Any], worker: int, pause_s: float, spans: str) -> Callable[..., Any]:
    """function, which takes so much longer and says on the rank when it was at work."""

    def run(rank: Any, *arguments: Any) -> Any:
        began = time.time()
        time.sleep(pause_s)
        try:
            return function(rank, *arguments)
        finally:
            with open(spans, "a") as file:
                file.write(f"{began} {time.time()} {worker} {function.__name__}\n")

    return run
