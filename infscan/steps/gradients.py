"""grad(-f) of every query: taken once, kept in the run's folder by its tokens, and read by whoever preconditions it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infscan.errors import QueryError
from infscan.influence.eigenbasis import rotate_tokens_first
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.model.losses import Loss
from infscan.model.worker import Batch, LayerConsumer, ModelWorker
from infscan.queries import Part, Query
from infscan.results.tensor_files import read_some, tensor_shapes
from infscan.storage import Store

# Queries of a file at most, and bytes of their gradients, which a worker has at once.
_QUERIES_PER_FILE, _BYTES_PER_FILE = 64, 1 << 28


@dataclass(frozen=True)
class Tokens:
    """A query's gradient V = grad(-f) = sum_t s_t a_t^T, by its tokens: s_to [n, O], a_ti [n, I], float32 or wider.

    Signs are in s. A query has few tokens, so this is far smaller than V, and cheaper to rotate.
    """

    s_to: Tensor
    a_ti: Tensor

    def matrix(self) -> Tensor:
        """V, [O, I]."""
        return self.s_to.T @ self.a_ti

    def finite(self) -> Tensor:
        """Whether it has neither NaN nor infinity: bool []."""
        return torch.isfinite(self.s_to).all() & torch.isfinite(self.a_ti).all()


@dataclass(frozen=True)
class StoredTokens:
    """The gradients of a run's queries in storage, as `infscan.steps.measure` took them: bit for bit `query_tokens`.

    names: by query id, the file that it is in. dtype: of the model that they were taken of, and of s and a.
    """

    store: Store
    names: Mapping[str, str]
    dtype: str

    def has(self, queries: Iterable[Query], dtype: torch.dtype) -> bool:
        """Whether these queries' gradients at the model in this dtype are there."""
        return self.dtype == dtype_name(dtype) and all(query.id in self.names for query in queries)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and the like, as settings have it."""
    return str(dtype).removeprefix("torch.")


def kept_tensors(query_id: str, layer: Layer, V: Tokens, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a file keeps of one gradient: s and a in the model's dtype, which they were computed in; of a query with so
    many tokens that V is multiplied out before it is rotated, V."""
    if by_tokens(len(V.s_to), layer):
        return {f"{query_id}|{layer.name}|{kind}": x.to(dtype) for kind, x in (("s", V.s_to), ("a", V.a_ti))}
    return {f"{query_id}|{layer.name}|V": V.matrix()}


def by_tokens(tokens: int, layer: Layer) -> bool:
    """Whether a gradient of so many tokens is kept, and rotated, token by token."""
    return rotate_tokens_first(tokens, layer.outputs, layer.inputs)


def tokens_of(query: Query) -> int:
    """The tokens that its gradient is a sum over."""
    return sum(max(part.positions) for part in query.parts)


def kept_bytes(tokens: int, layers: Iterable[Layer], itemsize: int) -> int:
    """Bytes of the gradient of a query of so many tokens in its file; of experts, as if all went to each. itemsize: of
    the model's dtype."""
    return sum(
        itemsize * tokens * (one.outputs + one.inputs) if by_tokens(tokens, one) else 4 * one.size for one in layers
    )


def file_units(sizes: Sequence[int]) -> list[range]:
    """Which queries one worker measures, and puts into one file. sizes: bytes of each one's gradient."""
    units: list[range] = []
    start, used = 0, 0
    for index, size in enumerate(sizes):
        if index > start and (index - start == _QUERIES_PER_FILE or used + size > _BYTES_PER_FILE):
            units.append(range(start, index))
            start, used = index, 0
        used += size
    return [*units, range(start, len(sizes))] if sizes else []


def read_tokens(
    worker: ModelWorker, queries: Sequence[Query], layers: Sequence[Layer], found: StoredTokens
) -> dict[str, list[Tokens | Tensor]]:
    """`query_tokens` from storage, or V where that is what was kept; of each file what is asked for alone is read.

    Raises:
        DamagedError: where a file does not hold what was written.
    """
    by_query: dict[str, dict[str, Tokens | Tensor]] = {}
    for name in dict.fromkeys(found.names[query.id] for query in queries):
        mine = [query for query in queries if found.names[query.id] == name]
        there = tensor_shapes(found.store, name)
        wanted = [_keys(query.id, layer, there) for query in mine for layer in layers]
        tensors = read_some(found.store, name, [key for keys in wanted for key in keys])
        each = ([tensors[key].to(worker.device, worker.wide) for key in keys] for keys in wanted)
        for query in mine:
            by_query[query.id] = {layer.name: _gradient(*next(each)) for layer in layers}
    return {layer.name: [by_query[query.id][layer.name] for query in queries] for layer in layers}


