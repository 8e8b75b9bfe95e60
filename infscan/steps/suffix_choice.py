"""scan.sieve=auto: how many last blocks suffice, measured on a sample, or that a full scan is as cheap.

The measured sequences run forward and back through all blocks once, and every suffix of blocks scores them. Of each
suffix, the recall of the rows strongest by all blocks among the best by its own, at the shares of the corpus that are
published and kept, says whether it suffices; of those that do, the shortest is the cheapest. A pass is priced by its
products: forward, the backward through the suffix, and what it leaves to the full scan.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.config import Dtype
from infscan.corpus.addressable import AddressableCorpus, CorpusAddress
from infscan.corpus.plan import Plan, Selection
from infscan.engine.executor import Pieces, Step
from infscan.influence.layers import Layer
from infscan.influence.layout import QueryBatch
from infscan.influence.precision import multiplying
from infscan.influence.routed import Routed
from infscan.influence.score import LayerQueries, score_layer
from infscan.influence.topk import strength
from infscan.model.suffix import last_blocks, suffixes
from infscan.model.worker import LayerConsumer, ModelWorker
from infscan.steps.queries import BroadcastQueries, on_device
from infscan.steps.run import Run

log = logging.getLogger("infscan")

RECORD = "sieve/suffix.json"
# Recall of the strongest that a suffix is to have; the certificate then says what the whole search has.
_SUFFICES = 0.98
# Of the planned sequences; at least and at most so many, and of a small corpus at most such a share.
_MEASURED, _LEAST, _MOST, _SHARE = 0.02, 1024, 8192, 0.1
# Rows over all queries and sides, at least, that recall is of.
_TAIL_ROWS = 40
_SLICE = 256


@dataclass(frozen=True)
class Curve:
    """What was measured, and what follows from it.

    blocks: the last so many are the sieve; None is a full scan. measured: sequences. top, kept: of these, per query and
    side, the strongest that were looked for among the best by a suffix. recall, floors: by the suffix's blocks; the
    cost of a whole search, in forward and activation-gradient backward passes of every sequence (a full scan is 1).
    """

    blocks: int | None
    measured: int
    top: int
    kept: int
    recall: Mapping[str, float]
    floors: Mapping[str, float]
    query_batch: str


def choose_suffix(run: Run, plan: Plan, corpus: AddressableCorpus, batch: BroadcastQueries) -> int | None:
    """How many last blocks are the sieve; None where all are to be scanned. What an earlier process chose is kept.

    Where the measured sequences cannot be read, nothing is known, and all are scanned.
    """
    if run.store.exists(RECORD):
        found = Curve(**run.store.read_json(RECORD))
        if found.query_batch == batch.fingerprint:
            return found.blocks
    tried = suffixes(run.inputs.layers)
    scores_snq = _measured(run, plan, corpus, batch, tried) if tried else None
    if scores_snq is None:
        return None
    made = curve(run, plan.selection.size, tried, scores_snq, batch.fingerprint)
    run.folder.fence()
    run.store.write_json(RECORD, asdict(made))
    log.info("sieve       %s", said(made))
    return made.blocks


def measured(planned: int) -> int:
    """Sequences that suffixes are measured on, a uniform sample of so many planned ones."""
    return min(_MOST, max(round(_MEASURED * planned), min(_LEAST, math.ceil(_SHARE * planned))))


def curve(run: Run, planned: int, tried: Sequence[int], scores_snq: NDArray[np.float32], query_batch: str) -> Curve:
    """scores_snq: of every suffix and, last, of all blocks, [S + 1, n, Q]."""
    config, n = run.config, scores_snq.shape[1]
    boards = len(run.queries) * len(config.sides)
    candidates = config.sieve_candidates(planned, len(run.queries))
    top = min(n, max(math.ceil(_TAIL_ROWS / boards), round(n * config.scan.top_k / planned), 1))
    kept = min(n, max(top, round(n * candidates / planned)))
    audited = config.audited(planned, len(run.queries))
    left = min(1.0, (boards * candidates + audited) / planned)
    recall, floors = {}, {}
    for blocks, mine in zip(tried, scores_snq, strict=False):
        recall[str(blocks)] = recall_of(mine, scores_snq[-1], config.sides, top, kept)
        floors[str(blocks)] = pass_floors(run.inputs.layers, blocks) + left + n / planned
    enough = [blocks for blocks in tried if recall[str(blocks)] >= _SUFFICES and floors[str(blocks)] < 1]
    return Curve(min(enough, default=None), n, top, kept, recall, floors, query_batch)


def recall_of(
    sieve_nq: NDArray[np.float32], exact_nq: NDArray[np.float32], sides: Sequence[str], top: int, kept: int
) -> float:
    """The share of the `top` strongest rows by all blocks that are among the `kept` best of a suffix, on average over
    queries and sides."""
    found = []
    for side in sides:
        best, left = (
            np.argsort(-strength(scores, side), axis=0, kind="stable")[:count]
            for scores, count in ((exact_nq, top), (sieve_nq, kept))
        )
        found += [np.isin(mine, others).mean() for mine, others in zip(best.T, left.T, strict=True)]
    return float(np.mean(found))


def pass_floors(layers: Sequence[Layer], blocks: int) -> float:
    """A sieve's pass in floors: forward, and as much again for the share of the products that its backward has."""
    everything = sum(layer.size for layer in layers)
    return (1 + sum(layer.size for layer in last_blocks(layers, blocks)) / everything) / 2


