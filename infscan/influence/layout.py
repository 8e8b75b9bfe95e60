"""How a layer's queries are laid out for scoring: the ways, their costs, and the plan of which layer takes which.

factored: every query's own columns, P_q = U_q V_q^T. dense: P_q itself. shared_basis: P_q = B_O K_q B_I^T, with one
basis pair for all queries. `plan_layouts` gives each layer its way; the scan, its check and the estimates of memory and
cost all go by its plan. `score_layer` has the products of each way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.influence.compress import Compressed
from infscan.influence.layers import Layer
from infscan.influence.score import LayerQueries, Scratch

Way = Literal["factored", "dense", "shared_basis"]
Basis = tuple[int, int]  # (m, n) of a shared basis; m = O or n = I: the side has none
# Arrays are numpy's in what a node's ranks share, so that they read one copy; else tensors.
Array = NDArray[Any]
A = TypeVar("A", Array, Tensor)


@dataclass(frozen=True)
class Prices:
    """What a matrix that is formed for every sequence takes beside one long product over all tokens.

    formed: how often each of its multiply-adds counts. moved: multiply-adds in the time that a device's memory takes
    for one entry, which is written, read, and met by one of every query's, read once for so many `sequences`.
    """

    formed: float = 1.0
    moved: float = 0.0
    sequences: int = 1

    def of_entry(self, Q: int, T: float) -> float:
        """Multiply-adds per token and entry of the matrix, T tokens to a sequence."""
        return self.formed * (1 + Q / T) + self.moved * (2 + Q / self.sequences) / T


# Measured on CPU, d = 256 to 1,024: 1.0 to 1.3 for 10 queries and T of 256 or more, 1.4 to 1.9 for 100 or T = 64.
ON_CPU = Prices(1.4)
# bfloat16 on an H100 by its data sheet: 0.6 of 989 TFLOP/s against 3.35 TB/s.
_MOVED = 2 * 0.6 * 989e12 / 2 / 3.35e12


def prices_on(device: str, sequences: int) -> Prices:
    """On a device, with micro-batches of so many sequences."""
    return ON_CPU if device == "cpu" else Prices(1.0, _MOVED, max(1, sequences))


@dataclass(frozen=True, eq=False)
class Factored(Generic[A]):
    """Every query's columns: P_q = U_q V_q^T."""

    U_xo: A  # [sum of ranks, O]: columns in rows, query after query
    V_xi: A  # [sum of ranks, I]
    ranks: tuple[int, ...]  # how many of the rows each query has
    densified: bool = False  # every rank multiplies P out once, in its own dtype, and scores with it

    def leading(self, ranks: tuple[int, ...]) -> Factored[A]:
        """The first so many columns of every query, of columns that all have one rank."""
        if ranks == self.ranks:
            return self
        kept = np.flatnonzero(np.arange(self.ranks[0]) < np.asarray(ranks)[:, None])
        return Factored(self.U_xo[kept], self.V_xi[kept], ranks)


@dataclass(frozen=True, eq=False)
class Dense(Generic[A]):
    """Every query's whole matrix."""

    P_qoi: A  # [Q, O, I]


@dataclass(frozen=True, eq=False)
class SharedBasis(Generic[A]):
    """One basis pair for all queries: P_q = B_O K_q B_I^T. A side without a basis keeps its own coordinates."""

    K_qmn: A  # [Q, m, n]: the queries' cores
    B_mo: A | None = None  # [m, O]: B_O's columns in rows; None: m = O
    B_ni: A | None = None  # [n, I]; None: n = I

    @property
    def basis(self) -> Basis:
        return self.K_qmn.shape[1], self.K_qmn.shape[2]


Layout = Factored[A] | Dense[A] | SharedBasis[A]
QueryBatch = Mapping[str, Layout[Array]]  # by layer name


