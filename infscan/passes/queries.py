"""The query side: gradients of -f, preconditioned, and (for the scan) compressed and stored (METHOD: query batching).

Everything the factors do happens here, once per query; the scan only sees U, V (or P).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infscan.config import Compression, DampingConfig, Solver, fingerprint, plain
from infscan.errors import QueryError
from infscan.influence.compress import compress_weighted, truncate
from infscan.influence.inverse import damping, from_core, inverse_core, to_core
from infscan.influence.layers import Layer, LayerFactors
from infscan.influence.score import LayerQueries
from infscan.model.measure import summed_losses
from infscan.passes.factor_store import read_layer_factors, read_tensor, read_tensors, write_tensors
from infscan.passes.rank import Batch, Rank
from infscan.queries import Query
from infscan.storage import Store


@dataclass(frozen=True)
class Solutions:
    """Where the iterated inverse's full-rank solutions lie. names: file by query id."""

    store: Store
    names: Mapping[str, str]


@dataclass(frozen=True)
class Inverse:
    """How gradients are preconditioned: with factors in storage, or not at all (solver=identity).

    solutions: of solver=cg and solver=astra, once they are found; they take the place of EK-FAC's.
    """

    factors: Store
    solver: Solver
    damping: DampingConfig
    solutions: Solutions | None = None

    @property
    def fingerprint(self) -> str:
        """Of all that fixes what it does, the factors' own content apart."""
        names = dict(self.solutions.names) if self.solutions else None
        return fingerprint({"solver": self.solver, "damping": plain(self.damping), "solutions": names})


@dataclass(frozen=True)
class QueryTask:
    """A group of queries for a group of layers; the result is one file of the query batch."""

    store: Store
    name: str
    queries: tuple[Query, ...]
    layers: tuple[Layer, ...]
    inverse: Inverse
    rank: int | None
    compression: Compression
    fingerprint: str


def query_gradients(rank: Rank, queries: Sequence[Query], layers: Sequence[Layer]) -> dict[str, Tensor]:
    """V = grad(-f) of every query, by layer: [Q, O, I] float32 or wider.

    Every rank of a group computes all of them, in step; the measurement's signs are in the loss. One token sequence at
    a time: beside others, longer or shorter, a query's gradient would round otherwise.

    Raises:
        QueryError: where a gradient is NaN or infinite.
    """
    V = {
        layer.name: torch.zeros(len(queries), layer.outputs, layer.inputs, dtype=rank.wide, device=rank.device)
        for layer in layers
    }
    for index, part in ((index, part) for index, query in enumerate(queries) for part in query.parts):
        ids = np.asarray([part.token_ids], np.int64)
        targets, weights = np.zeros_like(ids), np.zeros(ids.shape, np.float32)
        at = np.asarray(part.positions)
        # The input position t - 1 predicts token t.
        targets[0, at - 1] = ids[0, at]
        weights[0, at - 1] = part.sign
        targets_bt, weights_bt = rank.to_device(targets), rank.to_device(weights)
        batch = Batch(np.arange(1), rank.to_device(ids), rank.to_device(np.ones(ids.shape, np.bool_)))

        def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor, index: int = index) -> None:
            V[layer.name][index] += (s_bto.to(rank.wide).transpose(1, 2) @ a_bti.to(rank.wide))[0]

        def loss(logits_btv: Tensor, targets: Tensor = targets_bt, weights: Tensor = weights_bt) -> Tensor:
            return summed_losses(logits_btv, targets, weights)

        rank.backward(batch, layers, loss, consume)
    for name, V_qoi in V.items():
        finite = torch.isfinite(V_qoi).flatten(1).all(dim=1)
        if not bool(finite.all()):
            bad = queries[int((~finite).nonzero()[0])].id
            raise QueryError(
                f"query {bad!r}: its gradient at {name} is NaN or infinite; use model.dtype=float32, or leave it out."
            )
    return V


def layer_factors(inverse: Inverse, layer: Layer, device: str, dtype: torch.dtype) -> tuple[LayerFactors, float] | None:
    """A layer's factors and its damping, or None for the identity."""
    if inverse.solver is Solver.identity:
        return None
    factors = read_layer_factors(inverse.factors, layer).to(device)
    lam = damping(factors.Lambda, inverse.damping.relative, inverse.damping.absolute, layer.name)
    return factors.to(device, dtype), lam


def preconditioned(
    rank: Rank, queries: Sequence[Query], layers: Sequence[Layer], inverse: Inverse
) -> dict[str, Tensor]:
    """P = (G + lambda)^-1 grad(-f) at full rank, by layer: [Q, O, I]. Gradients are given up layer by layer."""
    if inverse.solutions is not None:
        return solutions(rank, queries, layers, inverse.solutions)
    V = query_gradients(rank, queries, layers)
    for layer in layers:
        known = layer_factors(inverse, layer, rank.device, rank.wide)
        if known is not None:
            factors, lam = known
            P = [from_core(inverse_core(V_oi, factors, lam), factors) for V_oi in _one_by_one(V.pop(layer.name))]
            V[layer.name] = torch.cat(P)
    return V


