"""The query batch on its way from storage to a rank's device; `influence.layout` says how it is laid out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from infscan.config import Dtype
from infscan.influence import layout
from infscan.influence.layout import QueryBatch, StoredQueries
from infscan.influence.score import LayerQueries, Scratch
from infscan.passes.factor_store import read_tensors
from infscan.passes.rank import Rank
from infscan.storage import Store


def read_query_batch(store: Store, names: Sequence[Sequence[str]]) -> StoredQueries:
    """Read the whole query batch. names: its files, by group of queries and then by group of layers."""
    return layout.from_arrays(
        [
            {key: tensor.numpy() for name in files for key, tensor in read_tensors(store, name).items()}
            for files in names
        ]
    )


def in_dtype(dtype: Dtype | None, model: torch.dtype) -> torch.dtype:
    """What queries are laid out in (`scan.query_dtype`): the model's dtype, where nothing else is asked for."""
    if dtype is None or dtype is Dtype.auto:
        return model
    found: torch.dtype = getattr(torch, dtype.value)
    return found


def on_device(rank: Rank, batch: QueryBatch, dtype: Dtype | None = None) -> dict[str, LayerQueries]:
    """The query batch laid out for scoring, on this rank's device. dtype: as of `in_dtype`."""
    scratch = Scratch.on(rank.device)
    return layout.on_device(batch, rank.layers, rank.device, in_dtype(dtype, rank.model.dtype), scratch)
