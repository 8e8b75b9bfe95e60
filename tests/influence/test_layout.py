"""Layouts: ranks keep what is asked for, plans keep to their budget and take the cheapest way that it allows."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.influence.compress import compress
from infscan.influence.layers import Layer
from infscan.influence.layout import (
    ON_CPU,
    Dense,
    Factored,
    LayoutPlan,
    SharedBasis,
    Spectrum,
    allocate_ranks,
    basis_from_arrays,
    basis_to_arrays,
    cheapest,
    from_arrays,
    lay_out,
    multiply_adds,
    on_device,
    plan_layouts,
    prices_on,
    shared_basis_pays,
    smallest_bases,
    to_arrays,
    without_content,
)
from tests.influence.factors import normal

_LAYERS = st.lists(
    st.tuples(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.floats(0.0, 1.0), st.integers(1, 50)),
    min_size=1,
    max_size=5,
)


def layer_of(name: str, outputs: int, inputs: int, bias: bool = False) -> Layer:
    return Layer(name, outputs, inputs, bias, name)


def one_query(values: list[np.ndarray], totals: list[float], costs: list[int], kept: float) -> list[int]:
    """The ranks of a query alone, of layers whose columns have these costs."""
    layers = [layer_of(f"l{n}", cost, 0) for n, cost in enumerate(costs)]
    spectra = {
        layer.name: Spectrum(found[None], np.asarray([total]))
        for layer, found, total in zip(layers, values, totals, strict=True)
    }
    return [rank for (rank,) in allocate_ranks(spectra, layers, kept).values()]


def read(layers: list[tuple[list[float], float, int]]) -> tuple[list[np.ndarray], list[float], list[int]]:
    values = [np.asarray(sorted(layer, reverse=True)) for layer, _, _ in layers]
    totals = [float(np.square(found).sum()) + rest for found, (_, rest, _) in zip(values, layers, strict=True)]
    return values, totals, [cost for _, _, cost in layers]


@given(layers=_LAYERS, kept=st.floats(0.05, 1.0))
def test_what_is_asked_for_is_kept_and_the_last_column_was_needed(layers: list, kept: float) -> None:
    values, totals, costs = read(layers)
    ranks = one_query(values, totals, costs, kept)
    shares = [np.square(found) for found in values]
    have = sum(layer[:rank].sum() for layer, rank in zip(shares, ranks, strict=True))
    wanted = kept * sum(totals)
    everything = sum(map(len, values)) == sum(ranks)
    assert have >= wanted * (1 - 1e-12) or everything
    # Of the columns that entered, the one that brings least for its cost was still needed.
    last = [
        (layer[rank - 1] / cost, layer[rank - 1])
        for layer, rank, cost in zip(shares, ranks, costs, strict=True)
        if rank
    ]
    least = min(last)[1]
    assert have - least < wanted * (1 + 1e-12) or len(set(last)) < len(last)


@given(layers=_LAYERS, kept=st.floats(0.05, 1.0), factor=st.sampled_from([0.25, 4.0]))
def test_a_querys_scale_is_no_matter(layers: list, kept: float, factor: float) -> None:
    values, totals, costs = read(layers)
    scaled = one_query([found * factor for found in values], [total * factor**2 for total in totals], costs, kept)
    assert scaled == one_query(values, totals, costs, kept)


def test_cheap_columns_come_first_and_nothing_stays_out_that_is_needed() -> None:
    values = [np.asarray([2.0, 1.0]), np.asarray([2.0, 1.0])]
    assert one_query(values, [5.0, 5.0], [1, 10], 0.4) == [1, 0]
    assert one_query(values, [5.0, 5.0], [1, 10], 0.5) == [2, 0]
    assert one_query(values, [5.0, 5.0], [1, 10], 0.9) == [2, 1]
    assert one_query(values, [5.0, 5.0], [1, 10], 1.0) == [2, 2]


@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_a_query_without_a_gradient_needs_one_column_at_most(kept: float) -> None:
    assert sum(one_query([np.zeros(3), np.zeros(2)], [0.0, 0.0], [1, 1], kept)) <= 1


def test_the_cheapest_way_is_factored_for_few_queries_and_a_shared_basis_for_many() -> None:
    O, I, T, rank = 512, 2048, 256, 16
    counts = (1, 10, 100, 1000)
    ways = [cheapest(multiply_adds(O, I, T, Q, Q * rank, (128, 128), ON_CPU)) for Q in counts]
    assert ways == ["factored", "shared_basis", "shared_basis", "shared_basis"]
    ways = [cheapest(multiply_adds(O, I, T, Q, Q * rank, prices=ON_CPU)) for Q in counts]
    assert ways == ["factored", "factored", "dense", "dense"]
    # Without a basis on either side it is the same; and with one on one side, only that one projects.
    assert cheapest(multiply_adds(O, I, T, 1000, 1000 * rank, (O, I), ON_CPU)) == "dense"
    costs = multiply_adds(O, I, T, 1000, 1000 * rank, (O, 100))
    assert costs["shared_basis"] == 100 * I + O * 100 * (1 + 1000 / T)
    costs = multiply_adds(O, I, T, 1000, 1000 * rank, (100, 100))
    assert costs["shared_basis"] == 100 * (O + I) + 100 * 100 * (1 + 1000 / T)
    assert smallest_bases(layer_of("l", O, I), [2, 1, 0]) == [(2, 2), (O, 2), (2, I)]


def test_a_gpu_pays_for_what_its_memory_moves() -> None:
    """By hand: per entry of g one write and one read, and every query's entry read once for a micro-batch's sequences,
    over T tokens; 177 multiply-adds in the time of one."""
    prices = prices_on("cuda", 8)
    assert prices.moved == pytest.approx(0.6 * 989 / 3.35, rel=1e-6)
    O, I, T, Q = 768, 2048, 512, 256
    costs = multiply_adds(O, I, T, Q, Q * 32, prices=prices)
    assert costs["dense"] == pytest.approx(O * I * (1.5 + 177.1 * (2 + 32) / 512), rel=1e-3)
    # Matrices that a CPU would score so many queries by cost a GPU more than columns of rank 8.
    few = [cheapest(multiply_adds(O, I, T, Q, Q * 8, prices=one)) for one in (ON_CPU, prices)]
    assert few == ["dense", "factored"]
    # The more sequences share them, the less; on a CPU it is all the same.
    dense = [multiply_adds(O, I, T, Q, 0, prices=prices_on("cuda", B))["dense"] for B in (0, 1, 4, 64)]
    assert dense[0] == dense[1] > dense[2] > dense[3]
    assert prices_on("cpu", 1) == prices_on("cpu", 64) == ON_CPU


@st.composite
def problems(draw: st.DrawFn) -> dict:
    """What a layout is planned from: random layers, some of them stored dense, random spectra, any budget."""
    queries, rank = draw(st.integers(1, 200)), draw(st.integers(1, 6))
    shapes = draw(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6))
    layers = [layer_of(f"l{n}", *shape) for n, shape in enumerate(shapes)]
    made = np.random.default_rng(draw(st.integers(0, 99)))
    spectra = {}
    for layer in layers:
        if min(layer.outputs, layer.inputs) > rank:
            values = np.sort(made.random((queries, rank)), axis=1)[:, ::-1]
            spectra[layer.name] = Spectrum(values, np.square(values).sum(axis=1) * 1.1)
    whole = queries * sum(layer.size for layer in layers)
    return {
        "spectra": spectra,
        "layers": layers,
        "tokens": draw(st.sampled_from([1, 8, 64, 512])),
        "entries": draw(st.integers(0, 2 * whole)),
        "energy": draw(st.one_of(st.none(), st.floats(0.1, 1.0))),
        "share": draw(st.booleans()),
        "prices": prices_on(draw(st.sampled_from(["cpu", "cuda"])), draw(st.integers(0, 16))),
    }


def found_bases(plan: LayoutPlan, seed: int) -> dict[str, tuple[int, int]]:
    """Bases as ranks may find them: of any size that pays and keeps to its layer's entries, in some candidates."""
    made, bases = np.random.default_rng(seed), {}
    for layer in plan.layers:
        ranks = plan.ranks.get(layer.name, ())
        basis = (int(made.integers(1, layer.outputs + 1)), int(made.integers(1, layer.inputs + 1)))
        entries = plan.candidates.get(layer.name, 0)
        fits = len(ranks) * basis[0] * basis[1] <= entries
        if fits and entries and shared_basis_pays(layer, ranks, plan.tokens, basis, entries, plan.prices):
            bases[layer.name] = basis
    return bases


