"""Joint bases for many queries, layer by layer, where they are cheaper to scan with than every query's own columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infscan.config import Compression
from infscan.influence.joint import joint, smallest
from infscan.influence.layers import Layer
from infscan.influence.score import cheapest, weighed
from infscan.results.tensor_files import read_tensors, write_tensors
from infscan.steps.preconditioner import Preconditioner, layer_factors
from infscan.steps.queries import ranks_of
from infscan.model.worker import ModelWorker
from infscan.storage import Store


@dataclass(frozen=True)
class JointTask:
    """One layer of an allotted query batch. tokens: T of a sequence, which settles what is cheaper.

    weights: float64 [Q], by which a query's squares count. kept: of each layer's squares, beside what the columns keep.
    entries: of the layer's matrices, all queries together, at most (`room`).
    """

    store: Store
    name: str
    layer: Layer
    inverse: Preconditioner
    compression: Compression
    weights: np.ndarray
    kept: float
    tokens: int
    entries: int
    fingerprint: str


def room(arrays: Mapping[str, np.ndarray], layers: Sequence[Layer], entries: int) -> dict[str, int]:
    """Of so many entries each low-rank layer's part, as its size O I has it of theirs together: by name."""
    low = [layer for layer in layers if f"{layer.name}|ranks" in arrays]
    whole = sum(layer.size for layer in low)
    return {layer.name: entries * layer.size // whole for layer in low}


def worthwhile(arrays: Mapping[str, np.ndarray], layer: Layer, tokens: int) -> bool:
    """Whether the smallest basis pair that could serve the queries would be cheaper than their columns."""
    if f"{layer.name}|ranks" not in arrays:
        return False
    ranks, O, I = ranks_of(arrays, layer), layer.outputs, layer.inputs
    return any(cheapest(O, I, tokens, len(ranks), sum(ranks), pair) == "joint" for pair in smallest(ranks, O, I))


def joint_task(rank: ModelWorker, task: JointTask, arrays: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
    """Write K [Q, m, n] of the layer, with B_O [m, O] and B_I [n, I] where the side has a basis; or an empty file,
    where its columns or its whole matrices are cheaper, or nothing is small enough.

    Returns (m, n), zeros for an empty file, on rank 0.
    """
    if not rank.leads:
        return None
    layer, name = task.layer, task.layer.name
    O, I, ranks = layer.outputs, layer.inputs, ranks_of(arrays, layer)
    U_xo, V_xi = (torch.from_numpy(arrays[f"{name}|{side}"].copy()).to(rank.device, rank.wide) for side in "UV")
    known = layer_factors(task.inverse, layer, rank.device, rank.wide)
    factors = known[0] if known and task.compression is Compression.weighted else None
    weights = rank.to_device(task.weights)
    found = joint(U_xo, V_xi, ranks, factors, weights, task.kept, task.tokens, task.entries)
    tensors: dict[str, Tensor] = {}
    if found is not None:
        costs = weighed(O, I, task.tokens, len(ranks), sum(ranks), (found.K_qmn.shape[1], found.K_qmn.shape[2]))
        if len(ranks) * layer.size > task.entries:
            del costs["full"]
        if min(costs, key=costs.__getitem__) == "joint":
            bases = {"B_O": found.B_mo, "B_I": found.B_ni}
            tensors = {"K": found.K_qmn} | {kind: basis for kind, basis in bases.items() if basis is not None}
    write_tensors(task.store, task.name, tensors, {"fingerprint": task.fingerprint})
    return (tensors["K"].shape[1], tensors["K"].shape[2]) if tensors else (0, 0)


def with_joint(
    arrays: Mapping[str, np.ndarray], store: Store, names: Sequence[tuple[Layer, str]]
) -> dict[str, np.ndarray]:
    """The query batch with the bases of those layers that have some in place of their columns: `<layer>|B_O`, ..."""
    chosen = dict(arrays)
    for layer, name in names:
        tensors = read_tensors(store, name)
        if tensors:
            for kind in ("U", "V", "ranks"):
                del chosen[f"{layer.name}|{kind}"]
            chosen |= {f"{layer.name}|{kind}": tensor.numpy() for kind, tensor in tensors.items()}
    return chosen
