"""Shared bases for many queries, layer by layer, where they are cheaper to scan with than every query's own columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infscan.config import Compression
from infscan.influence.layers import Layer
from infscan.influence.layout import (
    Array,
    Basis,
    Factored,
    QueryBatch,
    SharedBasis,
    basis_from_arrays,
    basis_to_arrays,
    shared_basis_pays,
    to_tensor,
)
from infscan.influence.shared_basis import shared_basis
from infscan.passes.factor_store import read_tensors, write_tensors
from infscan.passes.queries import Inverse, layer_factors
from infscan.passes.rank import Rank
from infscan.storage import Store


@dataclass(frozen=True)
class SharedBasisTask:
    """One layer of a query batch whose ranks are allocated; the result is one file."""

    store: Store
    name: str
    layer: Layer
    inverse: Inverse
    compression: Compression
    weights: np.ndarray  # float64 [Q], by which a query's squares count
    energy: float  # of the layer's squares in the columns, what the basis keeps
    tokens: int  # T of a sequence, which settles what is cheaper
    entries: int  # that the cores may have, or the dense matrices instead
    fingerprint: str


def shared_basis_task(rank: Rank, task: SharedBasisTask, batch: QueryBatch) -> Basis | None:
    """Find the layer's shared basis and write it; or an empty file, where another way is cheaper or nothing fits.

    Returns (m, n), zeros for an empty file, on rank 0.
    """
    if not rank.leads:
        return None
    layer, columns = task.layer, batch[task.layer.name]
    assert isinstance(columns, Factored), f"{layer.name} is stored dense"
    U_xo, V_xi = (to_tensor(side, rank.device, rank.wide) for side in (columns.U_xo, columns.V_xi))
    known = layer_factors(task.inverse, layer, rank.device, rank.wide)
    factors = known[0] if known and task.compression is Compression.weighted else None
    weights = rank.to_device(task.weights)
    found = shared_basis(U_xo, V_xi, columns.ranks, factors, weights, task.energy, task.tokens, task.entries)
    if found and not shared_basis_pays(layer, columns.ranks, task.tokens, found.basis, task.entries):
        found = None
    write_tensors(task.store, task.name, basis_to_arrays(found), {"fingerprint": task.fingerprint})
    return found.basis if found else (0, 0)


def read_shared_bases(store: Store, names: Sequence[tuple[Layer, str]]) -> dict[str, SharedBasis[Array]]:
    """The shared bases of those layers that have one, by name. names: every layer that was tried, with its file."""
    read = {
        layer.name: basis_from_arrays({kind: tensor.numpy() for kind, tensor in read_tensors(store, name).items()})
        for layer, name in names
    }
    return {name: found for name, found in read.items() if found}
