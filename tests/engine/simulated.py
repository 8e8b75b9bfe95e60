"""The pool over worker groups that take simulated time: what many workers do in days passes in seconds.

python -m tests.engine.simulated      (docs/faults.md has what it prints)
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from infscan.config import ClusterConfig
from infscan.engine import pool as module
from infscan.engine.pool import Pool
from infscan.engine.recovery import RecoveryLog
from infscan.engine.worker_group import Outcome, State

# A unit's answer: how long it takes, and its result, or the error that it raises.
Answer = tuple[float, Any]


@dataclass
class Simulation:
    """Workers by their answers. answer(worker, unit, oom_retries) says what becomes of an attempt."""

    workers: int
    answer: Callable[[int, Any, int], Answer]
    gpus: float = 1.0
    start_s: float = 30.0
    # Seconds that writing a unit takes, and what comes of it: its result, or the error that it raises.
    write_s: float = 0.0
    written: Callable[[int, Any], Any] = lambda worker, unit: unit
    # Workers that cannot start.
    broken: frozenset[int] = frozenset()
    now: float = 0.0
    # (when, worker), the next first.
    events: list[tuple[float, int]] = field(default_factory=list)
    # (worker, unit, oom_retries) of every attempt, in order.
    handed: list[tuple[int, Any, int]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    # By worker: what its GPU has free before its model.
    free: dict[int, int] = field(default_factory=dict)
    recovery: RecoveryLog = field(init=False)

    def __post_init__(self) -> None:
        self.recovery = RecoveryLog(clock=self.monotonic)

    def monotonic(self) -> float:
        return self.now

    @contextmanager
    def pool(self) -> Iterator[Pool]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "WorkerGroup", lambda index, *_: Group(self, index))
            patch.setattr(module, "time", self)
            patch.setattr(Pool, "wait", lambda pool: self.turn(pool))
            cluster = ClusterConfig(num_workers=self.workers)
            settings: Any = SimpleNamespace(sharded=False, host_bytes=None)
            yield Pool(cluster, settings, self.gpus, self.recovery, warn=self.warnings.append)

    def turn(self, pool: Pool) -> list[Any]:
        """Time goes on to when the next group has an answer, ten seconds at most."""
        next_at = self.events[0][0] if self.events else self.now + 10.0
        self.now = max(self.now, min(self.now + 10.0, next_at))
        ready = []
        while self.events and self.events[0][0] <= self.now:
            ready.append(pool.groups[heapq.heappop(self.events)[1]])
        return ready


class Group:
    """A worker group as the pool knows it."""

    def __init__(self, world: Simulation, index: int) -> None:
        self.world, self.index = world, index
        free = world.free.get(index)
        self.facts = [SimpleNamespace(host=f"host-{index}", node=f"node-{index}", oom_kills=0, device_free_bytes=free)]
        self.rebuilds = self.forgot = 0
        self.start()

    def start(self) -> None:
        self.state, self.unit, self.result = State.starting, None, None
        # Of the unit that is being written: when that ends, and its result or the error that it raises.
        self.writing: tuple[float, Any] | None = None
        if self.index in self.world.broken:
            self.result = RuntimeError("CUDA error: uncorrectable ECC error encountered")
        self._ends(self.world.start_s)

    def submit(self, unit: Any, function: Any, task: Any, *shared: Any, oom_retries: int = 0, **ahead: Any) -> None:
        assert self.state is State.idle
        self.state, self.unit = State.busy, unit
        self.world.handed.append((self.index, unit, oom_retries))
        seconds, self.result = self.world.answer(self.index, unit, oom_retries)
        left = 0.0 if self.writing is None else max(0.0, self.writing[0] - self.world.now)
        if not ahead["behind"]:
            # The unit before is written first.
            seconds += left
        elif not isinstance(self.result, ConnectionError):
            seconds = max(seconds, left)
        fails = isinstance(self.result, Exception)
        self.writes = self.world.write_s > 0 and ahead["behind"] and not fails
        self._ends(seconds if self.writes or fails else seconds + self.world.write_s)

    def _ends(self, seconds: float) -> None:
        self.ends = self.world.now + seconds
        heapq.heappush(self.world.events, (self.ends, self.index))

    def poll_written(self) -> tuple[Outcome, Any] | None:
        if self.writing is None or self.world.now < self.writing[0]:
            return None
        (_, result), self.writing = self.writing, None
        return (Outcome.failed if isinstance(result, Exception) else Outcome.done), result

    def poll(self) -> tuple[Outcome, Any] | None:
        if self.state in (State.idle, State.retired) or self.world.now < self.ends:
            return None
        if isinstance(self.result, ConnectionError):
            return Outcome.lost, self.result
        if self.writing is not None and self.state is State.busy:
            return None
        if self.state is State.busy and self.writes:
            self.state = State.idle
            self.writing = self.world.now + self.world.write_s, self.world.written(self.index, self.unit)
            heapq.heappush(self.world.events, (self.writing[0], self.index))
            return Outcome.computed, None
        if isinstance(self.result, Exception):
            return Outcome.failed, self.result
        self.state = State.idle
        return Outcome.done, self.result

    def rebuild(self) -> None:
        self.rebuilds += 1
        self.start()

    def retire(self) -> None:
        self.state = State.retired

    def forget(self) -> None:
        self.forgot += 1


def run(world: Simulation, units: Iterable[Any]) -> tuple[list[Any], dict[Any, str]]:
    """Run the units; those finished, one entry for each time, and those given up."""
    done: list[Any] = []
    lost: dict[Any, str] = {}
    with world.pool() as pool:
        pool.run(units, print, str, lambda unit, _: done.append(unit), on_given_up=lost.__setitem__)
    return done, lost


def with_sick(sick: Iterable[int], fails_after_s: float, unit_s: float = 134.0) -> Callable[[int, Any, int], Answer]:
    """Workers that take so long for a unit, and sick ones that fail every unit after so long."""
    broken = frozenset(sick)

    def answer(worker: int, unit: Any, oom_retries: int) -> Answer:
        if worker in broken:
            return fails_after_s, RuntimeError("CUDA error: an illegal memory access was encountered")
        return unit_s, unit

    return answer


def main() -> None:
    logging.disable(logging.WARNING)
    print("64 workers, 24,414 units of 134 s, one sick GPU")
    for fails_after_s in (0.05, 0.2, 1.0):
        for name, gpus in (("its errors are the units'", 0.0), ("its errors are the worker's", 1.0)):
            world = Simulation(64, with_sick([5], fails_after_s), gpus)
            _, lost = run(world, range(24_414))
            print(
                f"fails after {fails_after_s:g} s, {name}: {len(lost):,} units given up, "
                f"{sum(worker == 5 for worker, *_ in world.handed):,} attempts on it, {world.now / 3600:.1f} h"
            )


if __name__ == "__main__":
    main()
