"""Explain rows of a finished run, or any text: by layer, by token of either side, beside neighbours and duplicates."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from infscan.config import Sides, plain
from infscan.config.jobs import ExplainJob
from infscan.corpus.addressable import AddressableCorpus
from infscan.corpus.sequences import Sequence, Span
from infscan.corpus.texts import GivenText, given_texts
from infscan.engine.executor import Step
from infscan.errors import QueryError
from infscan.influence.layers import Layer
from infscan.model.token_influence import Floats, own_tokens
from infscan.model.worker import ModelWorker
from infscan.queries import Query, by_token, choose
from infscan.results.explained import SCHEMAS, write_explanation
from infscan.results.read import read_top
from infscan.steps.corpus_inputs import bos_of
from infscan.steps.explanation import Explained, Item, neighbours, similar, tables
from infscan.steps.finished import factors_of
from infscan.steps.preconditioner import Preconditioner, preconditioned, query_groups
from infscan.steps.refine import pairs_of, score_pairs
from infscan.steps.run import Run
from infscan.storage import Store

_SEQUENCES_PER_UNIT = 16


def explain(run: Run, job: ExplainJob) -> dict[str, pa.Table]:
    """The tables of `infscan.results.explained`, written to `job.folder`. run: `reopen`ed and entered.

    Raises:
        QueryError: for a query id that the run does not have.
        ConfigError: for a text that cannot be a sequence.
    """
    corpus, factors = factors_of(run)
    # As the published rows were scored.
    run.hold_model_in(run.config.refine_dtype)
    queries = choose(run.queries, job.query_ids)
    items = _items(run, job, corpus, queries)
    own = job.own_tokens and _can_differentiate_twice(run)
    by_pair = _explained(run, factors.inverse, queries, items, own_tokens=own)
    by_part: dict[tuple[int, int], list[Explained]] = {}
    if _can_split(run, factors.inverse):
        by_part = _split(run, factors.inverse, queries, items)
    decode = run.inputs.tokenizer.decode if run.inputs.tokenizer else None
    layers = [layer.name for layer in run.inputs.layers]
    rows = tables(queries, items, by_pair, by_part, layers, decode, matrix=job.matrix)
    rows["neighbours"] = neighbours(corpus, items, decode)
    rows["similar"] = similar(job.run, [query.id for query in queries], job.similar)
    made = {name: pa.Table.from_pylist(mine, schema=SCHEMAS[name]) for name, mine in rows.items()}
    write_explanation(Store(job.folder), made, {"explain": plain(job)})
    return made


def _items(run: Run, job: ExplainJob, corpus: AddressableCorpus, queries: Sequences[Query]) -> list[Item]:
    every = tuple(range(len(queries)))
    index = {query.id: number for number, query in enumerate(queries)}
    decode = run.inputs.tokenizer.decode if run.inputs.tokenizer else None

    def of(sequence: Sequence, name: str, wanted: tuple[int, ...], rows: dict[int, dict[str, Any]]) -> Item:
        return Item(name, sequence, wanted, rows, decode(sequence.token_ids) if decode else None)

    if job.text is not None or job.texts is not None:
        texts = given_texts(
            job.text,
            job.texts,
            run.inputs.tokenizer,
            vocab_size=run.architecture.vocab_size,
            context=run.architecture.context,
            bos_id=bos_of(run.config.corpus, run.architecture, run.inputs.tokenizer),
        )
        return [
            of(_as_sequence(name, text.token_ids), name, _wanted(name, text, index), {}) for name, text in texts.items()
        ]
    rows = [row for row in read_top(job.run).to_pylist() if row["query_id"] in index]
    by_sequence: dict[int, dict[int, dict[str, Any]]] = {number: {} for number in job.sequences}
    for row in rows:
        on_side = job.sides is Sides.both or job.sides.value == f"{row['side']}s"
        if row["sequence_id"] in by_sequence if job.sequences else on_side and row["rank"] <= job.rows:
            by_sequence.setdefault(row["sequence_id"], {})[index[row["query_id"]]] = row
    numbers = sorted(by_sequence)
    return [
        of(sequence, str(number), every if job.sequences else tuple(sorted(by_sequence[number])), by_sequence[number])
        for number, sequence in zip(numbers, corpus.read(np.asarray(numbers, np.int64)), strict=True)
    ]


def _as_sequence(name: str, token_ids: np.ndarray) -> Sequence:
    """A text as a sequence that is in no corpus."""
    return Sequence(-1, token_ids, (Span(name, "", 0, len(token_ids)),), 0, "")


def _wanted(name: str, text: GivenText, index: Mapping[str, int]) -> tuple[int, ...]:
    if text.queries is None:
        return tuple(index.values())
    missing = [query for query in text.queries if query not in index]
    if missing:
        raise QueryError(f"text {name!r}: its query {missing[0]!r} is not asked for; it is none of the run's, perhaps.")
    return tuple(index[query] for query in text.queries)


def _can_differentiate_twice(run: Run) -> bool:
    possible = not run.config.sharded and not run.config.model.gradient_checkpointing
    if not possible:
        run.telemetry.warn(
            "the influence of a sequence's own tokens takes a second derivative of a whole model, which neither a "
            "sharded model nor gradient checkpointing has: the columns output and input are null"
        )
    return possible


def _can_split(run: Run, inverse: Preconditioner) -> bool:
    possible = inverse.solutions is None and inverse.vectors is None
    if not possible:
        run.telemetry.warn(
            "an iterated inverse and stages keep one vector per query, which does not split over its tokens: there is "
            "no completion.parquet; a run with queries.measure=tokens has it token by token"
        )
    return possible


def _split(
    run: Run, inverse: Preconditioner, queries: Sequences[Query], items: Sequences[Item]
) -> dict[tuple[int, int], list[Explained]]:
    """By item and query, the explanations of the query's measured tokens, each on its own."""
    parts = [by_token(query) for query in queries]
    first = np.cumsum([0, *map(len, parts)]).tolist()
    flat = [part for of_query in parts for part in of_query]
    wider = [
        Item(item.name, item.sequence, tuple(n for q in item.queries for n in range(first[q], first[q + 1])), {}, None)
        for item in items
    ]
    found = _explained(run, inverse, flat, wider, own_tokens=False)
    return {
        (row, query): [found[row, number] for number in range(first[query], first[query + 1])]
        for row, item in enumerate(items)
        for query in item.queries
    }


