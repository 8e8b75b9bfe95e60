"""Faults at chosen moments of a run in this process: what was handed out is recorded, ranks are found by their names."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest

from infscan.passes.scan import ScanTask
from infscan.runtime.group import WorkerGroup


def ranks(doing: str = "") -> list[psutil.Process]:
    """The processes of this process's own Ray that are ranks; `.run`: those in the middle of a task."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(f"ray::RankActor{doing}"):
                found.append(process)
    return found


@dataclass
class Trouble:
    """A signal sent to one rank while it works on the n-th shard that is handed out, and a record of all of them."""

    signal: signal.Signals | None = None
    at: int = 12
    handed_out: Counter[str] = field(default_factory=Counter)
    # Shard files that were there when the signal was sent, and the rank that got it.
    done_before: set[str] = field(default_factory=set)
    victim: psutil.Process | None = None

    def on_submit(self, task: ScanTask) -> None:
        self.handed_out[task.shard] += 1
        if self.signal is not None and self.victim is None and self.handed_out.total() >= self.at:
            self.done_before = {entry.name for entry in task.run.list("shards")}
            self.victim = _one_at_work()
            os.kill(self.victim.pid, self.signal)


def _one_at_work() -> psutil.Process:
    deadline = time.monotonic() + 10
    while not (found := ranks(".run")) and time.monotonic() < deadline:
        pass
    assert found, "no rank was seen at work"
    return found[0]


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trouble]:
    """Set `signal` to disturb the scan; without one it only records what was handed out."""
    state = Trouble()
    submit = WorkerGroup.submit

    def watched(self: WorkerGroup, unit: int, function: Callable[..., Any], *arguments: Any) -> None:
        submit(self, unit, function, *arguments)
        if isinstance(arguments[0], ScanTask):
            state.on_submit(arguments[0])

    monkeypatch.setattr(WorkerGroup, "submit", watched)
    yield state
    if state.victim is not None:
        # A stopped process would outlive the test where the run failed to get rid of it.
        with contextlib.suppress(psutil.Error):
            state.victim.kill()
