"""A query batch in storage: its spectra, by which the driver plans, and its columns, which ranks read.

The driver holds numbers alone: what each column contributes. Columns go from storage to the machines that score with
them, once to each, in the dtype of the products; a layer at a time leaves the process that reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.influence.layers import Layer
from infscan.influence.layout import (
    Array,
    Basis,
    Dense,
    Factored,
    Layout,
    LayoutPlan,
    Spectrum,
    as_array,
    basis_from_arrays,
    stored_dense,
)
from infscan.results.tensor_files import read_some, read_tensors, tensor_shapes
from infscan.storage import Store
from infscan.storage.prefetch import prefetch


@dataclass(frozen=True)
class StoredBatch:
    """Where a query batch lies, and how each layer of it is to be laid out: all that a rank needs to read it."""

    store: Store
    # Its files, by group of queries and then by group of layers.
    names: tuple[tuple[str, ...], ...]
    layer_groups: tuple[tuple[Layer, ...], ...]
    plan: LayoutPlan
    # The files of the shared bases that the plan has, by layer.
    bases: Mapping[str, str]
    queries: int
    # Of the products that it is for.
    dtype: str

    @property
    def pieces(self) -> int:
        """How many `read_layouts` yields."""
        return len(self.plan.layers)

    def __getitem__(self, name: str) -> Layout[Array]:
        """One factored layer's columns at the ranks that the plan has, as they are stored (float32)."""
        [group] = [at for at, layers in enumerate(self.layer_groups) if any(one.name == name for one in layers)]
        [layer] = [one for one in self.layer_groups[group] if one.name == name]
        keys = [f"{name}|U", f"{name}|V"]
        files = (files[group] for files in self.names)
        columns = _Columns.empty(layer, self, torch.float32)
        for tensors in prefetch(self.store, partial(_some, self.store, keys), files):
            columns.add(tensors)
        return columns.layout()


def _some(store: Store, keys: Sequence[str], name: str) -> dict[str, Tensor]:
    return read_some(store, name, keys)


def read_spectra(
    store: Store, names: Sequence[Sequence[str]], layer_groups: Sequence[Sequence[Layer]], rank: int | None
) -> dict[str, Spectrum]:
    """What each column of the factored layers contributes, by layer: the numbers of the files, not their columns.

    rank: the stored one.

    Raises:
        DamagedError: where a file does not hold what was written.
    """
    found: dict[str, Spectrum] = {}
    for at, layers in enumerate(layer_groups):
        factored = [layer.name for layer in layers if not stored_dense(layer, rank)]
        if not factored:
            continue
        read = prefetch(store, partial(_numbers, store, factored), [files[at] for files in names])
        totals, values = (np.concatenate(of_files, axis=1) for of_files in zip(*read, strict=True))
        found |= {name: Spectrum(values[n], totals[n]) for n, name in enumerate(factored)}
    return found


def _numbers(store: Store, layers: Sequence[str], name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One file's totals [layers, queries] and values [layers, queries, r]: a hundred thousand small arrays would take
    ten times as much."""
    kinds = ("totals", "values")
    found = read_some(store, name, [f"{layer}|{kind}" for kind in kinds for layer in layers])
    totals, values = (np.stack([found[f"{layer}|{kind}"].double().numpy() for layer in layers]) for kind in kinds)
    return totals, values


def read_bases(store: Store, names: Mapping[str, str]) -> dict[str, Basis]:
    """(m, n) of the shared bases that their files hold, by layer; of layers that have none, nothing.

    Raises:
        DamagedError: where a file does not hold what was written.
    """

    def read(item: tuple[str, str]) -> tuple[str, dict[str, tuple[int, ...]]]:
        return item[0], tensor_shapes(store, item[1])

    shapes = prefetch(store, read, names.items())
    return {layer: (found["K"][1], found["K"][2]) for layer, found in shapes if found}


def read_layouts(batch: StoredBatch) -> Iterator[tuple[str, Layout[Array]]]:
    """Every layer of the batch as planned, in the dtype of the products; a layer group is in memory at a time.

    Raises:
        DamagedError: where a file does not hold what was written.
    """
    dtype: torch.dtype = getattr(torch, batch.dtype)
    for at, layers in enumerate(batch.layer_groups):
        stored = [layer for layer in layers if layer.name not in batch.bases]
        held = {layer.name: _Columns.empty(layer, batch, dtype) for layer in stored}
        if held:
            for files in batch.names:
                tensors = read_tensors(batch.store, files[at])
                for columns in held.values():
                    columns.add(tensors)
        for layer in layers:
            if layer.name in held:
                yield layer.name, held.pop(layer.name).layout()
            else:
                yield layer.name, _shared(batch.store, batch.bases[layer.name], dtype)


def _shared(store: Store, name: str, dtype: torch.dtype) -> Layout[Array]:
    found = basis_from_arrays({kind: as_array(tensor, dtype) for kind, tensor in read_tensors(store, name).items()})
    assert found is not None, f"{name} is empty, and the plan has a basis of it"
    return found


@dataclass
class _Columns:
    """A layer as it is filled, query group after query group."""

    layer: Layer
    # The columns that each query keeps, and whether P is multiplied out; None: whole matrices are stored.
    ranks: tuple[int, ...] | None
    densified: bool
    # U and V [sum of ranks, O or I], or P [Q, O, I].
    sides: tuple[Tensor, ...]
    queries: int = 0
    rows: int = 0

    @staticmethod
    def empty(layer: Layer, batch: StoredBatch, dtype: torch.dtype) -> _Columns:
        ranks = batch.plan.ranks.get(layer.name)
        shapes: list[tuple[int, ...]] = [(batch.queries, layer.outputs, layer.inputs)]
        if ranks is not None:
            shapes = [(sum(ranks), layer.outputs), (sum(ranks), layer.inputs)]
        densified = ranks is not None and batch.plan.ways[layer.name] == "dense"
        return _Columns(layer, ranks, densified, tuple(torch.empty(shape, dtype=dtype) for shape in shapes))

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """The next group of queries, as its file has them."""
        if self.ranks is None:
            P_qoi = tensors[f"{self.layer.name}|P"]
            self.sides[0][self.queries : self.queries + len(P_qoi)] = P_qoi
            self.queries += len(P_qoi)
            return
        pairs = zip(tensors[f"{self.layer.name}|U"], tensors[f"{self.layer.name}|V"], strict=True)
        for U_or, V_ir in pairs:
            rank = self.ranks[self.queries]
            for side, columns in zip(self.sides, (U_or, V_ir), strict=True):
                side[self.rows : self.rows + rank] = columns[:, :rank].T
            self.queries += 1
            self.rows += rank

    def layout(self) -> Layout[Array]:
        arrays = [as_array(side, side.dtype) for side in self.sides]
        if self.ranks is None:
            return Dense(arrays[0])
        return Factored(arrays[0], arrays[1], self.ranks, self.densified)