@dataclass(frozen=True, eq=False)
class Spectrum:
    """What each column of a factored layer contributes, by query (`compress.Compressed`)."""

    values_qr: NDArray[np.floating]  # [Q, r], falling singular values
    totals_q: NDArray[np.float64]  # [Q], the sum of all squares, those left out included

    @property
    def ranks(self) -> tuple[int, ...]:
        """The queries' stored ranks."""
        queries, rank = self.values_qr.shape
        return (rank,) * queries

    @staticmethod
    def largest(queries: int, rank: int) -> Spectrum:
        """The worst case before any gradient is known: all columns contribute alike."""
        return Spectrum(np.ones((queries, rank), np.float32), np.full(queries, float(rank)))


@dataclass(frozen=True)
class StoredQueries:
    """A query batch as its files hold it."""

    batch: QueryBatch  # every query at the stored rank, or dense
    spectra: Mapping[str, Spectrum]  # of the factored layers, by name


def stored_dense(layer: Layer, rank: int | None) -> bool:
    """Whether a query's whole matrix is stored, as no r columns would be fewer; rank None: always."""
    return rank is None or min(layer.outputs, layer.inputs) <= rank


def to_arrays(name: str, queries: Sequence[Compressed | Tensor]) -> dict[str, Tensor]:
    """What a file of the query batch holds of one layer.

    That is U [Q, O, r], V [Q, I, r], values [Q, r] and totals [Q] (`Compressed`), or P [Q, O, I].
    """
    by_query = [{"P": one} if isinstance(one, Tensor) else _columns(one) for one in queries]
    return {f"{name}|{kind}": torch.stack([one[kind] for one in by_query]) for kind in by_query[0]}


def _columns(found: Compressed) -> dict[str, Tensor]:
    total = torch.tensor(found.total, dtype=torch.float64)
    # The widest numbers lie together at a file's front: what planning reads of it is one stretch.
    return {"U": found.U_or, "V": found.V_ir, "values": found.values_r.to(torch.float64), "totals": total}


def from_arrays(groups: Sequence[Mapping[str, Array]]) -> StoredQueries:
    """The query batch that files hold; each group has every layer of some queries, and they are joined in order."""
    batch: dict[str, Layout[Array]] = {}
    spectra: dict[str, Spectrum] = {}

    def joined(key: str) -> Array:
        return np.concatenate([group[key] for group in groups])

    def rows(key: str) -> Array:
        return np.concatenate([columns.T for group in groups for columns in group[key]])

    for name in dict.fromkeys(key.rpartition("|")[0] for key in groups[0]):
        if f"{name}|P" in groups[0]:
            batch[name] = Dense(joined(f"{name}|P"))
            continue
        spectra[name] = Spectrum(joined(f"{name}|values"), joined(f"{name}|totals"))
        batch[name] = Factored(rows(f"{name}|U"), rows(f"{name}|V"), spectra[name].ranks)
    return StoredQueries(batch, spectra)


def basis_to_arrays(found: SharedBasis[A] | None) -> dict[str, A]:
    """What the file of a layer's shared basis holds: nothing where another way is cheaper."""
    if found is None:
        return {}
    arrays = {"K": found.K_qmn, "B_O": found.B_mo, "B_I": found.B_ni}
    return {key: array for key, array in arrays.items() if array is not None}


def basis_from_arrays(arrays: Mapping[str, A]) -> SharedBasis[A] | None:
    return SharedBasis(arrays["K"], arrays.get("B_O"), arrays.get("B_I")) if arrays else None


def multiply_adds(
    O: int, I: int, T: float, Q: int, columns: int, basis: Basis | None = None, prices: Prices = Prices()
) -> dict[Way, float]:
    """Multiply-adds per token by the way of scoring (`score_layer`).

    T: tokens of a sequence that reach the layer. columns: of all queries together. basis: the shared basis's size, if
    there is one. prices: 1 and nothing else, unless they are to be weighted by the time that each kind takes.
    """
    by_matrix = prices.of_entry(Q, T)
    found: dict[Way, float] = {"factored": float(columns * (O + I)), "dense": O * I * by_matrix}
    if basis:
        m, n = basis
        found["shared_basis"] = (m * O if m < O else 0) + (n * I if n < I else 0) + m * n * by_matrix
    return found


