"""The query side (docs/method.md#query-batching): gradients of -f, preconditioned, for the scan compressed and stored.

Everything the factors do happens here, once per query; the scan only sees U, V (or P). Where a fine-tuned model is
asked (stages), what its stage left of the gradients comes from storage: `infscan.steps.stages`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from infscan.config import DampingConfig, Solver, fingerprint
from infscan.influence.inverse import damped_core, damping, from_core, to_core, tokens_to_core
from infscan.influence.layers import Layer, LayerFactors
from infscan.influence.precision import Multiply, multiplying
from infscan.model.worker import ModelWorker
from infscan.queries import Query
from infscan.results.tensor_files import read_tensor
from infscan.steps.factor_files import found_damping, read_layer_factors
from infscan.steps.gradients import StoredTokens, Tokens, by_tokens, check_finite, query_tokens, read_tokens
from infscan.storage import Identity, Store


@dataclass(frozen=True)
class StoredGradients:
    """Full-rank vectors of queries in storage: an iterated inverse's solutions, or what a later stage left."""

    store: Store
    # By query id, a file with every layer's [O, I]; where layers are in several, the name has `{part}` in it.
    names: Mapping[str, str]
    # By layer, the part that it is in.
    parts: Mapping[str, int] = field(default_factory=dict)

    def file(self, query_id: str, layer: Layer) -> str:
        return self.names[query_id].format(part=self.parts.get(layer.name, 0))


@dataclass(frozen=True)
class Preconditioner:
    """How gradients are preconditioned: with factors in storage, or not at all (solver=identity)."""

    factors: Store
    solver: Solver
    damping: DampingConfig
    # Of the proximal term that held the stage whose factors they are (docs/method.md#multi-stage); it adds to damping.
    alpha: float = 0.0
    # What a later stage left, in place of the gradients at this stage's own model.
    vectors: StoredGradients | None = None
    # Those gradients, where they were taken before; else they are taken where they are needed.
    tokens: StoredTokens | None = None
    # Of solver=cg and solver=astra, once they are found; they take the place of EK-FAC's.
    solutions: StoredGradients | None = None
    # How a GPU multiplies when it rotates gradients, and scores with them at full rank.
    matmul: Multiply = "exact"
    # What the factors are; None where whatever is there is to be read.
    identity: Identity | None = None

    @property
    def fingerprint(self) -> str:
        """Of all that fixes what it does, the factors' own content apart."""
        known: dict[str, Any] = {"solver": self.solver, "damping": self.damping.facts()}
        known["solutions"] = dict(self.solutions.names) if self.solutions else None
        if self.matmul != "exact":
            known["matmul"] = self.matmul
        if self.alpha or self.vectors:
            known |= {"alpha": self.alpha, "vectors": dict(self.vectors.names) if self.vectors else None}
        return fingerprint(known)


def query_gradients(worker: ModelWorker, queries: Sequence[Query], layers: Sequence[Layer]) -> dict[str, Tensor]:
    """V = grad(-f) of every query, by layer: [Q, O, I] float32 or wider.

    Raises:
        QueryError: where a gradient is NaN or infinite.
    """
    return _matrices(query_tokens(worker, queries, layers), queries)


def gradients(
    worker: ModelWorker, queries: Sequence[Query], layers: Sequence[Layer], inverse: Preconditioner
) -> dict[str, Tensor]:
    """What the inverse is applied to, by layer [Q, O, I]: grad(-f) at this model, or what a later stage left of it."""
    return _matrices(_given(worker, queries, layers, inverse), queries)


def _matrices(given: Mapping[str, Sequence[Tokens | Tensor] | Tensor], queries: Sequence[Query]) -> dict[str, Tensor]:
    """[Q, O, I] by layer, layer after layer."""
    V, found = dict(given), dict[str, Tensor]()
    for name in list(V):
        mine = V.pop(name)
        if not isinstance(mine, Tensor):
            mine = torch.stack([one.matrix() if isinstance(one, Tokens) else one for one in mine])
        check_finite(name, queries, torch.isfinite(mine).flatten(1).all(dim=1))
        found[name] = mine
    return found


