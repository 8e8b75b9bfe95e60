"""What the compression costs: a sample of sequences scored with the query batch and with full-rank query gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infscan.config import Attention, Dtype
from infscan.influence.layers import Layer
from infscan.influence.layout import QueryBatch
from infscan.influence.score import LayerQueries, Scratch, score_layer
from infscan.passes.queries import Inverse, preconditioned
from infscan.passes.query_batch import on_device
from infscan.passes.rank import Rank
from infscan.queries import Query
from infscan.storage import Store


@dataclass(frozen=True)
class CheckTask:
    """The sample, for a group of queries and of layers. columns: the queries' places in the query batch,
    which is laid out in query_dtype."""

    corpus: Store
    sequence_ids: np.ndarray
    queries: tuple[Query, ...]
    columns: tuple[int, ...]
    layers: tuple[Layer, ...]
    inverse: Inverse
    query_batch: str
    tokens_per_batch: int
    attention: Attention = Attention.across
    query_dtype: Dtype | None = None


def check_task(rank: Rank, task: CheckTask, query_batch: QueryBatch) -> tuple[np.ndarray, np.ndarray] | None:
    """(scores with the query batch, scores at full rank) over the task's layers, float64 [n, queries], on rank 0."""
    batch_queries = rank.cached("queries", task.query_batch, lambda: on_device(rank, query_batch, task.query_dtype))
    P = preconditioned(rank, task.queries, task.layers, task.inverse)
    scratch = Scratch.on(rank.device)
    # In the model's dtype, as a scan at full rank would be.
    full = {
        layer.name: LayerQueries.dense(P.pop(layer.name).to(rank.model.dtype), scratch, bias=layer.bias)
        for layer in task.layers
    }
    sequences = rank.read(task.corpus, task.sequence_ids, task.attention)
    columns = rank.to_device(np.asarray(task.columns, np.int64))
    shape = (len(sequences), len(task.queries))
    approximate_nq = torch.zeros(shape, dtype=torch.float64, device=rank.device)
    exact_nq = torch.zeros(shape, dtype=torch.float64, device=rank.device)
    for batch in rank.batches(sequences, task.tokens_per_batch):
        rows = rank.to_device(batch.rows)

        def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor, rows: Tensor = rows) -> None:
            approximate_nq[rows] += score_layer(s_bto, a_bti, batch_queries[layer.name])[:, columns]
            exact_nq[rows] += score_layer(s_bto, a_bti, full[layer.name])

        rank.backward(batch, task.layers, batch.loss(), consume, ones=False)
    approximate_nq, exact_nq = rank.reduce(approximate_nq), rank.reduce(exact_nq)
    return (approximate_nq.cpu().numpy(), exact_nq.cpu().numpy()) if rank.leads else None
