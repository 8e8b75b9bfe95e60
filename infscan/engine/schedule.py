"""Which unit of work goes out next, and when one is given up: a pure state machine, without Ray, clocks or threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# A unit outlives many more losses of machines than errors of its own: pre-emption says nothing about the unit.
LOSSES_PER_ATTEMPT = 10
# A unit that took down two different workers is taken for the reason: it has this many tries in all.
GUILTY_TRIES = 3
# 2^16 tokens are more than a micro-batch has.
MOST_OOM_RETRIES = 16
# Units that ran out of memory at one size before it is halved for all: one alone may be an odd one.
SHRINKS_ALL = 2


@dataclass
class Schedule:
    """Units are waiting, running, done or given up; each is in exactly one of these. A unit is any hashable value."""

    units: Iterable[Any]
    # Errors of a unit itself after which it is given up. Losses of machines and retries with smaller micro-batches have
    # budgets of their own: max_attempts * LOSSES_PER_ATTEMPT and MOST_OOM_RETRIES.
    max_attempts: int
    # How often micro-batches are halved for every unit that is handed out from now on.
    halvings: int = 0
    waiting: deque[Any] = field(init=False)
    # Units that wait as well: by worker, the one that it gets next, unless another worker is idle before.
    promised: dict[int, Any] = field(init=False, default_factory=dict)
    running: set[Any] = field(init=False, default_factory=set)
    done: set[Any] = field(init=False, default_factory=set)
    given_up: dict[Any, str] = field(init=False, default_factory=dict)
    errors: dict[Any, int] = field(init=False, default_factory=dict)
    losses: dict[Any, int] = field(init=False, default_factory=dict)
    oom_retries: dict[Any, int] = field(init=False, default_factory=dict)
    # How often a unit was handed out, and attempts at running units beside the first.
    tries: dict[Any, int] = field(init=False, default_factory=dict)
    copies: dict[Any, int] = field(init=False, default_factory=dict)
    # By halvings: the units whose memory ran out with fewer.
    _ran_out: dict[int, set[Any]] = field(init=False, default_factory=dict)
    # The workers that died or fell silent under a unit, one for each time.
    felled: dict[Any, list[int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting = deque(self.units)

    @property
    def finished(self) -> bool:
        return not self.any_waits and not self.running

    @property
    def any_waits(self) -> bool:
        return bool(self.waiting or self.promised)

    def promise(self, worker: int) -> Any | None:
        """The unit that `take` gives this worker next, if it is not the last to be idle: it may read it already."""
        if worker not in self.promised and self.waiting:
            self.promised[worker] = self.waiting.popleft()
        return self.promised.get(worker)

    def take(self, worker: int = 0) -> Any | None:
        """The next unit to run on a worker, or None while none waits: what was promised to others goes last."""
        if not self.any_waits:
            return None
        if worker in self.promised:
            unit = self.promised.pop(worker)
        else:
            unit = self.waiting.popleft() if self.waiting else self.promised.popitem()[1]
        self.running.add(unit)
        self.tries[unit] = self.attempt(unit) + 1
        if self.halvings > self.oom_retries.get(unit, 0):
            self.oom_retries[unit] = self.halvings
        return unit

    def attempt(self, unit: Any) -> int:
        """Which attempt at the unit was the last to be handed out, from 1."""
        return self.tries.get(unit, 0)

    def take_again(self, unit: Any) -> None:
        """Another attempt at a unit that runs, beside those that there are: the first to succeed counts."""
        assert unit in self.running
        self.copies[unit] = self.copies.get(unit, 0) + 1
        self.tries[unit] += 1

    @property
    def states(self) -> dict[str, int]:
        """How many units are in each state."""
        counted = (("running", self.running), ("done", self.done), ("given_up", self.given_up))
        waiting = len(self.waiting) + len(self.promised)
        return {"waiting": waiting} | {name: len(units) for name, units in counted}

    def succeed(self, unit: Any) -> None:
        self.running.remove(unit)
        self.copies.pop(unit, None)
        self.done.add(unit)

    def fail(self, unit: Any, reason: str) -> bool:
        """The unit itself went wrong. Returns whether it is given up; else it waits again, behind the others."""
        self.errors[unit] = self.errors.get(unit, 0) + 1
        return self._again(unit, reason, self.errors[unit] >= self.max_attempts or self._is_guilty(unit))

    def lose(self, unit: Any, reason: str, worker: int | None = None) -> bool:
        """The machine under the unit went away. Returns whether the unit is given up.

        worker: that died or fell silent under it; None where it was storage that failed.
        """
        self.losses[unit] = self.losses.get(unit, 0) + 1
        if worker is not None:
            self.felled.setdefault(unit, []).append(worker)
        spent = self.losses[unit] >= self.max_attempts * LOSSES_PER_ATTEMPT
        return self._again(unit, reason, spent or self._is_guilty(unit))

    def writes_behind(self, unit: Any) -> bool:
        """Whether a unit's output may be written beside another unit: not if it was lost before. Then it has its worker
        for itself, so that what becomes of the worker is its own doing."""
        return not self.losses.get(unit)

    def acquit(self, worker: int) -> None:
        """What failed under this worker was the worker's: it counts on no unit."""
        for unit, workers in self.felled.items():
            self.losses[unit] -= workers.count(worker)
            self.felled[unit] = [one for one in workers if one != worker]

    def _is_guilty(self, unit: Any) -> bool:
        """Whether the unit took down two different workers, and had its tries."""
        felled = self.felled.get(unit, [])
        return len(set(felled)) > 1 and len(felled) + self.errors.get(unit, 0) >= GUILTY_TRIES

    def put_back(self, unit: Any) -> None:
        """It waits again as it was: what its attempt failed of was not the unit's, and counts on nothing."""
        self._again(unit, "", last=False)

    def retry_smaller(self, unit: Any, reason: str) -> bool:
        """Its memory ran out: it waits again, with micro-batches of half the size. Returns whether it is given up."""
        last = not self.allow_smaller(unit)
        return self._again(unit, reason, last)

    def allow_smaller(self, unit: Any) -> bool:
        """Half the size in the unit's next attempt; and in every unit's, once it did not fit several.

        Returns False where the unit has no next attempt, or they were halved enough.
        """
        oom_retries = self.oom_retries.get(unit, 0) + 1
        if unit in self.done or unit in self.given_up or oom_retries > MOST_OOM_RETRIES:
            return False
        self.oom_retries[unit] = oom_retries
        ran_out = self._ran_out.setdefault(oom_retries, set())
        ran_out.add(unit)
        if len(ran_out) >= SHRINKS_ALL:
            self.halvings = max(self.halvings, oom_retries)
        return True

    def _again(self, unit: Any, reason: str, last: bool) -> bool:
        """The end of an attempt that did not succeed; while another is at the unit, that one's end decides."""
        if self.copies.get(unit, 0) > 1:
            self.copies[unit] -= 1
            return False
        if self.copies.pop(unit, 0):
            return False
        self.running.remove(unit)
        if last:
            self.given_up[unit] = reason
        else:
            self.waiting.append(unit)
        return last
