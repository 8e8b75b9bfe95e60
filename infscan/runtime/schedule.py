"""Which unit of work goes out next, and when one is given up: a pure state machine, without Ray, clocks or threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

# A unit outlives many more losses of machines than errors of its own: pre-emption says nothing about the unit.
LOSSES_PER_ATTEMPT = 10


@dataclass
class Schedule:
    """Units are waiting, running, done or given up; each is in exactly one of these.

    max_attempts: errors of a unit itself after which it is given up; losses of machines are counted apart.
    """

    units: Iterable[int]
    max_attempts: int
    waiting: deque[int] = field(init=False)
    running: set[int] = field(init=False, default_factory=set)
    done: set[int] = field(init=False, default_factory=set)
    given_up: dict[int, str] = field(init=False, default_factory=dict)
    errors: dict[int, int] = field(init=False, default_factory=dict)
    losses: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.waiting = deque(self.units)

    @property
    def finished(self) -> bool:
        return not self.waiting and not self.running

    def take(self) -> int | None:
        """The next unit to run, or None while none waits."""
        if not self.waiting:
            return None
        unit = self.waiting.popleft()
        self.running.add(unit)
        return unit

    def succeed(self, unit: int) -> None:
        self.running.remove(unit)
        self.done.add(unit)

    def fail(self, unit: int, reason: str) -> bool:
        """The unit itself went wrong. Returns whether it is given up; else it waits again, behind the others."""
        self.errors[unit] = self.errors.get(unit, 0) + 1
        return self._again(unit, reason, self.errors[unit] >= self.max_attempts)

    def lose(self, unit: int, reason: str) -> bool:
        """The machine under the unit went away. Returns whether the unit is given up."""
        self.losses[unit] = self.losses.get(unit, 0) + 1
        return self._again(unit, reason, self.losses[unit] >= self.max_attempts * LOSSES_PER_ATTEMPT)

    def _again(self, unit: int, reason: str, last: bool) -> bool:
        self.running.remove(unit)
        if last:
            self.given_up[unit] = reason
        else:
            self.waiting.append(unit)
        return last