def said(found: Curve) -> str:
    """What was chosen, and why, in one line."""
    best = ", ".join(f"{blocks}: {recall:.2f}" for blocks, recall in found.recall.items())
    looked = f"of the strongest {found.top} of {found.measured}, among {found.kept}, the last blocks found {best}"
    if found.blocks is None:
        return f"none: {looked}; a suffix that finds {_SUFFICES} for less than a full scan costs is not among them"
    return f"the last {found.blocks} blocks ({found.floors[str(found.blocks)]:.2f} of a full scan): {looked}"


def _measured(
    run: Run, plan: Plan, corpus: AddressableCorpus, batch: BroadcastQueries, tried: Sequence[int]
) -> NDArray[np.float32] | None:
    """Scores of every suffix and of all blocks, [S + 1, n, Q]; None where a sequence cannot be read or scored."""
    config, planned = run.config, plan.selection.size
    ids = plan.selection.at(Selection.of(planned, measured(planned), config.seed + 2).ids())
    slices = [ids[start : start + _SLICE] for start in range(0, len(ids), _SLICE)]
    found: dict[int, NDArray[np.float32]] = {}

    def task(number: int) -> SuffixTask:
        return SuffixTask(
            corpus=CorpusAddress.of(corpus),
            sequence_ids=slices[number],
            queries=len(run.queries),
            layers=run.inputs.layers,
            suffixes=tuple(tried),
            query_batch=batch.fingerprint,
            tokens_per_batch=config.tokens_per_batch,
            query_dtype=config.scan.query_dtype,
        )

    def on_given_up(number: int, reason: str) -> None:
        run.telemetry.warn(f"scan.sieve=auto: no suffix could be measured, so all is scanned in full: {reason}")

    step = Step(
        name="suffix",
        unit_name="slices",
        units=list(range(len(slices))),
        function=suffix_task,
        task=task,
        progress=lambda number, result: (len(slices[number]), 0),
    )
    if run.executor.run(step, found.__setitem__, on_given_up, shared=[batch.batch]):
        return None
    scores_snq = np.concatenate([found[number] for number in range(len(slices))], axis=1)
    return scores_snq[:, np.isfinite(scores_snq).all(axis=(0, 2))]


@dataclass(frozen=True)
class SuffixTask:
    """Some sequences, scored by every suffix of blocks."""

    corpus: CorpusAddress
    sequence_ids: NDArray[np.int64]
    queries: int
    layers: tuple[Layer, ...]
    suffixes: tuple[int, ...]
    query_batch: str
    tokens_per_batch: int
    query_dtype: Dtype | None = None


@multiplying("exact")
def suffix_task(worker: ModelWorker, task: SuffixTask, query_batch: Pieces | QueryBatch) -> NDArray[np.float32] | None:
    """Scores of every suffix and, last, of all blocks, [S + 1, n, Q], on rank 0."""
    queries = worker.cached("queries", task.query_batch, lambda: on_device(worker, query_batch, task.query_dtype))
    sequences = worker.read(task.corpus, task.sequence_ids)
    shape = (len(task.suffixes) + 1, len(sequences), task.queries)
    scores_snq = torch.zeros(shape, dtype=worker.wide, device=worker.device)
    for batch in worker.batches(sequences, task.tokens_per_batch):
        consume = scoring_suffixes(scores_snq, queries, task, worker.to_device(batch.rows))
        worker.backward(batch, task.layers, batch.loss(), consume, ones=False)
    scores_snq = worker.reduce(scores_snq)
    return scores_snq.float().cpu().numpy() if worker.leads else None


def scoring_suffixes(
    scores_snq: Tensor, queries: Mapping[str, LayerQueries], task: SuffixTask, rows: Tensor
) -> LayerConsumer:
    """Adds every layer's scores of a micro-batch, whose sequences are `rows`, to those of each suffix that has it."""
    parts = [{layer.name for layer in last_blocks(task.layers, blocks)} for blocks in task.suffixes]

    def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
        found_bq = score_layer(s, a, queries[layer.name], routed)
        for scores_nq, names in zip(scores_snq, parts, strict=False):
            if layer.name in names:
                scores_nq[rows] += found_bq
        scores_snq[-1][rows] += found_bq

    return consume