def solutions(rank: Rank, queries: Sequence[Query], layers: Sequence[Layer], found: Solutions) -> dict[str, Tensor]:
    """The iterated inverse's P of every query, by layer: [Q, O, I]; read by byte range, layer by layer."""

    def one(query: Query, layer: Layer) -> Tensor:
        return read_tensor(found.store, found.names[query.id], layer.name).to(rank.device, rank.wide)

    return {layer.name: torch.stack([one(query, layer) for query in queries]) for layer in layers}


def _one_by_one(V_qoi: Tensor) -> Iterator[Tensor]:
    """Each query's [1, O, I], in memory of its own: within a product of all of them its bits could differ."""
    for V_oi in V_qoi:
        yield V_oi[None].clone()


def query_task(rank: Rank, task: QueryTask) -> int:
    """Gradients, inverse and compression of a group of queries for a group of layers; rank 0 writes one file.

    Low rank only where min(O, I) > r. Returns the tokens measured.
    """
    found = task.inverse.solutions
    V = solutions(rank, task.queries, task.layers, found) if found else query_gradients(rank, task.queries, task.layers)
    tensors: dict[str, Tensor] = {}
    for layer in task.layers:
        known = layer_factors(task.inverse, layer, rank.device, rank.wide)
        by_query = [_compressed(task, layer, V_oi, known) for V_oi in _one_by_one(V.pop(layer.name))]
        for kind in by_query[0]:
            tensors[f"{layer.name}|{kind}"] = torch.cat([one[kind] for one in by_query])
    if rank.leads:
        write_tensors(task.store, task.name, tensors, {"fingerprint": task.fingerprint})
    return sum(len(part.token_ids) for query in task.queries for part in query.parts)


def _compressed(
    task: QueryTask, layer: Layer, V_qoi: Tensor, known: tuple[LayerFactors, float] | None
) -> dict[str, Tensor]:
    """U [Q, O, r] and V [Q, I, r], or P [Q, O, I]. known: the layer's factors and damping, if there are any.

    V_qoi: gradients, or solutions, which are only turned into the eigenbases.
    """
    if known is None:
        C_qoi = V_qoi
    elif task.inverse.solutions:
        C_qoi = to_core(V_qoi, known[0])
    else:
        C_qoi = inverse_core(V_qoi, *known)
    if task.rank is None or min(layer.outputs, layer.inputs) <= task.rank:
        return {"P": from_core(C_qoi, known[0]) if known else C_qoi}
    if known and task.compression is Compression.weighted:
        U_qor, V_qir = compress_weighted(C_qoi, known[0], task.rank)
    else:
        U_qor, V_qir = truncate(from_core(C_qoi, known[0]) if known else C_qoi, task.rank)
    return {"U": U_qor, "V": V_qir}


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


def on_device(rank: Rank, arrays: Mapping[str, np.ndarray]) -> dict[str, LayerQueries]:
    """The query batch laid out for scoring, on this rank's device, in the model's dtype."""

    def tensor(key: str) -> Tensor:
        # The broadcast array is shared and read-only; the layout below copies it, except where P stays as it is.
        return torch.from_numpy(arrays[key].copy()).to(rank.device, rank.model.dtype)

    batch = {}
    for layer in rank.layers:
        if f"{layer.name}|P" in arrays:
            batch[layer.name] = LayerQueries.full(tensor(f"{layer.name}|P"))
        else:
            batch[layer.name] = LayerQueries.low_rank(tensor(f"{layer.name}|U"), tensor(f"{layer.name}|V"))
    return batch


def query_groups(count: int, layers: Sequence[Layer], max_bytes: int) -> tuple[list[range], list[tuple[Layer, ...]]]:
    """Groups of queries and of layers whose full-rank gradients fit `max_bytes` in float32 on a rank.

    Where one query's gradients over all layers fit, layers stay together; else queries go one by one, by layer groups.
    """
    per_query = 4 * sum(layer.size for layer in layers)
    size = min(count, max_bytes // per_query)
    if size >= 1:
        return [range(start, min(start + size, count)) for start in range(0, count, size)], [tuple(layers)]
    groups: list[list[Layer]] = [[]]
    used = 0
    for layer in layers:
        if groups[-1] and used + 4 * layer.size > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(layer)
        used += 4 * layer.size
    return [range(index, index + 1) for index in range(count)], [tuple(group) for group in groups]
