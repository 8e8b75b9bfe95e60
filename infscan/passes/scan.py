"""Scan one shard: forward, activation-gradient backward, scores against every query, best rows to storage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infscan.config import Attention, Dtype
from infscan.influence.layers import Layer
from infscan.influence.layout import QueryBatch
from infscan.influence.score import score_layer
from infscan.influence.standings import Hits, Thresholds, shard_hits
from infscan.passes.query_batch import on_device
from infscan.passes.rank import Rank
from infscan.results.dense import write_scores
from infscan.results.shard_file import ShardCounts, read_hits, shard_path, write_shard
from infscan.storage import Store


@dataclass(frozen=True)
class ScanTask:
    """One shard. thresholds: of the shard files that were in storage when it was handed out.

    query_batch: the fingerprint of the broadcast batch, so that a rank lays them out once, in query_dtype.
    """

    run: Store
    corpus: Store
    shard: str
    sequence_ids: np.ndarray
    query_ids: tuple[str, ...]
    query_batch: str
    sides: tuple[str, ...]
    candidates: int
    thresholds: Thresholds
    tokens_per_batch: int
    dense: bool
    fingerprint: str
    attention: Attention = Attention.across
    query_dtype: Dtype | None = None


def scan_task(rank: Rank, task: ScanTask, query_batch: QueryBatch) -> tuple[Hits, ShardCounts] | None:
    """Score every sequence of the shard and write its file; returns what was written, on rank 0.

    score[n, q] = sum over layers and tokens of s_t^T P_q a_t, float32. Dense scores go before the shard's file.
    """
    queries = rank.cached("queries", task.query_batch, lambda: on_device(rank, query_batch, task.query_dtype))
    with rank.span("read", shard=task.shard):
        sequences = rank.read(task.corpus, task.sequence_ids, task.attention)
    scores_nq = torch.zeros(len(sequences), len(task.query_ids), dtype=rank.wide, device=rank.device)
    losses_n = torch.zeros(len(sequences), dtype=rank.wide, device=rank.device)
    for batch in rank.batches(sequences, task.tokens_per_batch):
        rows = rank.to_device(batch.rows)
        partial_bq = torch.zeros(len(batch.rows), len(task.query_ids), dtype=rank.wide, device=rank.device)

        def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor, partial_bq: Tensor = partial_bq) -> None:
            partial_bq.add_(score_layer(s_bto, a_bti, queries[layer.name]))

        losses_b = rank.backward(batch, rank.layers, batch.loss(), consume, ones=False)
        if batch.scored:
            scores_nq[rows], losses_n[rows] = partial_bq, losses_b
    scores_nq, losses_n = rank.reduce(scores_nq), rank.reduce(losses_n)
    if not rank.leads:
        return None
    scores, losses = scores_nq.float().cpu().numpy(), losses_n.float().cpu().numpy()
    hits = shard_hits(scores, task.sequence_ids, task.sides, task.candidates, task.thresholds)
    counts = ShardCounts(
        sequences=len(sequences),
        tokens=sum(len(sequence) for sequence in sequences),
        nonfinite=int((~np.isfinite(scores).all(axis=1)).sum()),
        kept=len(np.unique(hits.sequence_ids)),
        rows=len(hits),
        halvings=rank.halvings,
    )
    if task.run.exists(shard_path(task.shard)):
        # Another attempt was first: its rows and scores are the ones that count, also where kernels round differently.
        return read_hits(task.run, task.shard, task.query_ids)
    with rank.span("write", shard=task.shard):
        if task.dense:
            write_scores(task.run, task.shard, sequences, scores, task.query_ids, task.fingerprint)
        if not write_shard(task.run, task.shard, sequences, losses, hits, task.query_ids, counts, task.fingerprint):
            return read_hits(task.run, task.shard, task.query_ids)
    return hits, counts
