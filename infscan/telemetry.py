"""Progress and logs: one live bar on a terminal, a line per interval otherwise; seconds and counts by phase."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from infscan.secrets import redact

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("infscan")
_INTERVAL_S = 10.0
# Of a phase of fewer units a line says tenths of one; a time left is said once so much of a unit is done.
_FEW_UNITS, _ENOUGH = 100, 0.25


def shown(text: str) -> str:
    """A message as a terminal or a log may show it: no secret, and nothing that controls a terminal.

    Line breaks, escapes, backspaces and bidirectional marks (from file names, ids or columns of a corpus) are spelt
    out: one message is one line.
    """
    return "".join(
        character if character.isprintable() or character == "\t" else f"\\u{ord(character):04x}"
        for character in redact(text)
    )


class JsonLines(logging.Formatter):
    """A log line as one JSON object: time (UTC), level, message, and what it is about (run, phase, shard, attempt)."""

    def __init__(self, **always: str) -> None:
        super().__init__()
        self.always = always

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        about = {key: value for key, value in vars(record).items() if key not in _USUAL}
        known = {"time": moment, "level": record.levelname.lower(), "message": record.getMessage()}
        return json.dumps(known | self.always | about, ensure_ascii=False, default=str)


# What every record has; the rest was given with `extra`.
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _Shown(logging.Filter):
    """Every log line goes through `shown`."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage()), ()
        return True


def console() -> Console:
    """Where people look: standard error, so that standard output stays for results."""
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True)


def configure_logs(level: int = logging.INFO, *, run: str | None = None, json_lines: bool = False) -> None:
    """infscan's own log lines to standard error; other libraries only from warnings on.

    json_lines: each as a JSON object that names the run; a line for every unit of work that begins or ends is among
    them.
    """
    handler: logging.Handler
    if json_lines:
        level = logging.DEBUG
        handler = logging.StreamHandler()
        handler.setFormatter(JsonLines(**({"run": run} if run else {})))
    elif sys.stderr.isatty():
        from rich.logging import RichHandler

        handler = RichHandler(console=console(), show_path=False, show_level=False, log_time_format="%H:%M:%S")
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_Shown())
    root = logging.getLogger("infscan")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level)


class Listener(Protocol):
    """Who hears of phases as they go on."""

    def began(self, phase: Phase) -> None: ...

    def advanced(self, phase: Phase, units: int, sequences: int, tokens: int) -> None: ...

    def ended(self, phase: Phase) -> None: ...


