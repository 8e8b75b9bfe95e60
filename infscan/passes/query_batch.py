"""The query batch as a scan takes it: read from storage, ranks allotted, laid out layer by layer on a rank's device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from infscan.config import Dtype
from infscan.influence.allot import allot
from infscan.influence.layers import Layer
from infscan.influence.score import LayerQueries, Scratch, cheapest, weighed
from infscan.results.tensor_files import read_tensors
from infscan.model.worker import ModelWorker
from infscan.storage import Store


def read_query_batch(store: Store, names: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
    """The whole query batch as arrays `<layer>|U`, `<layer>|V` or `<layer>|P`, queries along the first axis.

    names: the files, by group of queries and then by group of layers.
    """
    groups: list[dict[str, np.ndarray]] = []
    for files in names:
        groups.append({})
        for name in files:
            groups[-1] |= {key: tensor.numpy() for key, tensor in read_tensors(store, name).items()}
    return {key: np.concatenate([group[key] for group in groups]) for key in groups[0]}


def allotted(arrays: Mapping[str, np.ndarray], layers: Sequence[Layer], kept: float) -> dict[str, np.ndarray]:
    """The query batch with ranks allotted to every query and layer (`influence.allot`), as the fewest columns.

    A low-rank layer comes to U [sum of ranks, O], V [sum of ranks, I] and ranks [Q], query after query; P stays whole.
    """
    low = [layer for layer in layers if f"{layer.name}|U" in arrays]
    if not low:
        return dict(arrays)
    costs = [layer.outputs + layer.inputs for layer in low]
    ranks = np.asarray(
        [
            allot([arrays[f"{layer.name}|values"][q] for layer in low],
                  [float(arrays[f"{layer.name}|totals"][q]) for layer in low], costs, kept)
            for q in range(len(arrays[f"{low[0].name}|U"]))
        ]
    )  # fmt: skip
    chosen = {key: array for key, array in arrays.items() if key.endswith("|P")}
    for index, layer in enumerate(low):
        mine = ranks[:, index]
        for kind in ("U", "V"):
            sides = arrays[f"{layer.name}|{kind}"]
            chosen[f"{layer.name}|{kind}"] = np.concatenate([sides[q, :, :r].T for q, r in enumerate(mine)])
        chosen[f"{layer.name}|ranks"] = mine
    return chosen


def query_weights(arrays: Mapping[str, np.ndarray], layers: Sequence[Layer]) -> np.ndarray:
    """1 over every query's squares in all low-rank layers (`Compressed.total`), float64 [Q]: each counts alike."""
    totals = [arrays[f"{layer.name}|totals"] for layer in layers if f"{layer.name}|totals" in arrays]
    summed = np.sum(totals, axis=0, dtype=np.float64)
    return np.divide(1.0, summed, out=np.zeros_like(summed), where=summed > 0)


def multiplied_out(
    arrays: Mapping[str, np.ndarray], layers: Sequence[Layer], tokens: int, entries: int
) -> dict[str, np.ndarray]:
    """The query batch with `<layer>|full` for low-rank layers that are cheaper to scan with as P = U V^T.

    Layer by layer while all those matrices and the joint cores together have so many entries at most. tokens: T of a
    sequence.
    """
    chosen = dict(arrays)
    left = entries - sum(arrays[f"{layer.name}|K"].size for layer in layers if f"{layer.name}|K" in arrays)
    for layer in layers:
        if f"{layer.name}|U" not in arrays:
            continue
        ranks = ranks_of(arrays, layer)
        size = len(ranks) * layer.size
        way = cheapest(layer.outputs, layer.inputs, tokens, len(ranks), sum(ranks))
        if way == "full" and size <= left:
            chosen[f"{layer.name}|full"] = np.asarray(True)
            left -= size
    return chosen


def without_room(arrays: Mapping[str, np.ndarray], layers: Sequence[Layer], tokens: int) -> tuple[int, float]:
    """(how many layers, how many times the products) are scored by columns where P = U V^T would have been cheaper."""
    by_columns = by_matrix = 0.0
    count = 0
    for layer in layers:
        if layout(arrays, layer) == "low":
            ranks = ranks_of(arrays, layer)
            costs = weighed(layer.outputs, layer.inputs, tokens, len(ranks), sum(ranks))
            if costs["full"] < costs["low"]:
                count, by_columns, by_matrix = count + 1, by_columns + costs["low"], by_matrix + costs["full"]
    return count, by_columns / by_matrix if count else 1.0


def layout(arrays: Mapping[str, np.ndarray], layer: Layer) -> str:
    """How a layer is scored (`infscan.influence.score.products`): `low`, `full` or `joint`."""
    if f"{layer.name}|K" in arrays:
        return "joint"
    return "full" if f"{layer.name}|P" in arrays or f"{layer.name}|full" in arrays else "low"


def ranks_of(arrays: Mapping[str, np.ndarray], layer: Layer) -> list[int]:
    """The queries' columns in a low-rank layer, by query."""
    if f"{layer.name}|ranks" in arrays:
        return arrays[f"{layer.name}|ranks"].tolist()
    Q, _, rank = arrays[f"{layer.name}|U"].shape
    return [rank] * Q


def in_dtype(dtype: Dtype | None, model: torch.dtype) -> torch.dtype:
    """What queries are laid out in (`scan.query_dtype`): the model's dtype, where nothing else is asked for."""
    if dtype is None or dtype is Dtype.auto:
        return model
    found: torch.dtype = getattr(torch, dtype.value)
    return found


def on_device(rank: ModelWorker, arrays: Mapping[str, np.ndarray], dtype: Dtype | None = None) -> dict[str, LayerQueries]:
    """The query batch laid out for scoring, on this rank's device. dtype: as of `in_dtype`."""
    laid_out_in = in_dtype(dtype, rank.model.dtype)

    def tensor(key: str) -> Tensor:
        # The broadcast array is shared and read-only; the layout below copies it, except where P stays as it is.
        return torch.from_numpy(arrays[key].copy()).to(rank.device, laid_out_in)

    def columns(name: str, side: str) -> Tensor:
        found = tensor(f"{name}|{side}")
        # [Q, n, r] to a row for every column, query after query.
        return found if found.ndim == 2 else found.transpose(1, 2).flatten(0, 1)

    batch, scratch = {}, Scratch.on(rank.device)
    for layer in rank.layers:
        name = layer.name
        if f"{name}|P" in arrays:
            batch[name] = LayerQueries.full(tensor(f"{name}|P"), scratch, bias=layer.bias)
        elif f"{name}|K" in arrays:
            B_mo, B_ni = (tensor(key) if key in arrays else None for key in (f"{name}|B_O", f"{name}|B_I"))
            batch[name] = LayerQueries.cores(tensor(f"{name}|K"), B_mo, B_ni, scratch, bias=layer.bias)
        else:
            batch[name] = LayerQueries.low_rank(columns(name, "U"), columns(name, "V"), ranks_of(arrays, layer))
            if f"{name}|full" in arrays:
                batch[name] = LayerQueries.full(batch[name].multiplied_out(), scratch, bias=layer.bias)
    return batch
