"""Joint bases for many queries, layer by layer, where they are cheaper to scan with than every query's own columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from infscan.config import Compression
from infscan.influence.joint import joint, smallest
from infscan.influence.layers import Layer
from infscan.influence.score import cheapest
from infscan.passes.factor_store import read_tensors, write_tensors
from infscan.passes.queries import Inverse, layer_factors
from infscan.passes.query_batch import ranks_of
from infscan.passes.rank import Rank
from infscan.storage import Store


@dataclass(frozen=True)
class JointTask:
    """One layer of an allotted query batch. tokens: T of a sequence, which settles what is cheaper.

    weights: float64 [Q], by which a query's squares count. kept: of each layer's squares, beside what the columns keep.
    """

    store: Store
    name: str
    layer: Layer
    inverse: Inverse
    compression: Compression
    weights: np.ndarray
    kept: float
    tokens: int
    fingerprint: str


def worthwhile(arrays: Mapping[str, np.ndarray], layer: Layer, tokens: int) -> bool:
    """Whether the smallest basis pair that could serve the queries would be cheaper than their columns."""
    if f"{layer.name}|ranks" not in arrays:
        return False
    ranks = ranks_of(arrays, layer)
    return cheapest(layer.outputs, layer.inputs, tokens, len(ranks), sum(ranks), smallest(ranks)) == "joint"


def joint_task(rank: Rank, task: JointTask, arrays: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
    """Write B_O [m, O], B_I [n, I] and K [Q, m, n] of the layer, or an empty file where its columns are cheaper.

    Returns (m, n), zeros for the latter, on rank 0.
    """
    if not rank.leads:
        return None
    layer, name = task.layer, task.layer.name
    ranks = ranks_of(arrays, layer)
    U_xo, V_xi = (torch.from_numpy(arrays[f"{name}|{side}"].copy()).to(rank.device, rank.wide) for side in "UV")
    known = layer_factors(task.inverse, layer, rank.device, rank.wide)
    factors = known[0] if known and task.compression is Compression.weighted else None
    found = joint(U_xo, V_xi, ranks, factors, rank.to_device(task.weights), task.kept)
    shape = len(found.B_mo), len(found.B_ni)
    if cheapest(layer.outputs, layer.inputs, task.tokens, len(ranks), sum(ranks), shape) != "joint":
        write_tensors(task.store, task.name, {}, {"fingerprint": task.fingerprint})
        return 0, 0
    tensors = {"B_O": found.B_mo, "B_I": found.B_ni, "K": found.K_qmn}
    write_tensors(task.store, task.name, tensors, {"fingerprint": task.fingerprint})
    return shape


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