def _explained(
    run: Run, inverse: Preconditioner, queries: Sequences[Query], items: Sequences[Item], *, own_tokens: bool
) -> dict[tuple[int, int], Explained]:
    """Every item against its queries, on the workers: by item and query, all layers together."""
    groups, layer_groups = query_groups(len(queries), run.inputs.layers, run.config.query_group_bytes)
    units: list[tuple[int, tuple[Layer, ...], list[int]]] = []
    for number, group in enumerate(groups):
        for layers in layer_groups:
            mine = [row for row, item in enumerate(items) if set(item.queries) & set(group)]
            cuts = range(0, len(mine), _SEQUENCES_PER_UNIT)
            units += [(number, layers, mine[cut : cut + _SEQUENCES_PER_UNIT]) for cut in cuts]

    def wanted(unit: int) -> tuple[tuple[int, ...], ...]:
        number, _, rows = units[unit]
        group = groups[number]
        return tuple(tuple(query - group.start for query in items[row].queries if query in group) for row in rows)

    def task(unit: int) -> ExplainTask:
        number, layers, rows = units[unit]
        return ExplainTask(
            group=f"{number}/{layers[0].name}/{queries[groups[number].start].id}",
            queries=tuple(queries[index] for index in groups[number]),
            layers=layers,
            inverse=inverse,
            sequences=tuple(items[row].sequence for row in rows),
            wanted=wanted(unit),
            tokens_per_batch=run.config.tokens_per_batch,
            own_tokens=own_tokens,
        )

    parts: dict[tuple[int, int], dict[str, Explained]] = {}

    def on_done(unit: int, found: list[Explained]) -> None:
        number, layers, rows = units[unit]
        for (place, query), one in zip(pairs_of(wanted(unit)), found, strict=True):
            parts.setdefault((rows[place], query + groups[number].start), {})[layers[0].name] = one

    step = Step(
        name="explain",
        unit_name="units",
        units=range(len(units)),
        function=explain_task,
        task=task,
        progress=lambda unit, _: (len(units[unit][2]), 0),
    )
    run.executor.run(step, on_done)
    run.executor.forget()
    return {
        pair: _joined([by_group[layers[0].name] for layers in layer_groups]) for pair, by_group in sorted(parts.items())
    }


def _joined(parts: list[Explained]) -> Explained:
    """Groups of layers, in the model's order."""

    def summed(name: str) -> np.ndarray | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else np.sum(found, axis=0)

    return Explained(np.concatenate([part.matrix_lt for part in parts]), summed("output_t"), summed("input_t"))


@dataclass(frozen=True)
class ExplainTask:
    """Some sequences against a group of queries, for a group of layers."""

    group: str
    queries: tuple[Query, ...]
    layers: tuple[Layer, ...]
    inverse: Preconditioner
    sequences: tuple[Sequence, ...]
    # By sequence, indices into `queries`.
    wanted: tuple[tuple[int, ...], ...]
    tokens_per_batch: int
    # Whether the influences of the sequence's own tokens are asked for; they take a whole model on one rank.
    own_tokens: bool


def explain_task(worker: ModelWorker, task: ExplainTask) -> list[Explained]:
    """Every wanted pair, in the order of `pairs_of(task.wanted)`; right on rank 0 of a group."""
    P = worker.cached("full-rank", task.group, lambda: preconditioned(worker, task.queries, task.layers, task.inverse))
    pairs = pairs_of(task.wanted)
    longest = max(len(sequence) for sequence in task.sequences)
    matrix_nlt = torch.zeros(len(pairs), len(task.layers), longest, dtype=torch.float64, device=worker.device)
    column = {layer.name: index for index, layer in enumerate(task.layers)}

    def keep(layer: Layer, pairs_n: Tensor, scores_nt: Tensor) -> None:
        matrix_nlt[pairs_n, column[layer.name], : scores_nt.shape[1]] = scores_nt.to(torch.float64)

    score_pairs(worker, task.sequences, task.wanted, task.layers, P, task.tokens_per_batch, keep)
    matrices = worker.reduce(matrix_nlt).cpu().numpy()
    own: list[tuple[Floats | None, Floats | None]] = [(None, None)] * len(pairs)
    if task.own_tokens:
        own = [
            both
            for sequence, queries in zip(task.sequences, task.wanted, strict=True)
            for both in own_tokens(worker, sequence, task.layers, P, queries)
        ]
    return [
        Explained(matrices[index, :, : len(task.sequences[row])], *own[index]) for index, (row, _) in enumerate(pairs)
    ]
