"""Faults at chosen moments of a run in this process; what is handed out is recorded."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
import ray

from infscan.engine.worker_group import WorkerGroup
from infscan.steps.scan import ScanTask


@dataclass
class Trouble:
    """A signal sent to the last rank of the group that gets the n-th shard, and a record of all handed out."""

    signal: signal.Signals | None = None
    at: int = 12
    handed_out: Counter[str] = field(default_factory=Counter)
    # Shard files that were there when the signal was sent, and the rank that got it.
    done_before: set[str] = field(default_factory=set)
    victim: psutil.Process | None = None

    def around(self, group: WorkerGroup, task: ScanTask, submit: Callable[[], None]) -> None:
        """Hand a shard out, and strike right behind it where it is the n-th."""
        self.handed_out[task.shard] += 1
        sent = self.signal if self.victim is None and self.handed_out.total() >= self.at else None
        if sent is not None:
            self.done_before = {entry.name for entry in task.run.list("shards")}
            # The rank is idle, and says at once which process it is.
            self.victim = psutil.Process(ray.get(group.actors[-1].run.remote(lambda _: os.getpid(), 0)))
        submit()
        if sent is not None and self.victim is not None:
            self.victim.send_signal(sent)


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trouble]:
    """Set `signal` to disturb the scan; without one it only records what was handed out."""
    state = Trouble()
    submit = WorkerGroup.submit

    def watched(self: WorkerGroup, unit: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        def hand_out() -> None:
            submit(self, unit, function, *arguments, **options)

        if isinstance(arguments[0], ScanTask):
            state.around(self, arguments[0], hand_out)
        else:
            hand_out()

    monkeypatch.setattr(WorkerGroup, "submit", watched)
    yield state
    if state.victim is not None:
        # A stopped process would outlive the test where the run failed to get rid of it.
        with contextlib.suppress(psutil.Error):
            state.victim.kill()
