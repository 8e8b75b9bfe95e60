"""A run's state as a person reads it on a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape

from infscan.report.terminal import one_line
from infscan.results.status import Driver, Status, exit_code

_REASONS = 5
_QUERIES = 12
_FIX = "the same command goes on from here"


def show_status(found: Status, console: Console | None = None) -> None:
    """Print it; whatever comes from a run is escaped."""
    out = console or Console(soft_wrap=True, highlight=False)
    out.print(f"run         {escape(one_line(found.uri))}")
    out.print(f"phase       {found.phase}")
    if found.phase != "finished":
        for name, text in _driver(found.driver).items():
            out.print(escape(f"{name:<12}{one_line(text)}"))
    if found.shards is not None:
        done = f"{found.done:,} of {found.shards:,} done{_given_up(found)}"
        out.print(f"shards      {done}; {found.sequences:,} sequences planned")
    if found.made and found.phase not in ("scan", "index", "finished"):
        out.print("made        " + ", ".join(f"{count:,} {kind}" for kind, count in found.made.items()))
    if found.sequences_per_s is not None:
        out.print(f"rate        {found.sequences_per_s:,.0f} sequences/s by the last shards{_left(found)}")
    if found.last is not None and found.phase in ("scan", "index"):
        out.print(f"last shard  {_clock(max(0.0, time.time() - found.last))} ago, by the store's clock")
    for name, reason in list(found.quarantined.items())[:_REASONS]:
        out.print(escape(f"quarantine  {name}: {one_line(reason)}"))
    for warning in found.warnings:
        out.print(escape(f"warning     {one_line(warning)}"))
    _rows(found, out)


def show_sweep(uri: str, cells: Mapping[str, Status], console: Console | None = None) -> None:
    """Print a line for each cell."""
    out = console or Console(soft_wrap=True, highlight=False)
    finished = sum(found.phase == "finished" for found in cells.values())
    idle = "; nothing works on the others" if exit_code(*cells.values()) else ""
    out.print(f"sweep       {escape(one_line(uri))}: {finished} of {len(cells)} cells finished{idle}")
    for name, found in cells.items():
        shards = "" if found.shards is None else f"{found.done:,} of {found.shards:,} shards"
        facts = f"{shards}{_left(found)}{_given_up(found)}{_lost(found)}"
        out.print(escape(f"  {found.phase:<9} {facts}  {one_line(name)}"))


def _driver(driver: Driver) -> dict[str, str]:
    """Lines by their names."""
    if driver.pid is None:
        return {"driver": f"none, and the run is not finished; {_FIX}"}
    lines = {"driver": f"process {driver.pid} on {driver.host}, since {driver.since}"}
    if driver.killed:
        lines["driver"] += f": killed; {_FIX}"
    if driver.alive and driver.state:
        lines["state"] = driver.state
    if driver.heartbeat_age_s is not None:
        lines["heartbeat"] = f"{_clock(driver.heartbeat_age_s)} ago"
    if not driver.alive and not driver.killed:
        lines["heartbeat"] += f", more than cluster.lease_s={driver.lease_s:g} s: taken for dead; {_FIX}"
    return lines


def _rows(found: Status, out: Console) -> None:
    if not found.top:
        return
    of = "published" if found.read is None else f"provisional: scan scores of the latest {found.read:,} shard files"
    out.print(f"\nstrongest rows ({of})")
    queries = list(dict.fromkeys(row.query_id for row in found.top))
    for query_id in queries[:_QUERIES]:
        out.print(escape(f"  {one_line(query_id)}"))
        for row in sorted(found.top, key=lambda row: row.side == "opponent"):
            if row.query_id == query_id:
                out.print(f"    {row.side:<9} {row.rank:>3}  sequence {row.sequence_id:>12}  {row.score:+.4g}")
    if len(queries) > _QUERIES:
        out.print(f"  ... and {len(queries) - _QUERIES} queries more")


def _left(found: Status) -> str:
    """What is left at this rate, while somebody works on it."""
    return f", {_clock(found.eta_s)} left" if found.eta_s and found.driver.alive else ""


def _lost(found: Status) -> str:
    driver = found.driver
    if found.phase == "finished" or driver.pid is None:
        return ""
    if driver.alive:
        return f", {driver.state}" if driver.state else ""
    return ", killed" if driver.killed else ", driver silent"


def _given_up(found: Status) -> str:
    return f", {len(found.quarantined)} quarantined" if found.quarantined else ""


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
