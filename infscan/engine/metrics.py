"""A run's metrics: Ray's, which Prometheus scrapes, and a trace of its workers' time.

The pool and the telemetry record things as they happen; nothing is decided by them. docs/observability.md lists the
names.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import Any

from infscan.storage import Store
from infscan.telemetry import Phase

log = logging.getLogger("infscan")

# As `infscan.model.worker` has it: a name, when it began and ended (seconds since 1970), and what is known of it.
Span = tuple[str, float, float, dict[str, Any]]
TRACE = "trace.json"
# Of a worker's or a rank's spans so many are kept: 20 MB of JSON.
_MOST_SPANS = 100_000
_WAITS_S = (0.001, 0.01, 0.1, 1.0, 10.0, 60.0, 600.0)
_UNITS_S = (0.1, 1.0, 10.0, 60.0, 300.0, 1800.0)


class Metrics:
    """Ray's metrics of one run, all tagged `run`; Ray's agents offer them to Prometheus as `ray_<name>`."""

    def __init__(self, run: str) -> None:
        from ray.util import metrics

        def make(kind: Any, name: str, what: str, *tags: str, **more: Any) -> Any:
            made = kind(f"infscan_{name}", description=what, tag_keys=("run", *tags), **more)
            made.set_default_tags({"run": run})
            return made

        self.tokens = make(metrics.Counter, "tokens", "Tokens that finished units read, by phase.", "phase")
        self.sequences = make(metrics.Counter, "sequences", "Sequences of finished units, by phase.", "phase")
        self.units = make(metrics.Gauge, "units", "Units of the phase at work by state.", "phase", "state")
        self.shards = make(metrics.Gauge, "shards", "Shards of the scan by state.", "state")
        self.workers = make(metrics.Gauge, "workers", "Workers by state.", "state")
        self.retries = make(metrics.Counter, "retries", "Units handed out again, by cause.", "phase", "cause")
        self.seconds = make(metrics.Gauge, "phase_seconds", "Seconds that a phase has taken so far.", "phase")
        self.faults = make(metrics.Counter, "storage_faults", "Passing faults of storage by kind.", "kind")
        self.waits = make(
            metrics.Histogram, "queue_wait_seconds", "Seconds that a worker waited for its next unit.", "phase",
            boundaries=_WAITS_S,
        )  # fmt: skip
        self.unit_seconds = make(
            metrics.Histogram, "unit_seconds", "Seconds from handing a unit out to its end.", "phase",
            boundaries=_UNITS_S,
        )  # fmt: skip


class RunMetrics:
    """One run's metrics and trace.

    traced: keep spans, for `write_trace`. exported: offer metrics through Ray, which must be connected by the first.
    """

    def __init__(
        self, run: str, *, traced: bool = False, exported: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.run, self.traced, self.exported, self.clock = run, traced, exported, clock
        # Starting the workers is a phase within the first one that asks for them.
        self._phases: list[str] = []
        # Units of the step at work that earlier processes finished.
        self.done_before = 0
        self.spans: list[tuple[int, Span]] = []
        # By rank of worker 0, over all the workers that this run has had.
        self._rank_spans: list[list[Span]] = []
        # By worker and unit: which attempt, when it began, and when it was computed, if it is.
        self._running: dict[tuple[int, Any], tuple[int, float, float | None]] = {}
        self._idle_since: dict[int, float] = {}
        self._faults: Counter[str] = Counter()

    @cached_property
    def metrics(self) -> Metrics | None:
        """None where they are not exported."""
        return Metrics(self.run) if self.exported else None

    @property
    def phase(self) -> str:
        """The innermost phase at work."""
        return self._phases[-1] if self._phases else ""

    # Called by the telemetry.

    def began(self, phase: Phase) -> None:
        self._phases.append(phase.name)
        self._idle_since.clear()

    def advanced(self, phase: Phase, units: int, sequences: int, tokens: int) -> None:
        if found := self.metrics:
            tags = {"phase": phase.name}
            for counter, count in ((found.sequences, sequences), (found.tokens, tokens)):
                if count:
                    counter.inc(count, tags=tags)
            found.seconds.set(phase.elapsed, tags=tags)

    def ended(self, phase: Phase) -> None:
        self._phases.pop()
        if found := self.metrics:
            found.seconds.set(phase.elapsed, tags={"phase": phase.name})

    # Called by the executor.

    def unit_started(self, worker: int, unit: Any, attempt: int) -> None:
        """A unit went to a worker."""
        now = self.clock()
        since = self._idle_since.pop(worker, None)
        if since is not None and (found := self.metrics):
            found.waits.observe(max(0.0, now - since), tags={"phase": self.phase})
        self._running[worker, unit] = (attempt, now, None)
        log.debug("unit %s goes to worker %d", unit, worker, extra=self.facts(worker, unit, attempt))

    def unit_computed(self, worker: int, unit: Any) -> None:
        """The worker is free for another unit, while this one's output is written."""
        now = self._idle_since[worker] = self.clock()
        if found := self._running.get((worker, unit)):
            self._running[worker, unit] = (*found[:2], now)

    def unit_finished(self, worker: int, unit: Any, outcome: str) -> None:
        """A unit is `done`, or is handed out again or given up because of an `error`, `memory`, `storage`, or because
        the worker was `lost`; or another worker was first, and this one `late`."""
        now = self.clock()
        attempt, began, computed = self._running.pop((worker, unit), (0, now, None))
        if computed is None:
            self._idle_since[worker] = now
        if not attempt:
            return
        if found := self.metrics:
            if outcome in ("done", "late"):
                found.unit_seconds.observe(now - began, tags={"phase": self.phase})
            else:
                found.retries.inc(1, tags={"phase": self.phase, "cause": outcome})
        facts = self.facts(worker, unit, attempt)
        if self.traced and len(self.spans) < _MOST_SPANS:
            self.spans.append((worker, (self.phase, began, computed or now, facts | {"outcome": outcome})))
        log.debug("unit %s on worker %d: %s", unit, worker, outcome, extra=facts | {"outcome": outcome})

    def facts(self, worker: int, unit: Any, attempt: int) -> dict[str, Any]:
        """A unit in a log line; a unit of the scan is a shard."""
        known = {"run": self.run, "phase": self.phase, "worker": worker, "unit": unit, "attempt": attempt}
        return known | ({"shard": f"shard-{unit:06d}"} if self.phase.endswith("scan") else {})

    def record_states(self, units: Mapping[str, int], workers: Mapping[str, int], faults: Mapping[str, int]) -> None:
        """How many units and workers are in which state now; all passing faults of storage so far."""
        found = self.metrics
        if found is None:
            return
        for state, count in units.items():
            found.units.set(count, tags={"phase": self.phase, "state": state})
            if self.phase.endswith("scan"):
                found.shards.set(count + (self.done_before if state == "done" else 0), tags={"state": state})
        for state, count in workers.items():
            found.workers.set(count, tags={"state": state})
        for kind, count in faults.items():
            if count > self._faults[kind]:
                found.faults.inc(count - self._faults[kind], tags={"kind": kind})
                self._faults[kind] = count

    def write_trace(self, store: Store, ranks: Sequence[Sequence[Span]]) -> None:
        """<output>/trace.json, for Perfetto or chrome://tracing: every worker's units, and what the first worker's
        ranks did within them and wrote of them, beside what was written of those before them."""
        self._rank_spans = [[*old, *new] for old, new in zip_longest(self._rank_spans, ranks, fillvalue=())]
        if not (self.spans or self._rank_spans):
            return
        events = [_named(1, "workers"), *(_event(1, worker, span) for worker, span in self.spans)]
        if self._rank_spans:
            # Units are written beside what is computed.
            events += [_named(2, "ranks of worker 0"), _named(3, "what they write")]
            events += [
                _event(3 if span[0] == "write" else 2, rank, span)
                for rank, spans in enumerate(self._rank_spans)
                for span in spans
            ]
        value = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"run": self.run}}
        store.write(TRACE, json.dumps(value).encode())


def _named(process: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": process, "tid": 0, "name": "process_name", "args": {"name": name}}


def _event(process: int, thread: int, span: Span) -> dict[str, Any]:
    """A complete event of the trace event format; its times are in microseconds."""
    name, began, ended, facts = span
    return {
        "ph": "X", "pid": process, "tid": thread, "name": name, "cat": "infscan",
        "ts": round(began * 1e6), "dur": round((ended - began) * 1e6), "args": facts,
    }  # fmt: skip
