"""What a death costs: work thrown away, the time until a rebuilt worker is at work again, what others did meanwhile.

Told by the pool as it happens; no part in any decision. A restarted driver's share is the time to its first unit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("infscan")


@dataclass
class Pace:
    """Units that one pass finished, and the seconds they took in all: from being handed out to being found done."""

    units: int = 0
    seconds: float = 0.0


@dataclass
class Loss:
    """One worker's loss. Seconds are the driver's: what it cannot see yet has not happened.

    at: when it was found, by the ledger's clock. unit_s: how long ago its unit had been handed out, the time until the
    loss was found among it; 0 where it had none. start_s: from then until its ranks had loaded the model again. back_s:
    until it was handed its next unit, or was lost again; None where no unit was left for it. meanwhile: units that
    other workers were handed in that time. pace: of the pass that it was lost in.
    """

    worker: int
    reason: str
    at: float
    unit_s: float
    pace: Pace
    start_s: float | None = None
    back_s: float | None = None
    meanwhile: int = 0

    def to_json(self) -> dict[str, Any]:
        """For summary.json; usual_unit_s: the mean of the pass's finished units."""
        usual = self.pace.seconds / self.pace.units if self.pace.units else None
        return {
            "worker": self.worker,
            "reason": self.reason,
            "unit_s": _rounded(self.unit_s),
            "start_s": _rounded(self.start_s),
            "back_s": _rounded(self.back_s),
            "usual_unit_s": _rounded(usual),
            "meanwhile": self.meanwhile,
        }


@dataclass
class Losses:
    """The losses of one run, of all its passes and stages, in order.

    followed: the dead driver that this one took over from, where there was one. first_unit_s: from the run's opening
    until its first unit of work went out; None before.
    """

    clock: Callable[[], float] = time.monotonic
    followed: str | None = None
    first_unit_s: float | None = None
    all: list[Loss] = field(default_factory=list)
    _opened: float = field(init=False)
    _pace: Pace = field(init=False, default_factory=Pace)
    _handed_at: dict[int, float] = field(init=False, default_factory=dict)
    _away: dict[int, Loss] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._opened = self.clock()

    def driver(self) -> dict[str, Any]:
        """What summary.json says of the driver."""
        return {"followed": self.followed, "first_unit_s": _rounded(self.first_unit_s)}

    def next_pass(self) -> None:
        self._pace = Pace()

    def handed(self, worker: int) -> None:
        """A unit went to the worker."""
        now = self._handed_at[worker] = self.clock()
        if self.first_unit_s is None:
            self.first_unit_s = now - self._opened
            if self.followed:
                log.info("driver      at work %.1f s after its start, in place of %s", self.first_unit_s, self.followed)
        if mine := self._away.pop(worker, None):
            mine.back_s = now - mine.at
        for other in self._away.values():
            other.meanwhile += 1

    def done(self, worker: int) -> None:
        self._pace.units += 1
        self._pace.seconds += self.clock() - self._handed_at.pop(worker)

    def failed(self, worker: int) -> None:
        """Its unit went wrong, and it is still there."""
        self._handed_at.pop(worker, None)

    def lost(self, worker: int, reason: str) -> None:
        now = self.clock()
        if before := self._away.pop(worker, None):
            before.back_s = now - before.at
        loss = Loss(worker, reason, now, now - self._handed_at.pop(worker, now), self._pace)
        self.all.append(loss)
        self._away[worker] = loss

    def started(self, worker: int) -> None:
        """Its ranks have loaded the model, for the first time or again."""
        if loss := self._away.get(worker):
            loss.start_s = self.clock() - loss.at
            log.info(
                "worker %d is back after %.1f s; %.1f s of work are done again, %d units went to others meanwhile",
                worker, loss.start_s, loss.unit_s, loss.meanwhile,
            )  # fmt: skip

    def closed(self) -> None:
        """The workers are gone for good; those of another stage have the same numbers."""
        self._away.clear()
        self._handed_at.clear()


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
