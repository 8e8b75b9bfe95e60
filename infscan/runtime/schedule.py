"""Which unit of work goes out next, and when one is given up: a pure state machine, without Ray, clocks or threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

# A unit outlives many more losses of machines than errors of its own: pre-emption says nothing about the unit.
LOSSES_PER_ATTEMPT = 10
# 2^16 tokens are more than a micro-batch has.
MOST_HALVINGS = 16


@dataclass
class Schedule:
    """Units are waiting, running, done or given up; each is in exactly one of these.

    max_attempts: errors of a unit itself after which it is given up. Losses of machines and halvings of micro-batches
    have budgets of their own: max_attempts * LOSSES_PER_ATTEMPT and MOST_HALVINGS.
    """

    units: Iterable[int]
    max_attempts: int
    waiting: deque[int] = field(init=False)
    running: set[int] = field(init=False, default_factory=set)
    done: set[int] = field(init=False, default_factory=set)
    given_up: dict[int, str] = field(init=False, default_factory=dict)
    errors: dict[int, int] = field(init=False, default_factory=dict)
    losses: dict[int, int] = field(init=False, default_factory=dict)
    halvings: dict[int, int] = field(init=False, default_factory=dict)

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

    def attempt(self, unit: int) -> int:
        """Which attempt at the unit this is, from 1."""
        halvings = min(self.halvings.get(unit, 0), MOST_HALVINGS)
        return 1 + self.errors.get(unit, 0) + self.losses.get(unit, 0) + halvings

    @property
    def states(self) -> dict[str, int]:
        """How many units are in each state."""
        counted = (("waiting", self.waiting), ("running", self.running), ("done", self.done))
        return {name: len(units) for name, units in counted} | {"given_up": len(self.given_up)}

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

    def shrink(self, unit: int, reason: str) -> bool:
        """Its memory ran out: it waits again, with micro-batches of half the size. Returns whether it is given up."""
        last = not self.halve(unit)
        return self._again(unit, reason, last)

    def halve(self, unit: int) -> bool:
        """Half the size in the unit's next attempt. Returns False where it has none, or they were halved enough."""
        halvings = self.halvings.get(unit, 0) + 1
        if unit in self.done or unit in self.given_up or halvings > MOST_HALVINGS:
            return False
        self.halvings[unit] = halvings
        return True

    def _again(self, unit: int, reason: str, last: bool) -> bool:
        self.running.remove(unit)
        if last:
            self.given_up[unit] = reason
        else:
            self.waiting.append(unit)
        return last
