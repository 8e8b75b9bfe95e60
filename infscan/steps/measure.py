"""The log-probability that the model gives each completion, and its gradient, before the corpus is asked.

A question that the model cannot answer has a large gradient and confident rows; these numbers say so beforehand. They
are taken at the model that is asked: with stages, the last one's. The gradients are kept: the query batch, the check
and refining read them (`infscan.steps.gradients`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from infscan.config import fingerprint
from infscan.corpus.tokenizer import Tokenizer
from infscan.engine.executor import Step
from infscan.errors import StorageError
from infscan.model.worker import ModelWorker
from infscan.queries import Part, Query
from infscan.results import manifest
from infscan.results.schema import QUERIES, damaged, read_with_footer, to_parquet
from infscan.results.statements import UNLIKELY
from infscan.results.tensor_files import write_tensors
from infscan.steps.gradients import (
    StoredTokens,
    Tokens,
    check_finite,
    file_units,
    joined,
    kept_bytes,
    kept_tensors,
    part_tokens,
    tokens_of,
)
from infscan.steps.queries import is_made
from infscan.steps.run import Run
from infscan.storage import Store

NAME = "queries/queries.parquet"
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
    """Some queries, and the file for their gradients."""

    store: Store
    name: str
    queries: tuple[Query, ...]
    fingerprint: str


def measure(run: Run) -> StoredTokens:
    """Measure every query at the model that is asked, and keep its gradient.

    What was measured is written to queries/queries.parquet, gradients beside it; both are read back on a resume.
    Returns where the gradients are.
    """
    asked, facts = _asked(run), _facts(run)
    sizes = [kept_bytes(tokens_of(query), asked.inputs.layers, asked.inputs.itemsize) for query in run.queries]
    units = file_units(sizes)
    layers = [layer.name for layer in asked.inputs.layers]
    keys = [fingerprint([facts, layers, [query.id for query in run.queries[unit.start : unit.stop]]]) for unit in units]
    names = [f"queries/gradients-{key[:24]}.safetensors" for key in keys]
    known = _known(run, facts)
    parts: dict[int, list[list[MeasuredPart]]] = {}
    step = Step(
        name="measure",
        unit_name="groups",
        units=range(len(units)),
        function=measure_task,
        task=lambda number: MeasureTask(
            run.store, names[number], run.queries[units[number].start : units[number].stop], keys[number]
        ),
        is_done=lambda number: known and is_made(run, names[number], keys[number]),
        progress=lambda number, found: (len(found), 0),
    )
    asked.executor.run(step, lambda number, found: parts.update({number: found}))
    if not known:
        _write(run, [one for number in range(len(units)) for one in parts[number]], facts)
    by_query = {run.queries[index].id: name for name, unit in zip(names, units, strict=True) for index in unit}
    return StoredTokens(run.store, by_query, asked.inputs.dtype)


def _write(run: Run, measured: Sequence[Sequence[MeasuredPart]], facts: dict[str, str]) -> None:
    tokenizer = _asked(run).inputs.tokenizer
    rows = [_row(query, one, tokenizer) for query, one in zip(run.queries, measured, strict=True)]
    for row in rows:
        _warn(run, row)
    run.store.write(NAME, to_parquet(pa.Table.from_pylist(rows, schema=QUERIES), facts))


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


def _known(run: Run, facts: dict[str, str]) -> bool:
    """Whether an earlier process measured the same queries at the same model."""
    try:
        _, footer = read_with_footer(run.store, NAME)
    except StorageError:
        return False
    return bool(footer.get("queries") == facts["queries"])


def measure_task(worker: ModelWorker, task: MeasureTask) -> list[list[MeasuredPart]]:
    """The parts of every query, measured one by one; rank 0 writes the file of the queries' gradients.

    Raises:
        QueryError: where a gradient is NaN or infinite.
    """
    measured: list[list[MeasuredPart]] = []
    tensors: dict[str, Tensor] = {}
    finite: dict[str, list[Tensor]] = {layer.name: [] for layer in worker.layers}
    for query in task.queries:
        parts = [part_tokens(worker, part, worker.layers) for part in query.parts]
        measured.append(
            [_measured(part, losses_b, found) for part, (losses_b, found) in zip(query.parts, parts, strict=True)]
        )
        for layer in worker.layers:
            V = joined(layer, [found for _, found in parts], worker)
            finite[layer.name].append(V.finite())
            if worker.leads:
                tensors |= kept_tensors(query.id, layer, V, worker.model.dtype)
    for name, flags in finite.items():
        check_finite(name, task.queries, torch.stack(flags))
    if worker.leads:
        write_tensors(task.store, task.name, tensors, {"fingerprint": task.fingerprint})
    return measured


def _measured(part: Part, losses_b: Tensor, found: Mapping[str, Tokens]) -> MeasuredPart:
    # |sum_t s_t a_t^T|^2 = sum over t, u of (s_t . s_u)(a_t . a_u), without forming the gradient.
    squares = [((one.s_to @ one.s_to.T) * (one.a_ti @ one.a_ti.T)).sum() for one in found.values()]
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
