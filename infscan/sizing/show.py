"""A plan's cost as a person reads it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from infscan.config import Config
from infscan.sizing.estimate import Estimate
from infscan.sizing.hosts import PROCESS_BYTES
from infscan.sizing.memory import largest
from infscan.steps.volume import size

# Columns that the widest table takes.
_WIDTH = 110


def show(found: Estimate, config: Config, console: Console | None = None) -> None:
    """Print it: counts, work by phase, memory by pass, bytes and requests."""
    # Wide enough for the tables, whatever the terminal: they are read in files too.
    out = console or Console(soft_wrap=True, width=max(_WIDTH, Console().width))
    corpus = found.corpus
    out.print(f"model       {found.parameters:,} parameters, {found.tracked} tracked layers")
    out.print(f"tracked     {found.share:.1%} of the parameters")
    for line in found.by_block:
        out.print(f"            {line}")
    out.print(
        f"corpus      {corpus.sequences:,} sequences of at most {corpus.T} tokens, {corpus.tokens:,} tokens "
        f"({corpus.how})"
    )
    out.print(f"shards      {found.shards:,} of {found.shard_sequences:,} sequences")
    out.print(f"queries     {found.queries:,}")
    for note in found.notes:
        out.print(f"            {note}")
    out.print(_work(found))
    if found.seconds is None:
        out.print("time        give plan.device=..., plan.tokens_per_s=... or plan.like=<a finished run>")
    else:
        price = "" if found.price is None else f", {found.price:,.2f} at {found.price_per_hour:g} an hour"
        out.print(
            f"time        {clock(found.seconds)} with {found.workers} x {found.ranks} ranks: "
            f"{found.rank_hours:,.3g} rank-hours{price}"
        )
    out.print(_memory(found))
    if found.costs:
        name, most = largest(found.costs)
        out.print(f"memory      a rank holds at most {size(most.total)} (in {name}), beside the process's own")
    out.print(
        f"hosts       the driver holds at most {size(found.hosts.driver)} beside its process, which takes some "
        f"{size(PROCESS_BYTES)} on a CPU, as a rank's does; the object store of "
        f"a node with ranks {size(found.hosts.node)}"
    )
    out.print(_storage(found))
    out.print(f"output      {config.output}")


def _work(found: Estimate) -> Table:
    table = Table("phase", "sequences", "tokens", "FLOP", "time", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for work in found.work:
        flop = f"{work.flop:.2e}" if work.flop else f"{work.cpu_flop:.2e} (float64)" if work.cpu_flop else ""
        time = "" if work.seconds is None else clock(work.seconds)
        table.add_row(work.name, f"{work.sequences:,}" if work.sequences else "", f"{work.tokens:,}" if work.tokens else "", flop, time)  # fmt: skip # noqa: E501
    return table


def _memory(found: Estimate) -> Table:
    parts = ("weights", "queries", "factors", "gradients", "activations", "allocator")
    table = Table("one rank in", *parts, "together", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cost in found.costs.items():
        held = vars(cost.memory)
        table.add_row(name, *(size(held[part]) if held[part] else "" for part in parts), size(cost.memory.total))
    return table


def _storage(found: Estimate) -> Table:
    table = Table("storage", "bytes", "files", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    writes = dict(found.writes)
    if found.corpus.prepared_bytes:
        table.add_row("prepared corpus", size(found.corpus.prepared_bytes), "")
    if found.factors.files:
        table.add_row("factors", size(found.factors.bytes), f"{writes.pop('factors'):,}")
        table.add_row("partial sums, until then", size(found.factors.partial_bytes), f"{writes.pop('partial sums'):,}")
    for name, key in (
        ("query batch", "query batch"),
        ("query gradients", "query gradients"),
        ("candidates", "shards"),
        ("dense scores", "dense scores"),
        ("refined rows", "refined units, at most"),
        ("tables", "tables and records"),
        ("codes", "codes"),
    ):
        if name in found.bytes:
            exact = "" if name in ("query batch", "codes") else "at most "
            table.add_row(name, f"{exact}{size(found.bytes[name])}", f"{writes.get(key, 0):,}")
    return table


def clock(seconds: float) -> str:
    """`3.2 s`, `14 min`, `115 h`, `12 days`."""
    for unit, length in (("days", 86400 * 4), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / (86400 if unit == 'days' else length):,.3g} {unit}"
    return f"{seconds:.3g} s"
