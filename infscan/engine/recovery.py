"""What worker failures cost: the work lost, the time until the worker is back, what the others did meanwhile.

The pool records them as they happen; nothing is decided by them. A restarted driver's share is the time to its first
unit. All times are measured on the driver.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("infscan")
# After so many finished units of a step, the next may take so many times what the longest of them took.
_MEASURED_UNITS, _TIMES_LONGEST = 5, 20


@dataclass
class Pace:
    """Units that one step finished, and the seconds they took in all: from being handed out to being found done."""

    units: int = 0
    seconds: float = 0.0
    longest: float = 0.0


@dataclass
class WorkerFailure:
    """One worker's failure, by the log's clock on the driver."""

    worker: int
    reason: str
    # When it was found.
    at: float
    # How long ago its unit, or the first of its two, had been handed out, the time until the failure was found
    # included; 0 where it had none.
    lost_work_s: float
    # Of the step that it failed in.
    pace: Pace
    # From then until its ranks had loaded the model again.
    restart_s: float | None = None
    # From then until it was handed its next unit, or failed again; None where no unit was left for it.
    recovery_s: float | None = None
    # Units that other workers were handed in that time.
    units_by_others: int = 0

    def to_json(self) -> dict[str, Any]:
        """For summary.json; usual_unit_s: the mean of the step's finished units."""
        usual = self.pace.seconds / self.pace.units if self.pace.units else None
        return {
            "worker": self.worker,
            "reason": self.reason,
            "unit_s": _rounded(self.lost_work_s),
            "start_s": _rounded(self.restart_s),
            "back_s": _rounded(self.recovery_s),
            "usual_unit_s": _rounded(usual),
            "meanwhile": self.units_by_others,
        }


@dataclass
class RecoveryLog:
    """The worker failures of one run, of all its steps and stages, in order."""

    clock: Callable[[], float] = time.monotonic
    # The dead driver that this one took over from, where there was one.
    followed: str | None = None
    # When the run was opened, by the clock; now, where it is not given.
    opened: float | None = None
    # From the run's opening until its first unit of work went out; None before.
    first_unit_s: float | None = None
    failures: list[WorkerFailure] = field(default_factory=list)
    # Workers that are not used any more: which, on what host, and what they said last.
    retired: list[dict[str, Any]] = field(default_factory=list)
    # Attempts at units that were late with another worker.
    reissued: int = 0
    _opened: float = field(init=False)
    _pace: Pace = field(init=False, default_factory=Pace)
    # By worker: when its units were handed out, the one that it computes and the one that it writes.
    _started_at: dict[int, dict[Any, float]] = field(init=False, default_factory=dict)
    _away: dict[int, WorkerFailure] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._opened = self.clock() if self.opened is None else self.opened

    def driver(self) -> dict[str, Any]:
        """The driver's part of summary.json."""
        return {"followed": self.followed, "first_unit_s": _rounded(self.first_unit_s)}

    def start_step(self) -> None:
        self._pace = Pace()

    def unit_started(self, worker: int, unit: Any) -> None:
        """A unit went to the worker."""
        now = self.clock()
        self._started_at.setdefault(worker, {})[unit] = now
        if self.first_unit_s is None:
            self.first_unit_s = now - self._opened
            if self.followed:
                log.info("driver      at work %.1f s after its start, in place of %s", self.first_unit_s, self.followed)
        if mine := self._away.pop(worker, None):
            mine.recovery_s = now - mine.at
        for other in self._away.values():
            other.units_by_others += 1

    def unit_finished(self, worker: int, unit: Any) -> None:
        now = self.clock()
        took = now - self._started_at.get(worker, {}).pop(unit, now)
        self._pace.units += 1
        self._pace.seconds += took
        self._pace.longest = max(self._pace.longest, took)

    def limit_s(self, most: float, least: float) -> float:
        """Seconds that a unit may take: `most` until enough of the step's units were measured, then 20 times what the
        longest of them took, within `least` and `most`."""
        if self._pace.units < _MEASURED_UNITS:
            return most
        return min(most, max(least, _TIMES_LONGEST * self._pace.longest))

    def unit_failed(self, worker: int, unit: Any) -> None:
        """The unit went wrong, and the worker is still there."""
        self._started_at.get(worker, {}).pop(unit, None)

    def worker_lost(self, worker: int, reason: str) -> None:
        now = self.clock()
        if before := self._away.pop(worker, None):
            before.recovery_s = now - before.at
        began = min(self._started_at.pop(worker, {}).values(), default=now)
        failure = WorkerFailure(worker, reason, now, now - began, self._pace)
        self.failures.append(failure)
        self._away[worker] = failure

    def worker_retired(self, worker: int, host: str | None, reason: str) -> None:
        """A worker that was lost once too often is not rebuilt."""
        self.retired.append({"worker": worker, "host": host, "reason": reason})

    def worker_started(self, worker: int) -> None:
        """Its ranks have loaded the model, for the first time or again."""
        if failure := self._away.get(worker):
            failure.restart_s = self.clock() - failure.at
            log.info(
                "worker %d is back after %.1f s; %.1f s of work are done again, %d units went to others meanwhile",
                worker, failure.restart_s, failure.lost_work_s, failure.units_by_others,
            )  # fmt: skip

    def workers_closed(self) -> None:
        """The workers are gone for good; those of another stage have the same numbers."""
        self._away.clear()
        self._started_at.clear()


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