def _keys(query_id: str, layer: Layer, there: Container[str]) -> list[str]:
    kinds = "V" if f"{query_id}|{layer.name}|V" in there else "sa"
    return [f"{query_id}|{layer.name}|{kind}" for kind in kinds]


def _gradient(first: Tensor, *rest: Tensor) -> Tokens | Tensor:
    return Tokens(first, *rest) if rest else first


def query_tokens(worker: ModelWorker, queries: Sequence[Query], layers: Sequence[Layer]) -> dict[str, list[Tokens]]:
    """V of every query, by layer and by its tokens.

    Every rank of a group computes all of them, in step; the measurement's signs are in the loss. One token sequence at
    a time: beside others, longer or shorter, a query's gradient would round otherwise.

    Raises:
        QueryError: where a gradient is NaN or infinite.
    """
    found: dict[str, list[Tokens]] = {layer.name: [] for layer in layers}
    for query in queries:
        parts = [part_tokens(worker, part, layers)[1] for part in query.parts]
        for layer in layers:
            found[layer.name].append(joined(layer, parts, worker))
    for name, mine in found.items():
        check_finite(name, queries, torch.stack([one.finite() for one in mine]))
    return found


def part_tokens(worker: ModelWorker, part: Part, layers: Sequence[Layer]) -> tuple[Tensor, dict[str, Tokens]]:
    """One part of a query: its share of -f, signed, [1], and its gradient by layer, the last layer first; without an
    expert that no token goes to."""
    found: dict[str, Tokens] = {}

    def consume(layer: Layer, s: Tensor, a: Tensor, _: Routed | None) -> None:
        s_to, a_ti = s.view(-1, layer.outputs), a.view(-1, layer.inputs)
        found[layer.name] = Tokens(s_to.to(worker.wide), a_ti.to(worker.wide))

    return backward_of_part(worker, part, layers, consume), found


def joined(layer: Layer, parts: Sequence[Mapping[str, Tokens]], worker: ModelWorker) -> Tokens:
    """The layer's tokens of all parts, as `part_tokens` has them; none of an expert that no token goes to."""
    found = [part[layer.name] for part in parts if layer.name in part]
    if not found:
        like = torch.empty(0, dtype=worker.wide, device=worker.device)
        return Tokens(like.new_empty(0, layer.outputs), like.new_empty(0, layer.inputs))
    return Tokens(torch.cat([one.s_to for one in found]), torch.cat([one.a_ti for one in found]))


def backward_of_part(worker: ModelWorker, part: Part, layers: Sequence[Layer], consume: LayerConsumer) -> Tensor:
    """One part of a query forward and back through `layers`; returns its share of -f, signed, [1]."""
    # Nothing from the last measured token on has a gradient.
    ids = np.asarray([part.token_ids[: max(part.positions)]], np.int64)
    targets, weights = np.zeros_like(ids), np.zeros(ids.shape, np.float32)
    at = np.asarray(part.positions)
    # The input position t - 1 predicts token t.
    targets[0, at - 1] = np.asarray(part.token_ids)[at]
    weights[0, at - 1] = part.sign
    batch = Batch(np.arange(1), worker.to_device(ids), worker.to_device(np.ones(ids.shape, np.bool_)))
    return worker.backward(batch, layers, Loss(worker.to_device(targets), worker.to_device(weights)), consume)


def check_finite(layer: str, queries: Sequence[Query], finite_q: Tensor) -> None:
    """Raises QueryError with the first query whose gradient at the layer is not finite."""
    if not bool(finite_q.all()):
        bad = queries[int((~finite_q).nonzero()[0])].id
        raise QueryError(
            f"query {bad!r}: its gradient at {layer} is NaN or infinite; use model.dtype=float32, or leave it out."
        )