def cheapest(costs: Mapping[Way, float]) -> Way:
    """The way of the lowest cost; of equal ones the first."""
    return min(costs, key=costs.__getitem__)


def entry_budget(layers: Sequence[Layer], entries: int) -> dict[str, int]:
    """Each layer's part of so many entries, in proportion to its size O I."""
    whole = sum(layer.size for layer in layers)
    return {layer.name: entries * layer.size // whole for layer in layers}


def smallest_bases(layer: Layer, ranks: Sequence[int]) -> list[Basis]:
    """The smallest bases that could keep every query's columns: on both sides, or on one."""
    O, I, most = layer.outputs, layer.inputs, max(ranks)
    return [(min(most, O), min(most, I)), (O, min(most, I)), (min(most, O), I)]


def shared_basis_pays(
    layer: Layer, ranks: Sequence[int], tokens: int, basis: Basis, entries: int | None = None, prices: Prices = ON_CPU
) -> bool:
    """Whether a basis is cheaper than columns, and than dense matrices unless these have more than so many entries."""
    costs = multiply_adds(layer.outputs, layer.inputs, tokens * layer.share, len(ranks), sum(ranks), basis, prices)
    if entries is not None and len(ranks) * layer.size > entries:
        del costs["dense"]
    return cheapest(costs) == "shared_basis"


def largest_basis(
    layer: Layer, ranks: Sequence[int], tokens: int, entries: int, prices: Prices = ON_CPU
) -> Basis | None:
    """The largest (O, n) that pays and whose cores fit the budget; None if dense matrices fit it, or no basis does."""
    O, Q = layer.outputs, len(ranks)
    if Q * layer.size <= entries:
        return None
    costs = multiply_adds(O, layer.inputs, tokens * layer.share, Q, sum(ranks), (O, 1), prices)
    n = min(entries // (Q * O), int(costs["factored"] // costs["shared_basis"]))
    return (O, n) if n else None


def allocate_ranks(
    spectra: Mapping[str, Spectrum], layers: Sequence[Layer], energy: float
) -> dict[str, tuple[int, ...]]:
    """How many leading columns every query keeps in each factored layer, so that it keeps this share of its squares.

    A query's columns enter by their share per cost (O + I), greedily; all of them where they hold less than `energy`.
    """
    factored = [(layer, spectra[layer.name]) for layer in layers if layer.name in spectra]
    costs = [layer.outputs + layer.inputs for layer, _ in factored]
    by_query = [
        _query_ranks([one.values_qr[q] for _, one in factored], [one.totals_q[q] for _, one in factored], costs, energy)
        for q in range(len(factored[0][1].totals_q) if factored else 0)
    ]
    return {layer.name: tuple(ranks[at] for ranks in by_query) for at, (layer, _) in enumerate(factored)}


def _query_ranks(
    values: Sequence[NDArray[np.floating]], totals: Sequence[float], costs: Sequence[float], energy: float
) -> list[int]:
    """One query's ranks by layer, from each layer's falling values and the sum of all their squares."""
    squares = [np.square(np.asarray(layer, np.float64)) for layer in values]
    owners = np.repeat(np.arange(len(squares)), [len(layer) for layer in squares])
    shares = np.concatenate(squares)
    order = np.argsort(-shares / np.asarray(costs, np.float64)[owners], kind="stable")
    reached = np.cumsum(shares[order])
    needed = int(np.searchsorted(reached, energy * float(np.sum(totals)))) + 1
    ranks: list[int] = np.bincount(owners[order[:needed]], minlength=len(squares)).tolist()
    return ranks


def query_weights(spectra: Mapping[str, Spectrum], layers: Sequence[Layer]) -> NDArray[np.float64]:
    """1 over every query's squares in all factored layers [Q]: with these weights each query counts alike."""
    totals = [spectra[layer.name].totals_q for layer in layers if layer.name in spectra]
    summed = np.sum(totals, axis=0, dtype=np.float64)
    return np.divide(1.0, summed, out=np.zeros_like(summed), where=summed > 0)


@dataclass(frozen=True)
class LayoutPlan:
    """Which layer is scored in which way, and what that takes of the budget."""

    layers: tuple[Layer, ...]
    tokens: int  # T of a sequence
    prices: Prices
    entries: int  # that dense matrices and cores together may have; what is stored dense is not counted
    ranks: Mapping[str, tuple[int, ...]]  # of the factored layers, by name: the columns that each query keeps
    candidates: Mapping[str, int]  # layers where a shared basis may pay, and the entries that its cores may have
    bases: Mapping[str, Basis]  # the shared bases that were found
    ways: Mapping[str, Way]
    used: int  # entries of those that are densified or have a shared basis
    over_budget: tuple[str, ...]  # layers left factored only because their dense matrices did not fit
    times: float  # how many times the weighted cost of dense matrices those layers take

    def with_bases(self, bases: Mapping[str, Basis]) -> LayoutPlan:
        """The plan once shared bases are found: those layers take them, and the others share what is left."""
        return _choose(self.layers, self.tokens, self.prices, self.entries, self.ranks, self.candidates, bases)

    def with_largest_bases(self) -> LayoutPlan:
        """The worst case before any basis is found: every candidate's is as large as it may be."""
        by_name = {layer.name: layer for layer in self.layers}
        found = {
            name: largest_basis(by_name[name], self.ranks[name], self.tokens, entries, self.prices)
            for name, entries in self.candidates.items()
        }
        return self.with_bases({name: basis for name, basis in found.items() if basis})


def plan_layouts(
    spectra: Mapping[str, Spectrum],
    layers: Sequence[Layer],
    tokens: int,
    entries: int,
    energy: float | None = None,
    *,
    share: bool = False,
    prices: Prices = ON_CPU,
) -> LayoutPlan:
    """Give every layer its way: the cheapest one that the budget allows, layer by layer.

    spectra: of the factored layers; the others are stored dense and stay it. tokens: T of a sequence. entries: the
    budget. energy: of every query's squares, what it keeps; None: the stored rank everywhere. share: name the layers
    where a shared basis may pay, for `LayoutPlan.with_bases`. prices: of the device that scores.
    """
    factored = [layer for layer in layers if layer.name in spectra]
    ranks: Mapping[str, tuple[int, ...]] = {layer.name: spectra[layer.name].ranks for layer in factored}
    if energy is not None:
        ranks = allocate_ranks(spectra, factored, energy)
    candidates = _candidates(factored, ranks, tokens, entries, prices) if share else {}
    return _choose(tuple(layers), tokens, prices, entries, ranks, candidates, {})


def _candidates(
    factored: Sequence[Layer], ranks: Mapping[str, tuple[int, ...]], tokens: int, entries: int, prices: Prices
) -> dict[str, int]:
    budgets = entry_budget(factored, entries)

    def may_pay(layer: Layer) -> bool:
        mine = ranks[layer.name]
        return any(
            shared_basis_pays(layer, mine, tokens, basis, prices=prices) for basis in smallest_bases(layer, mine)
        )

    return {layer.name: budgets[layer.name] for layer in factored if may_pay(layer)}


def _choose(
    layers: tuple[Layer, ...],
    tokens: int,
    prices: Prices,
    entries: int,
    ranks: Mapping[str, tuple[int, ...]],
    candidates: Mapping[str, int],
    bases: Mapping[str, Basis],
) -> LayoutPlan:
    used = sum(len(ranks[name]) * m * n for name, (m, n) in bases.items())
    ways: dict[str, Way] = {}
    over: dict[str, tuple[float, float]] = {}
    for layer in layers:
        name = layer.name
        ways[name] = "shared_basis" if name in bases else "factored" if name in ranks else "dense"
        if ways[name] != "factored":
            continue
        columns = sum(ranks[name])
        T, Q = tokens * layer.share, len(ranks[name])
        costs = multiply_adds(layer.outputs, layer.inputs, T, Q, columns, prices=prices)
        if costs["factored"] <= costs["dense"]:
            continue
        size = len(ranks[name]) * layer.size
        if used + size <= entries:
            ways[name], used = "dense", used + size
        else:
            over[name] = costs["factored"], costs["dense"]
    times = sum(cost for cost, _ in over.values()) / sum(cost for _, cost in over.values()) if over else 1.0
    return LayoutPlan(layers, tokens, prices, entries, ranks, candidates, bases, ways, used, tuple(over), times)


def lay_out(batch: QueryBatch, plan: LayoutPlan) -> QueryBatch:
    """The query batch as planned: ranks as allocated, and what is to be densified marked so."""

    def planned(layer: Layer) -> Layout[Array]:
        layout = batch[layer.name]
        if not isinstance(layout, Factored):
            return layout
        return replace(layout.leading(plan.ranks[layer.name]), densified=plan.ways[layer.name] == "dense")

    return {layer.name: planned(layer) for layer in plan.layers}


def without_content(plan: LayoutPlan, queries: int, dtype: torch.dtype) -> dict[str, Layout[Tensor]]:
    """A query batch of this plan's shapes on the meta device, for sizing."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def planned(layer: Layer) -> Layout[Tensor]:
        O, I, way = layer.outputs, layer.inputs, plan.ways[layer.name]
        if way == "dense":
            return Dense(empty(queries, O, I))
        if way == "shared_basis":
            m, n = plan.bases[layer.name]
            return SharedBasis(empty(queries, m, n), empty(m, O) if m < O else None, empty(n, I) if n < I else None)
        ranks = plan.ranks[layer.name]
        return Factored(empty(sum(ranks), O), empty(sum(ranks), I), ranks)

    return {layer.name: planned(layer) for layer in plan.layers}


def on_device(
    batch: Mapping[str, Layout[A]],
    layers: Sequence[Layer],
    device: str,
    dtype: torch.dtype,
    scratch: Scratch | None = None,
) -> dict[str, LayerQueries]:
    """The query batch as `score_layer` takes it. dtype: of products with tokens. scratch: of all layers."""

    def laid_out(layer: Layer, layout: Layout[A]) -> LayerQueries:
        if isinstance(layout, Dense):
            return LayerQueries.dense(tensor(layout.P_qoi), scratch, bias=layer.bias)
        if isinstance(layout, SharedBasis):
            B_mo, B_ni = (None if basis is None else tensor(basis) for basis in (layout.B_mo, layout.B_ni))
            return LayerQueries.shared_basis(tensor(layout.K_qmn), B_mo, B_ni, scratch, bias=layer.bias)
        columns = LayerQueries.factored(tensor(layout.U_xo), tensor(layout.V_xi), layout.ranks)
        return LayerQueries.dense(columns.densify(), scratch, bias=layer.bias) if layout.densified else columns

    def tensor(array: A) -> Tensor:
        return to_tensor(array, device, dtype)

    return {layer.name: laid_out(layer, batch[layer.name]) for layer in layers}


def to_tensor(array: A, device: str, dtype: torch.dtype) -> Tensor:
    """On the device; of an array, which a node's ranks may share and only read, a copy."""
    if isinstance(array, Tensor):
        return array.to(device, dtype)
    found = torch.from_numpy(array.copy())
    return (found.view(torch.bfloat16) if array.dtype == np.int16 else found).to(device, dtype)


def as_array(tensor: Tensor, dtype: torch.dtype) -> Array:
    """Of this dtype. numpy has no bfloat16: its bits stand there as int16, and `to_tensor` takes them so."""
    found = tensor.to(dtype).contiguous()
    return (found.view(torch.int16) if dtype is torch.bfloat16 else found).numpy()