def layer_factors(
    inverse: Preconditioner, layer: Layer, device: str, dtype: torch.dtype
) -> tuple[LayerFactors, float] | None:
    """A layer's factors and what is added to Lambda (its damping, and alpha), or None for the identity."""
    if inverse.solver is Solver.identity:
        return None
    factors = read_layer_factors(inverse.factors, layer, inverse.identity).to(device)
    asked = inverse.damping
    relative = found_damping(inverse.factors, layer) if asked.by_fit else asked.relative
    lam = damping(factors.Lambda, relative, asked.absolute, layer.name, factors.stack_mean)
    # A relative damping is of Lambda alone.
    return factors.to(device, dtype), lam + inverse.alpha


def preconditioned(
    worker: ModelWorker, queries: Sequence[Query], layers: Sequence[Layer], inverse: Preconditioner
) -> dict[str, Tensor]:
    """P = (G + alpha + lambda)^-1 V at full rank, by layer: [Q, O, I]. V: grad(-f), or what a later stage left of it.

    Raises:
        QueryError: where a gradient is NaN or infinite.
    """
    if inverse.solutions is not None:
        return read_vectors(worker, queries, layers, inverse.solutions)
    V = dict(sources(worker, queries, layers, inverse))
    P: dict[str, Tensor] = {}
    for layer in layers:
        known = layer_factors(inverse, layer, worker.device, worker.wide)
        mine = V.pop(layer.name)
        with multiplying(inverse.matmul):
            P[layer.name] = torch.stack([full_rank(core(one, layer, known), known) for one in mine])
        check_finite(layer.name, queries, torch.isfinite(P[layer.name]).flatten(1).all(dim=1))
    return P


def read_vectors(
    worker: ModelWorker, queries: Sequence[Query], layers: Sequence[Layer], found: StoredGradients
) -> dict[str, Tensor]:
    """The stored vectors of every query, by layer: [Q, O, I]; read by byte range, layer by layer."""

    def one(query: Query, layer: Layer) -> Tensor:
        return read_tensor(found.store, found.file(query.id, layer), layer.name).to(worker.device, worker.wide)

    return {layer.name: torch.stack([one(query, layer) for query in queries]) for layer in layers}


DampedFactors = tuple[LayerFactors, float] | None


def sources(
    worker: ModelWorker, queries: Sequence[Query], layers: Sequence[Layer], inverse: Preconditioner
) -> Mapping[str, Sequence[Tokens | Tensor] | Tensor]:
    """Of every query, by layer: the solution where there is one, what a later stage left, or the gradient's tokens."""
    if inverse.solutions is not None:
        return read_vectors(worker, queries, layers, inverse.solutions)
    return _given(worker, queries, layers, inverse)


def _given(
    worker: ModelWorker, queries: Sequence[Query], layers: Sequence[Layer], inverse: Preconditioner
) -> Mapping[str, Sequence[Tokens | Tensor] | Tensor]:
    """`sources` without solutions. Gradients are read where they were taken before of this model in this dtype."""
    if inverse.vectors is not None:
        return read_vectors(worker, queries, layers, inverse.vectors)
    if inverse.tokens is not None and inverse.tokens.has(queries, worker.model.dtype):
        return read_tokens(worker, queries, layers, inverse.tokens)
    return query_tokens(worker, queries, layers)


def core(V: Tokens | Tensor, layer: Layer, known: DampedFactors, *, solved: bool = False) -> Tensor:
    """(Q_S^T V Q_A) / (Lambda + lambda), [O, I]; V itself without factors. A solution is only rotated."""
    if known is None:
        return V.matrix() if isinstance(V, Tokens) else V
    factors, lam = known
    if isinstance(V, Tensor):
        rotated = to_core(V, factors)
    elif by_tokens(len(V.s_to), layer):
        rotated = tokens_to_core(V.s_to, V.a_ti, factors)
    else:
        rotated = to_core(V.matrix(), factors)
    return rotated if solved else damped_core(rotated, factors, lam)


def full_rank(C_oi: Tensor, known: DampedFactors) -> Tensor:
    """P, [O, I], from its core in the eigenbases."""
    return from_core(C_oi, known[0]) if known else C_oi


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