def plans(problem: dict, seed: int) -> list[LayoutPlan]:
    first = plan_layouts(**problem)
    return [first, first.with_bases(found_bases(first, seed)), first.with_largest_bases()]


@settings(deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_a_plan_never_exceeds_its_budget(problem: dict, seed: int) -> None:
    for plan in plans(problem, seed):
        used = 0
        for layer in plan.layers:
            if layer.name in plan.ranks:
                m, n = plan.bases.get(layer.name, (layer.outputs, layer.inputs))
                used += len(plan.ranks[layer.name]) * m * n * (plan.ways[layer.name] != "factored")
        assert plan.used == used <= plan.entries


@settings(deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_every_layer_takes_the_cheapest_way_that_the_budget_allows(problem: dict, seed: int) -> None:
    for plan in plans(problem, seed):
        left = plan.entries - sum(len(plan.ranks[name]) * m * n for name, (m, n) in plan.bases.items())
        over = []
        for layer in plan.layers:
            name, way = layer.name, plan.ways[layer.name]
            if name not in plan.ranks:
                assert way == "dense"
                continue
            ranks, basis = plan.ranks[name], plan.bases.get(name)
            costs = multiply_adds(
                layer.outputs, layer.inputs, plan.tokens, len(ranks), sum(ranks), basis, problem["prices"]
            )
            size = len(ranks) * layer.size
            if basis:
                assert way == "shared_basis"
                assert name in plan.candidates
                assert costs["shared_basis"] < costs["factored"] or sum(ranks) == 0
                continue
            admissible = {one: cost for one, cost in costs.items() if one != "dense" or size <= left}
            assert costs[way] == min(admissible.values())
            left -= size * (way == "dense")
            over += [costs] * (costs[way] > costs["dense"])
        assert len(over) == len(plan.over_budget)
        expected = sum(cost["factored"] for cost in over) / sum(cost["dense"] for cost in over) if over else 1.0
        assert plan.times == pytest.approx(expected)


@settings(deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_a_plan_is_a_function_of_its_inputs(problem: dict, seed: int) -> None:
    assert plans(problem, seed) == plans(problem, seed)
    # Which layer a spectrum comes with is settled by name.
    turned = problem | {"spectra": dict(reversed(problem["spectra"].items()))}
    assert plans(turned, seed) == plans(problem, seed)


@settings(deadline=None)
@given(problem=problems(), more=st.integers(0, 10_000))
def test_more_room_leaves_no_more_layers_over_budget_and_all_room_none(problem: dict, more: int) -> None:
    whole = sum(len(spectrum.ranks) for spectrum in problem["spectra"].values()) * 1600
    assert plan_layouts(**problem | {"entries": whole}).over_budget == ()
    plan = plan_layouts(**problem | {"entries": 0})
    assert {plan.ways[name] for name in plan.ranks} <= {"factored"}
    assert not plan_layouts(**problem | {"share": False}).candidates


@settings(deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_what_is_sized_without_content_has_the_shapes_of_what_is_laid_out(problem: dict, seed: int) -> None:
    queries = len(next(iter(problem["spectra"].values())).ranks) if problem["spectra"] else 3
    for plan in plans(problem, seed):
        sized = on_device(without_content(plan, queries, torch.float32), plan.layers, "meta", torch.float32)
        batch = lay_out(stored(plan, problem["spectra"], queries), plan)
        for layer in plan.layers:
            wanted, found = sized[layer.name], on_device(batch, [layer], "cpu", torch.float32)[layer.name]
            if plan.ways[layer.name] == "factored":
                assert wanted.ranks == found.ranks == plan.ranks[layer.name]
                shapes = [[part.shape for part in (*one.U_parts, *one.V_parts)] for one in (wanted, found)]
            else:
                shapes = [[one.K_qmn.shape] for one in (wanted, found) if one.K_qmn is not None]
            assert len(shapes) == 2
            assert shapes[0] == shapes[1]


def stored(plan: LayoutPlan, spectra: dict[str, Spectrum], queries: int) -> dict:
    """The query batch that a plan is of, zeros all over, with the bases that it names."""
    batch: dict = {}
    for layer in plan.layers:
        name, O, I = layer.name, layer.outputs, layer.inputs
        if name in plan.bases:
            m, n = plan.bases[name]
            batch[name] = SharedBasis(np.zeros((queries, m, n)), np.zeros((m, O)), np.zeros((n, I)))
        elif name in spectra:
            ranks = spectra[name].ranks
            batch[name] = Factored(np.zeros((sum(ranks), O)), np.zeros((sum(ranks), I)), ranks)
        else:
            batch[name] = Dense(np.zeros((queries, O, I)))
    return batch


def test_leading_columns_are_each_querys_own() -> None:
    U, V = np.arange(18.0).reshape(6, 3), np.arange(12.0).reshape(6, 2)
    columns = Factored(U, V, (3, 3))
    found = columns.leading((2, 1))
    np.testing.assert_array_equal(found.U_xo, U[[0, 1, 3]])
    np.testing.assert_array_equal(found.V_xi, V[[0, 1, 3]])
    assert found.ranks == (2, 1)
    assert columns.leading((3, 3)) is columns


def test_arrays_come_back_as_they_went_group_after_group() -> None:
    low = [compress(normal(n, 5, 4), 2) for n in range(3)]
    whole = [normal(n, 2, 3) for n in range(3)]
    groups = [to_arrays("a", low[some]) | to_arrays("b", whole[some]) for some in (slice(0, 2), slice(2, 3))]
    assert {key: tuple(value.shape) for key, value in groups[0].items()} == {
        "a|U": (2, 5, 2), "a|V": (2, 4, 2), "a|values": (2, 2), "a|totals": (2,), "b|P": (2, 2, 3),
    }  # fmt: skip
    found = from_arrays([{key: value.numpy() for key, value in group.items()} for group in groups])
    columns, matrices = found.batch["a"], found.batch["b"]
    assert isinstance(columns, Factored)
    assert isinstance(matrices, Dense)
    assert columns.ranks == found.spectra["a"].ranks == (2, 2, 2)
    assert list(found.spectra) == ["a"]
    np.testing.assert_array_equal(columns.U_xo, np.concatenate([one.U_or.T for one in low]))
    np.testing.assert_array_equal(columns.V_xi, np.concatenate([one.V_ir.T for one in low]))
    np.testing.assert_array_equal(matrices.P_qoi, np.stack([one.numpy() for one in whole]))
    np.testing.assert_array_equal(found.spectra["a"].totals_q, [one.total for one in low])


def test_a_shared_basis_comes_back_and_nothing_is_none() -> None:
    K, B_ni = normal(0, 2, 5, 2), normal(1, 2, 4)
    found = basis_from_arrays(basis_to_arrays(SharedBasis(K, None, B_ni)))
    assert found is not None
    assert found.K_qmn is K
    assert found.B_mo is None
    assert found.B_ni is B_ni
    assert found.basis == (5, 2)
    assert basis_from_arrays(basis_to_arrays(None)) is None


def test_a_batch_travels_without_a_copy_of_its_arrays() -> None:
    """As Ray sends it: arrays go beside the pickle, and are read where they are."""
    batch = {"a": Factored(np.ones((4, 3)), np.ones((4, 2)), (2, 2)), "b": Dense(np.ones((2, 3, 3)))}
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(batch, protocol=5, buffer_callback=buffers.append)
    found = pickle.loads(data, buffers=buffers)
    assert np.shares_memory(found["a"].U_xo, batch["a"].U_xo)
    assert np.shares_memory(found["b"].P_qoi, batch["b"].P_qoi)


def test_densified_columns_are_scored_as_the_matrices_that_they_are() -> None:
    layer = layer_of("a", 5, 4, bias=True)
    low = [compress(normal(n, 5, 4), 2) for n in range(3)]
    columns = from_arrays([{key: value.numpy() for key, value in to_arrays("a", low).items()}]).batch["a"]
    assert isinstance(columns, Factored)
    found = on_device({"a": replace(columns, densified=True)}, [layer], "cpu", torch.float64)["a"]
    assert found.K_qm is not None
    expected = torch.stack([one.U_or @ one.V_ir.T for one in low])
    torch.testing.assert_close(found.densify(), expected)
