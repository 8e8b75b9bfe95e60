"""How good is the scan's approximation? A sample, scored with the query batch and with full-rank query gradients.

The agreement of both is written to approximation.json and into summary.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.config import Dtype
from infscan.corpus.addressable import AddressableCorpus, CorpusAddress
from infscan.corpus.plan import Plan, Selection
from infscan.engine.executor import Pieces, Step
from infscan.influence.agreement import MAX_CANDIDATE_SHARE, agreement, pearson, recall_agreement
from infscan.influence.certificate import binomial_interval
from infscan.influence.layers import Layer
from infscan.influence.layout import QueryBatch
from infscan.influence.precision import multiplying
from infscan.influence.routed import Routed
from infscan.influence.score import LayerQueries, Scratch, score_layer
from infscan.model.worker import LayerConsumer, ModelWorker
from infscan.queries import Query
from infscan.steps.factors import Factors
from infscan.steps.preconditioner import Preconditioner, preconditioned, query_groups
from infscan.steps.queries import BroadcastQueries, on_device
from infscan.steps.run import Run

REPORT = "approximation.json"
# Recall is of the strongest ten among forty, or in that proportion of as many as a smaller sample allows.
_TOP, _CANDIDATES_PER_TOP = 10, 4
_RESAMPLES = 500
# Where full-rank gradients of all queries do not fit a rank, so many queries are compared, drawn by seed: each group of
# queries takes its own passes over the sample.
_COMPARED = 8
Cell = tuple[int, int]


def check(
    run: Run, plan: Plan, corpus: AddressableCorpus, batch: BroadcastQueries, factors: Factors
) -> dict[str, Any] | None:
    """Agreement of the scan's scores with full-rank ones over a uniform sample of the planned sequences, per query.

    Of queries whose full-rank gradients do not fit a rank together, _COMPARED or a few more are compared; the others'
    figures are null. None where the scan is at full rank already (scan.rank=null), with scan.check_sequences=0, or
    (with a warning) where the sample cannot be read. A report that an earlier process wrote for the same query batch is
    read back.
    """
    config = run.config
    wanted = min(config.scan.check_sequences, plan.selection.size)
    if config.scan.rank is None or wanted < 3:
        return None
    if run.store.exists(REPORT):
        report: dict[str, Any] = run.store.read_json(REPORT)
        if report["query_batch"] == batch.fingerprint:
            return report
    ids = plan.selection.at(Selection.of(plan.selection.size, wanted, config.seed).ids())
    groups, layer_groups = query_groups(len(run.queries), run.inputs.layers, config.query_group_bytes)
    approximate = np.zeros((wanted, len(run.queries)))
    exact = np.zeros_like(approximate)

    def task(cell: Cell) -> CheckTask:
        group, layers = groups[cell[0]], layer_groups[cell[1]]
        return CheckTask(
            corpus=CorpusAddress.of(corpus),
            sequence_ids=ids,
            queries=tuple(run.queries[query] for query in group),
            columns=tuple(group),
            layers=layers,
            inverse=factors.inverse,
            query_batch=batch.fingerprint,
            tokens_per_batch=config.tokens_per_batch,
            query_dtype=config.scan.query_dtype,
        )

    def on_done(cell: Cell, result: tuple[np.ndarray, np.ndarray]) -> None:
        columns = list(groups[cell[0]])
        approximate[:, columns] += result[0]
        exact[:, columns] += result[1]

    def on_given_up(cell: Cell, reason: str) -> None:
        # The shard that cannot be read is the scan's to quarantine; a sample without it would not be uniform.
        run.telemetry.warn(f"the scan's approximation could not be measured: {reason}")

    step = Step(
        name="check",
        unit_name="groups",
        units=[(group, layers) for group in compared(groups, config.seed) for layers in range(len(layer_groups))],
        function=check_task,
        task=task,
        progress=lambda cell, result: (wanted, 0),
    )
    given_up = run.executor.run(step, on_done, on_given_up, shared=[batch.batch])
    if given_up:
        return None
    finite = np.isfinite(approximate).all(axis=1) & np.isfinite(exact).all(axis=1)
    report = {
        "query_batch": batch.fingerprint,
        "rank": config.scan.rank,
        "compression": config.scan.compression.value,
        "layouts": batch.layouts,
        **judged([query.id for query in run.queries], exact[finite].T, approximate[finite].T, config.seed),
    }
    run.store.write_json(REPORT, report)
    return report


def compared(groups: Sequence[range], seed: int) -> list[int]:
    """Which groups of queries are compared: all queries where they are one group, else groups of at least _COMPARED."""
    some: list[int] = []
    for group in np.random.default_rng(seed).permutation(len(groups)).tolist():
        if sum(len(groups[one]) for one in some) < _COMPARED:
            some.append(group)
    return sorted(some)


@dataclass(frozen=True)
class CheckTask:
    """The sample, for a group of queries and of layers."""

    corpus: CorpusAddress
    sequence_ids: np.ndarray
    queries: tuple[Query, ...]
    # The queries' columns in the query batch, which is laid out in query_dtype.
    columns: tuple[int, ...]
    layers: tuple[Layer, ...]
    inverse: Preconditioner
    query_batch: str
    tokens_per_batch: int
    query_dtype: Dtype | None = None


@multiplying("exact")
def check_task(
    worker: ModelWorker, task: CheckTask, query_batch: Pieces | QueryBatch
) -> tuple[np.ndarray, np.ndarray] | None:
    """(scores with the query batch, scores at full rank) over the task's layers, float64 [n, queries], on rank 0."""
    batch_queries = worker.cached("queries", task.query_batch, lambda: on_device(worker, query_batch, task.query_dtype))
    P = preconditioned(worker, task.queries, task.layers, task.inverse)
    scratch = Scratch.on(worker.device)
    # In the model's dtype, as a scan at full rank would be.
    full = {
        layer.name: LayerQueries.dense(P.pop(layer.name).to(worker.model.dtype), scratch, bias=layer.bias)
        for layer in task.layers
    }
    sequences = worker.read(task.corpus, task.sequence_ids)
    columns = worker.to_device(np.asarray(task.columns, np.int64))
    shape = (len(sequences), len(task.queries))
    approximate_nq = torch.zeros(shape, dtype=torch.float64, device=worker.device)
    exact_nq = torch.zeros(shape, dtype=torch.float64, device=worker.device)
    for batch in worker.batches(sequences, task.tokens_per_batch):
        rows = worker.to_device(batch.rows)
        consume = scoring_twice((approximate_nq, batch_queries, columns), (exact_nq, full), rows)
        worker.backward(batch, task.layers, batch.loss(), consume, ones=False)
    approximate_nq, exact_nq = worker.reduce(approximate_nq), worker.reduce(exact_nq)
    return (approximate_nq.cpu().numpy(), exact_nq.cpu().numpy()) if worker.leads else None