@dataclass
class Phase:
    """One phase's counters; `advance` is called as its units end."""

    name: str
    units: int
    unit_name: str
    units_done: int = 0
    # Of the units at work, how many units' worth is done.
    at_work: float = 0.0
    sequences: int = 0
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    listener: Listener | None = None

    def advance(self, *, units: int = 1, sequences: int = 0, tokens: int = 0) -> None:
        self.units_done += units
        self.sequences += sequences
        self.tokens += tokens
        if self.listener:
            self.listener.advanced(self, units, sequences, tokens)

    @property
    def elapsed(self) -> float:
        return max(time.monotonic() - self.began, 1e-9)

    def line(self) -> str:
        """`scan  12/26 shards  310 sequences/s  21,400 tokens/s  ETA 0:00:41`

        Units at work count for what is done of them: rates and the time left do not wait for their ends.
        """
        done = self.units_done + min(self.at_work, self.units - self.units_done)
        # What the finished units read, and as much in proportion of those at work.
        more = done / self.units_done if self.units_done else 0.0
        rates = []
        if self.sequences and more:
            rates.append(f"{rate(self.sequences * more / self.elapsed)} sequences/s")
        if self.tokens and more:
            rates.append(f"{rate(self.tokens * more / self.elapsed)} tokens/s")
        # Of the first unit's first micro-batches nothing is foretold: a process warms up in them.
        if self.units_done < self.units and done >= _ENOUGH:
            left = int(self.elapsed / done * (self.units - done))
            rates.append(f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
        shown = f"{done:.1f}" if done > self.units_done and self.units < _FEW_UNITS else f"{self.units_done}"
        return "  ".join([f"{shown}/{self.units} {self.unit_name}", *rates])


def rate(value: float) -> str:
    """A rate for people: `21,400`, `42`, `0.13`."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


class Telemetry:
    """The phases of one run. `phases` is written to summary.json: {name: {seconds, sequences, tokens}}.

    A second is of one phase: what a phase within another takes (workers that start when they are first asked for) is
    not in the other's.
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self.phases: dict[str, dict[str, Any]] = {}
        self.warnings: list[str] = []
        self.listener = listener
        self._prefix = ""
        self._open: list[Phase] = []

    def within(self, prefix: str) -> Telemetry:
        """The same record, for a part of the run whose phases are named `<prefix><name>`."""
        part = Telemetry()
        part.phases, part.warnings, part._prefix = self.phases, self.warnings, prefix
        part.listener, part._open = self.listener, self._open
        return part

    def warn(self, message: str) -> None:
        """Show a warning and keep it for summary.json; one that was given before is not repeated."""
        message = redact(message)
        if message in self.warnings:
            return
        self.warnings.append(message)
        log.warning("%s", message)

    @contextmanager
    def phase(self, name: str, units: int = 1, unit_name: str = "units") -> Iterator[PhaseView]:
        """Time a phase and show its progress; a phase entered twice adds up."""
        name = self._prefix + name
        entered = time.monotonic()
        phase = Phase(name, units, unit_name, began=entered, listener=self.listener)
        self._open.append(phase)
        if self.listener:
            self.listener.began(phase)
        live = sys.stderr.isatty()
        view: PhaseView = _Live(phase) if live else _Lines(phase)
        try:
            with view:
                yield view
        finally:
            phase.seconds = phase.elapsed
            self._open.pop()
            if self._open:
                self._open[-1].began += time.monotonic() - entered
            if self.listener:
                self.listener.ended(phase)
        log.info("%-11s %s  in %.1f s", name, phase.line(), phase.seconds)
        total = self.phases.setdefault(name, {"seconds": 0.0, "sequences": 0, "tokens": 0})
        total["seconds"] = round(total["seconds"] + phase.seconds, 3)
        total["sequences"] += phase.sequences
        total["tokens"] += phase.tokens


class PhaseView:
    """A phase on its way to a person."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase

    def __enter__(self) -> PhaseView:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def advance(self, *, units: int = 1, sequences: int = 0, tokens: int = 0) -> None:
        self.phase.at_work = max(0.0, self.phase.at_work - units)
        self.phase.advance(units=units, sequences=sequences, tokens=tokens)
        self.show()

    def at_work(self, done: float) -> None:
        """So many units' worth is done of those at work."""
        self.phase.at_work = done
        self.show()

    def show(self) -> None:
        """Show how far the phase is."""


class _Live(PhaseView):
    def __enter__(self) -> PhaseView:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:<11}"),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
        )
        self.progress = Progress(*columns, console=console(), transient=True)
        self.progress.start()
        self.task = self.progress.add_task(self.phase.name, total=self.phase.units, line="")
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def show(self) -> None:
        done = self.phase.units_done + self.phase.at_work
        self.progress.update(self.task, completed=done, line=self.phase.line())


class _Lines(PhaseView):
    # When a line was said, and of how many units: where nothing went on, it is not said again.
    said, said_of = 0.0, 0.0

    def show(self) -> None:
        done = self.phase.units_done + self.phase.at_work
        # The last one is said with the phase's seconds.
        due = self.phase.units_done < self.phase.units and self.phase.elapsed - self.said >= _INTERVAL_S
        if due and done != self.said_of:
            self.said, self.said_of = self.phase.elapsed, done
            log.info("%-11s %s", self.phase.name, self.phase.line())
