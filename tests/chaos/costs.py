"""What runs under faults lost, from what they say themselves and from undisturbed twins run right before them."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Event:
    """A unit was handed to a worker (one of whose ranks is process `pid`), or found done."""

    when: float
    what: str
    worker: int
    pid: int


@dataclass(frozen=True)
class Span:
    """A rank was at work on one unit."""

    began: float
    ended: float
    worker: int
    function: str


@dataclass
class Result:
    """What became of one run.

    said: what its driver ended with; sentence: what the first one did, where it had two. losses, driver: of its workers
    and of the last driver, as summary.json has them. twin_s: of its undisturbed twin, where it had one. restart_s: of
    the second driver, until its first unit; start_s: likewise of the first one; thrown_s: how long ago the units that
    died with that one had been handed out, in all. unit_s: mean of the finished ones. gaps: how long the other worker
    waited for its next unit while the struck one was away; calm_gaps: any worker otherwise.
    """

    fault: str
    seed: int
    struck_at: int
    seconds: float
    recovered: bool
    torn: list[str]
    redone: list[str]
    said: str = ""
    sentence: str = ""
    twin_s: float | None = None
    losses: list[dict[str, Any]] = field(default_factory=list)
    driver: dict[str, Any] = field(default_factory=dict)
    start_s: float | None = None
    restart_s: float | None = None
    thrown_s: float = 0.0
    unit_s: float | None = None
    gaps: list[float] = field(default_factory=list)
    calm_gaps: list[float] = field(default_factory=list)

    @property
    def costs(self) -> list[tuple[float, float, float]]:
        """Of every loss: work thrown away, until at work again, and one start and one usual unit, all in seconds.

        A worker that is lost again before it is back has one loss; one that is not back when the run ends has none.
        """
        if self.restart_s is not None and self.start_s is not None:
            return [(self.thrown_s, self.restart_s, self.start_s + (self.unit_s or 0.0))]
        costs = []
        thrown: dict[int, float] = defaultdict(float)
        away: dict[int, float] = defaultdict(float)
        for loss in self.losses:
            worker = loss["worker"]
            thrown[worker] += loss["unit_s"]
            away[worker] += loss["back_s"] or loss["start_s"] or 0.0
            if loss["start_s"] is not None:
                usual = loss["start_s"] + (loss["usual_unit_s"] or 0.0)
                costs.append((thrown.pop(worker), away.pop(worker), usual))
        return costs

    @property
    def never_back(self) -> int:
        """Losses of which the run ended before the worker was back."""
        last = {loss["worker"]: loss["start_s"] for loss in self.losses}
        return sum(start_s is None for start_s in last.values())


def in_flight_s(events: Sequence[Event], ended: float) -> float:
    """Seconds since the units that were not done at the end had been handed out, in all."""
    out: dict[int, deque[float]] = defaultdict(_at_once)
    for event in events:
        if event.what == "handed":
            out[event.worker].append(event.when)
        elif out[event.worker]:
            out[event.worker].popleft()
    return sum(ended - when for units in out.values() for when in units)


def _at_once() -> deque[float]:
    """A worker's units: the one that it writes, and the one that it computes."""
    return deque(maxlen=2)


def mean_unit_s(events: Iterable[Event]) -> float | None:
    handed: dict[int, deque[float]] = defaultdict(_at_once)
    seconds = []
    for event in events:
        if event.what == "handed":
            handed[event.worker].append(event.when)
        elif handed[event.worker]:
            seconds.append(event.when - handed[event.worker].popleft())
    return statistics.mean(seconds) if seconds else None


def gaps(
    spans: Iterable[Span], events: Sequence[Event], struck: tuple[float, int] | None
) -> tuple[list[float], list[float]]:
    """How long workers waited between two units of one pass: the other one while the struck one was away; any else."""
    struck_at, struck_worker = struck or (float("inf"), -1)
    returns = (e.when for e in events if e.what == "handed" and e.worker == struck_worker and e.when > struck_at)
    back = min(returns, default=float("inf"))
    away: list[float] = []
    calm: list[float] = []
    ordered = sorted(spans, key=lambda span: (span.worker, span.began))
    for one, following in pairwise(ordered):
        if (one.worker, one.function) != (following.worker, following.function):
            continue
        if following.began < struck_at or one.ended > back:
            calm.append(following.began - one.ended)
        elif one.worker != struck_worker:
            away.append(following.began - one.ended)
    return away, calm


def recovered_table(results: list[Result]) -> str:
    rows = [
        (
            fault,
            len(mine),
            sum(result.recovered for result in mine),
            sum(len(result.redone) for result in mine),
            sum(len(result.torn) for result in mine),
        )
        for fault, mine in _by_fault(results)
    ]
    return _markdown(("fault", "runs", "recovered", "shards redone", "torn files seen"), rows)


def cost_table(results: list[Result]) -> str:
    """By fault, over the losses that its runs recorded; apart those whose run ended before the worker was back."""
    rows = []
    for fault, mine in _by_fault(results):
        losses = [loss for result in mine for loss in result.losses]
        too_late = sum(result.never_back for result in mine)
        costs = [cost for result in mine for cost in result.costs]
        pairs = [(result.seconds, result.twin_s) for result in mine if result.twin_s is not None]
        rows.append(
            (
                fault,
                f"{len(costs)} + {too_late}",
                spread([thrown for thrown, _, _ in costs], " s"),
                spread([away for _, away, _ in costs], " s"),
                spread([(thrown + away) / usual for thrown, away, usual in costs]),
                spread([loss["meanwhile"] for loss in losses], digits=0),
                spread([seconds - twin for seconds, twin in pairs], " s"),
                f"{len(pairs)} of {spread([twin for _, twin in pairs], ' s')}",
            )
        )
    header = (
        "fault",
        "losses + those never back",
        "work thrown away",
        "until at work again",
        "both, in starts and units",
        "units to the other worker meanwhile",
        "beyond its twin's seconds",
        "twins",
    )
    away = [gap for result in results for gap in result.gaps]
    calm = [gap for result in results for gap in result.calm_gaps]
    return (
        f"{_markdown(header, rows)}\n\n"
        f"Between two units of a pass the other worker waited {spread(away, ' s', digits=3)} while the struck one was "
        f"away ({len(away)} times), any worker {spread(calm, ' s', digits=3)} otherwise ({len(calm)} times)."
    )


def _markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def spread(values: Sequence[float], unit: str = "", digits: int = 1) -> str:
    """The median, and what four in five lie between."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}{unit}"
    low, *_, high = statistics.quantiles(values, n=10, method="inclusive")
    return f"{statistics.median(values):.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def _by_fault(results: list[Result]) -> Iterable[tuple[str, list[Result]]]:
    for fault in dict.fromkeys(result.fault for result in results):
        yield fault, [result for result in results if result.fault == fault]