def scoring_twice(
    approximate: tuple[Tensor, Mapping[str, LayerQueries], Tensor],
    exact: tuple[Tensor, Mapping[str, LayerQueries]],
    rows: Tensor,
) -> LayerConsumer:
    """Adds every layer's scores of a micro-batch, whose sequences are `rows`, to those of either way, [n, Q].

    approximate: the scores, the query batch, and the columns of it that are compared. exact: the scores, the queries.
    """
    approximate_nq, batch_queries, columns = approximate
    exact_nq, full = exact

    def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
        approximate_nq[rows] += score_layer(s, a, batch_queries[layer.name], routed)[:, columns]
        exact_nq[rows] += score_layer(s, a, full[layer.name], routed)

    return consume


def judged(
    query_ids: list[str], exact_qn: NDArray[np.floating], approximate_qn: NDArray[np.floating], seed: int
) -> dict[str, Any]:
    """Pearson and recall of the strongest, per query and on average, each with its 95 % interval.

    Intervals are the bootstrap's for Pearson, and for a query's recall the exact ones of a share; for recall over all
    queries the wider of both. Recall counts only where candidates are at most 2 % of the sequences: else it is null,
    with the reason. A query whose scores do not vary has no correlation (null) and is left out of the averages.
    """
    n = exact_qn.shape[1]
    varies = np.isfinite(pearson(exact_qn, approximate_qn))
    exact_qn, approximate_qn = exact_qn[varies], approximate_qn[varies]
    by_query: dict[str, dict[str, Any]] = {
        name: dict.fromkeys(("pearson", "low", "high", "recall", "recall_low", "recall_high")) for name in query_ids
    }
    ids = [name for name, kept in zip(query_ids, varies, strict=True) if kept]
    top = min(_TOP, int(MAX_CANDIDATE_SHARE * n) // _CANDIDATES_PER_TOP)
    report: dict[str, Any] = {
        "sequences": n,
        "pearson": dict.fromkeys(("mean", "low", "high", "min")),
        "recall": {"top": top, "candidates": _CANDIDATES_PER_TOP * top, "mean": None, "low": None, "high": None},
        "queries": by_query,
    }
    if not ids:
        return report
    found = agreement(exact_qn, approximate_qn, seed=seed, resamples=_RESAMPLES)
    report["pearson"] = _rounded(
        mean=found.mean, low=found.mean_low, high=found.mean_high, min=float(found.values.min())
    )
    for name, value, low, high in zip(ids, found.values, found.low, found.high, strict=True):
        by_query[name] |= _rounded(pearson=value, low=low, high=high)
    if not top:
        report["recall"] |= {
            "reason": f"it takes at least {math.ceil(_CANDIDATES_PER_TOP / MAX_CANDIDATE_SHARE)} sequences to compare, "
            f"and there were {n}; raise scan.check_sequences, if the corpus has more"
        }
        return report
    recalled = recall_agreement(
        exact_qn, approximate_qn, top=top, candidates=_CANDIDATES_PER_TOP * top, seed=seed, resamples=_RESAMPLES
    )
    # A resample of what was all found is all found, too: what a few rows say of others, the exact interval does.
    found_rows = np.rint(recalled.values * top).astype(int).tolist()
    low, high = binomial_interval(sum(found_rows), top * len(ids))
    report["recall"] |= _rounded(
        mean=recalled.mean, low=min(low, recalled.mean_low), high=max(high, recalled.mean_high)
    )
    for name, value, rows in zip(ids, recalled.values, found_rows, strict=True):
        low, high = binomial_interval(rows, top)
        by_query[name] |= _rounded(recall=value, recall_low=low, recall_high=high)
    return report


def _rounded(**values: float) -> dict[str, float]:
    return {key: round(float(value), 6) for key, value in values.items()}
