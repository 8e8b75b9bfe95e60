"""The log-probability that the model gives each completion, and the size of its gradient, before the corpus is asked.

A question that the model cannot answer has a large gradient and confident rows; these numbers say so beforehand. They
are taken at the model that is asked: with stages, the last one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from torch import Tensor

from infscan.config import fingerprint
from infscan.corpus.tokenizer import Tokenizer
from infscan.engine.executor import Step
from infscan.errors import StorageError
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.model.worker import ModelWorker
from infscan.queries import Part, Query
from infscan.results import manifest
from infscan.results.schema import QUERIES, damaged, read_with_footer, to_parquet
from infscan.results.statements import UNLIKELY
from infscan.steps.preconditioner import backward_of_part
from infscan.steps.run import Run

NAME = "queries/queries.parquet"
_QUERIES_PER_UNIT = 64
# A contrast whose one gradient is this many times the other's is a question about that one alone.
DWARFED = 10.0


@dataclass(frozen=True)
class MeasuredPart:
    """One part of a query: the completion, or its contrast."""

    # sum over the measured tokens of log p(x_t | x_<t), nats.
    log_probability: float
    # Frobenius norm of its gradient over all tracked layers.
    gradient_norm: float


@dataclass(frozen=True)
class MeasureTask:
    queries: tuple[Query, ...]


def measure(run: Run) -> pa.Table:
    """Measure every query at the model that is asked; written to queries/queries.parquet, and read back on a resume."""
    asked, facts = _asked(run), _facts(run)
    if (known := _known(run, facts)) is not None:
        return known
    parts: dict[int, list[list[MeasuredPart]]] = {}
    starts = range(0, len(run.queries), _QUERIES_PER_UNIT)
    step = Step(
        name="measure",
        unit_name="groups",
        units=list(starts),
        function=measure_task,
        task=lambda start: MeasureTask(run.queries[start : start + _QUERIES_PER_UNIT]),
        progress=lambda start, found: (len(found), 0),
    )
    asked.executor.run(step, lambda start, found: parts.update({start: found}))
    measured = [one for start in starts for one in parts[start]]
    rows = [_row(query, one, asked.inputs.tokenizer) for query, one in zip(run.queries, measured, strict=True)]
    for row in rows:
        _warn(run, row)
    table = pa.Table.from_pylist(rows, schema=QUERIES)
    run.store.write(NAME, to_parquet(table, facts))
    return table


def measured_part(run: Run) -> manifest.Part:
    """queries/queries.parquet, as it was measured of this run's queries, for the manifest.

    Raises:
        StorageError: where it is gone, damaged or of other queries.
    """
    seen: list[bytes] = []
    table, footer = read_with_footer(run.store, NAME, check=lambda where, data: seen.append(data))
    if footer.get("queries") != _facts(run)["queries"]:
        raise damaged(f"{run.store.uri}/{NAME}", "it is of other queries or another model")
    return manifest.Part.of(seen[0], len(table))


def _asked(run: Run) -> Run:
    return run.later[-1] if run.later else run


def _facts(run: Run) -> dict[str, str]:
    inputs = _asked(run).inputs
    return {"queries": fingerprint([inputs.fingerprints(), inputs.dtype])}


def _known(run: Run, facts: dict[str, str]) -> pa.Table | None:
    """What an earlier process measured of the same queries at the same model."""
    try:
        table, footer = read_with_footer(run.store, NAME)
    except StorageError:
        return None
    return table if footer.get("queries") == facts["queries"] else None


def measure_task(worker: ModelWorker, task: MeasureTask) -> list[list[MeasuredPart]]:
    """The parts of every query, measured one by one as their gradients are taken."""
    return [[_measured(worker, part) for part in query.parts] for query in task.queries]


def _measured(worker: ModelWorker, part: Part) -> MeasuredPart:
    squares: list[Tensor] = []

    def consume(_layer: Layer, s: Tensor, a: Tensor, _routed: Routed | None) -> None:
        s_to, a_ti = s.view(-1, s.shape[-1]).to(worker.wide), a.view(-1, a.shape[-1]).to(worker.wide)
        # |sum_t s_t a_t^T|^2 = sum over t, u of (s_t . s_u)(a_t . a_u), without forming the gradient.
        squares.append(((s_to @ s_to.T) * (a_ti @ a_ti.T)).sum())

    losses_b = backward_of_part(worker, part, worker.layers, consume)
    norm = sum(float(square) for square in squares)
    return MeasuredPart(-float(losses_b[0]) * part.sign, max(norm, 0.0) ** 0.5)


def _row(query: Query, parts: Sequence[MeasuredPart], tokenizer: Tokenizer | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "query_id": query.id,
        "prompt": query.prompt,
        "completion": query.completion,
        "contrast": query.contrast,
        "measure": query.measure,
    }
    for prefix, part, measured in zip(("", "contrast_"), query.parts, parts, strict=False):
        ids = list(part.token_ids)
        row |= {
            f"{prefix}token_ids": ids,
            f"{prefix}tokens": [tokenizer.decode([token]) for token in ids] if tokenizer else None,
            f"{prefix}measured": list(part.positions),
            f"{prefix}log_probability": measured.log_probability,
            f"{prefix}gradient_norm": measured.gradient_norm,
        }
    return row


def _warn(run: Run, row: dict[str, Any]) -> None:
    """Say of a question what makes its answers misleading."""
    for prefix, what in (("", "completion"), ("contrast_", "contrast")):
        if row.get(f"{prefix}log_probability") is None:
            continue
        per_token = row[f"{prefix}log_probability"] / len(row[f"{prefix}measured"])
        if per_token < UNLIKELY:
            run.telemetry.warn(
                f"query {row['query_id']!r}: the model gives its {what} {per_token:.1f} nats a token: it hardly knows "
                "it, and scores are large whatever the corpus has"
            )
    norms = row["gradient_norm"], row.get("contrast_gradient_norm")
    if norms[1] is not None and max(norms) > DWARFED * min(norms):
        larger, smaller = ("completion", "contrast") if norms[0] > norms[1] else ("contrast", "completion")
        run.telemetry.warn(
            f"query {row['query_id']!r}: the gradient of its {larger} is {max(norms) / max(min(norms), 1e-30):.0f} "
            f"times that of its {smaller}, so rows speak of the {larger} alone"
        )
