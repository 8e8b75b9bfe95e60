"""The query side: gradients are autograd's, and no query's result depends on the other queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from infscan.config import Compression, DampingConfig, Measure, QueriesConfig, Solver
from infscan.errors import QueryError
from infscan.influence.inverse import from_core, inverse_core
from infscan.influence.layers import Layer
from infscan.influence.layout import (
    Factored,
    QueryBatch,
    SharedBasis,
    Spectrum,
    StoredQueries,
    lay_out,
    plan_layouts,
    query_weights,
)
from infscan.influence.score import score_layer
from infscan.model.worker import ModelWorker
from infscan.queries import Query, read_queries
from infscan.results.tensor_files import read_tensors
from infscan.steps.preconditioner import Preconditioner, layer_factors, preconditioned, query_gradients, query_groups
from infscan.steps.queries import (
    QueryTask,
    SharedBasisTask,
    on_device,
    query_task,
    read_query_batch,
    read_shared_bases,
    shared_basis_task,
)
from infscan.storage import Store
from tests.steps.builders import as_rank, one_rank
from tests.steps.runs import CONTEXT, VOCAB, write_jsonl

ROWS: list[dict[str, Any]] = [
    {"id": "a", "input_ids": [5, 9, 33, 4, 71, 8], "prompt_len": 4},
    {"id": "b", "input_ids": [7, 7, 12], "prompt_len": 1},
    {"id": "c", "input_ids": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], "prompt_len": 9},
    {"id": "d", "input_ids": list(range(1, 41)), "prompt_len": 20},
]


def read(tmp_path: Path, rows: list[dict[str, Any]], measure: Measure = Measure.completion) -> list[Query]:
    path = write_jsonl(tmp_path / f"{measure.value}.jsonl", rows)
    return read_queries(QueriesConfig(str(path), measure), None, vocab_size=VOCAB, context=CONTEXT, bos_id=None)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def autograd(folder: Path, layers: tuple[Layer, ...], terms: list[tuple[list[int], list[int], float]]) -> dict:
    """grad of sum over (ids, measured positions, sign) of sign * -log p, with the biases' as the last column."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for ids, positions, sign in terms:
        logits = model(torch.tensor([ids])).logits[0]
        at = torch.tensor(positions)
        (sign * cross_entropy(logits[at - 1], torch.tensor(ids)[at], reduction="sum")).backward()
    modules = dict(model.named_modules())
    return {
        layer.name: torch.cat([modules[layer.name].weight.grad, modules[layer.name].bias.grad[:, None]], dim=1)
        for layer in layers
    }


def product(tensors: dict[str, Tensor], layer: Layer) -> Tensor:
    """P, or what U and V make of it."""
    if f"{layer.name}|P" in tensors:
        return tensors[f"{layer.name}|P"]
    return tensors[f"{layer.name}|U"] @ tensors[f"{layer.name}|V"].transpose(1, 2)


def folder_of(rank: ModelWorker) -> Path:
    return Path(rank.model.module.config._name_or_path)


@pytest.mark.parametrize("measure", list(Measure))
def test_gradients_are_those_of_autograd(rank: ModelWorker, tmp_path: Path, measure: Measure) -> None:
    queries = read(tmp_path, ROWS[:3], measure)
    wanted = []
    for row in ROWS[:3]:
        ids, positions = row["input_ids"], list(range(row["prompt_len"], len(row["input_ids"])))
        if measure is Measure.tokens:
            wanted += [[(ids, [position], 1.0)] for position in positions]
        else:
            wanted.append([(ids, positions[:1] if measure is Measure.first else positions, 1.0)])
    assert len(queries) == len(wanted)
    found = query_gradients(rank, queries, rank.layers)
    for index, terms in enumerate(wanted):
        for name, gradient in autograd(folder_of(rank), rank.layers, terms).items():
            assert relative(found[name][index], gradient) < 1e-5, (queries[index].id, name)


def test_a_contrast_is_the_difference_of_two_gradients(rank: ModelWorker, tmp_path: Path) -> None:
    [query] = read(tmp_path, [ROWS[0] | {"contrast": [9, 9, 50]}])
    found = query_gradients(rank, [query], rank.layers)
    terms = [([5, 9, 33, 4, 71, 8], [4, 5], 1.0), ([5, 9, 33, 4, 9, 9, 50], [4, 5, 6], -1.0)]
    for name, gradient in autograd(folder_of(rank), rank.layers, terms).items():
        assert relative(found[name][0], gradient) < 1e-5


def test_token_queries_add_up_to_the_completion(rank: ModelWorker, tmp_path: Path) -> None:
    whole = query_gradients(rank, read(tmp_path, ROWS[:1]), rank.layers)
    parts = query_gradients(rank, read(tmp_path, ROWS[:1], Measure.tokens), rank.layers)
    for layer in rank.layers:
        assert relative(parts[layer.name].sum(dim=0), whole[layer.name][0]) < 1e-5


@pytest.mark.parametrize(
    ("width", "compression", "solver"),
    [
        (4, Compression.weighted, Solver.ekfac),
        (4, Compression.plain, Solver.ekfac),
        (4, Compression.plain, Solver.identity),
        (None, Compression.weighted, Solver.ekfac),
    ],
)
def test_another_query_changes_no_bit_of_the_others(
    rank: ModelWorker,
    inverse: Preconditioner,
    tmp_path: Path,
    width: int | None,
    compression: Compression,
    solver: Solver,
) -> None:
    """Longer and shorter ones, before and behind: a query's compressed gradient is its own."""
    store = Store(str(tmp_path / "batch"))
    how = Preconditioner(inverse.factors, solver, inverse.damping)

    def batch(rows: list[dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
        queries = tuple(read(tmp_path, rows))
        tokens = query_task(rank, QueryTask(store, "one", queries, rank.layers, how, width, compression, "print"))
        assert tokens == sum(len(row["input_ids"]) for row in rows)
        tensors = read_tensors(store, "one")
        return {row["id"]: {key: value[index] for key, value in tensors.items()} for index, row in enumerate(rows)}

    alone = {row["id"]: batch([row])[row["id"]] for row in ROWS}
    more = [{"id": f"x{n}", "input_ids": list(range(n + 2, 2 * n + 7)), "prompt_len": 2} for n in range(12)]
    for rows in (ROWS[:2], ROWS[1:], ROWS, [*more, *ROWS]):
        together = batch(rows)
        for row in rows:
            if row["id"] in alone:
                for key, value in alone[row["id"]].items():
                    assert torch.equal(together[row["id"]][key], value), (row["id"], key)


def test_low_rank_only_where_it_is_lower(rank: ModelWorker, inverse: Preconditioner, tmp_path: Path) -> None:
    """At a rank that reaches the smaller side, P is kept whole; below, U V^T comes near it."""
    store, queries = Store(str(tmp_path)), tuple(read(tmp_path, ROWS[:2]))
    full = preconditioned(rank, queries, rank.layers, inverse)
    smaller = max(min(layer.outputs, layer.inputs) for layer in rank.layers)
    for width in (smaller, smaller - 1):
        task = QueryTask(store, f"{width}", queries, rank.layers, inverse, width, Compression.weighted, "print")
        query_task(rank, task)
        tensors = read_tensors(store, f"{width}")
        for layer in rank.layers:
            whole = min(layer.outputs, layer.inputs) <= width
            assert (f"{layer.name}|P" in tensors) == whole
            assert (f"{layer.name}|U" in tensors) == (not whole)
            assert relative(product(tensors, layer), full[layer.name]) < (1e-5 if whole else 0.1)


def test_only_the_first_rank_writes(rank: ModelWorker, inverse: Preconditioner, tmp_path: Path) -> None:
    store, queries = Store(str(tmp_path / "batch")), tuple(read(tmp_path, ROWS[:1]))
    second = as_rank(rank, 1, 2)
    query_task(second, QueryTask(store, "one", queries, rank.layers, inverse, 4, Compression.weighted, "print"))
    assert store.list() == []


def test_groups_are_joined_along_the_queries(rank: ModelWorker, inverse: Preconditioner, tmp_path: Path) -> None:
    store, queries = Store(str(tmp_path / "batch")), tuple(read(tmp_path, ROWS))

    def put(name: str, queries: tuple[Query, ...], layers: tuple[Layer, ...]) -> str:
        query_task(rank, QueryTask(store, name, queries, layers, inverse, 4, Compression.weighted, "print"))
        return name

    whole = read_query_batch(store, [[put("whole", queries, rank.layers)]])
    half = len(rank.layers) // 2
    names = [
        [
            put(f"{number}-a", (query,), rank.layers[:half]),
            put(f"{number}-b", (query,), rank.layers[half:]),
        ]
        for number, query in enumerate(queries)
    ]
    joined = read_query_batch(store, names)
    assert joined.batch.keys() == whole.batch.keys()
    for name, value in whole.batch.items():
        for kind, array in vars(value).items():
            np.testing.assert_array_equal(getattr(joined.batch[name], kind), array)
        for kind, array in vars(whole.spectra[name]).items():
            np.testing.assert_array_equal(getattr(joined.spectra[name], kind), array)


def test_a_gradient_that_is_none_names_query_and_layer(tmp_path: Path) -> None:
    broken = one_rank(tmp_path / "model")
    with torch.no_grad():
        broken.model.module.get_input_embeddings().weight[7] = float("nan")
    with pytest.raises(QueryError, match=r"query 'b': its gradient at gpt_neox\.layers\.0\.mlp\.\w+ is NaN"):
        query_gradients(broken, read(tmp_path, ROWS[:2]), broken.layers)


def test_the_identity_leaves_gradients_alone(rank: ModelWorker, inverse: Preconditioner, tmp_path: Path) -> None:
    queries = read(tmp_path, ROWS)
    identity = Preconditioner(inverse.factors, Solver.identity, DampingConfig())
    plain = query_gradients(rank, queries, rank.layers)
    for name, value in preconditioned(rank, queries, rank.layers, identity).items():
        assert torch.equal(value, plain[name])


_LAYERS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


@given(shapes=_LAYERS, count=st.integers(1, 20), max_bytes=st.integers(1, 40_000))
def test_groups_cover_everything_in_order_and_within_bounds(
    shapes: list[tuple[int, int]], count: int, max_bytes: int
) -> None:
    layers = [Layer(f"l{n}", outputs, inputs, False, f"l{n}") for n, (outputs, inputs) in enumerate(shapes)]
    queries, groups = query_groups(count, layers, max_bytes)
    assert [query for group in queries for query in group] == list(range(count))
    assert [layer for group in groups for layer in group] == layers
    assert all(len(group) for group in queries)
    assert all(groups)
    # Layers are only taken apart where not even one query's gradients fit together.
    whole = 4 * sum(layer.size for layer in layers)
    assert (groups == [tuple(layers)]) or (whole > max_bytes and all(len(group) == 1 for group in queries))
    for group in groups:
        used = 4 * sum(layer.size for layer in group)
        assert used * max(map(len, queries)) <= max_bytes or (len(group) == 1 and max(map(len, queries)) == 1)


def stored(
    rank: ModelWorker,
    inverse: Preconditioner,
    store: Store,
    queries: list[Query],
    how: Compression = Compression.weighted,
) -> StoredQueries:
    """The query batch at rank 6, as it comes from storage."""
    name = f"{len(queries)}-{how.value}"
    query_task(rank, QueryTask(store, name, tuple(queries), rank.layers, inverse, 6, how, "print"))
    return read_query_batch(store, [[name]])


def kept(rank: ModelWorker, found: StoredQueries, energy: float) -> QueryBatch:
    """The query batch with ranks allocated by energy."""
    return lay_out(found.batch, plan_layouts(found.spectra, rank.layers, 512, 0, energy))


def multiplied(rank: ModelWorker, batch: QueryBatch, Q: int) -> dict[str, Tensor]:
    """What every query's columns multiply out to, by layer: [Q, O, I]."""
    found = {name: queries.densify() for name, queries in on_device(rank, batch).items()}
    assert all(len(P_qoi) == Q for P_qoi in found.values())
    return found


@pytest.mark.parametrize("how", list(Compression))
def test_allocated_ranks_keep_the_energy_asked_for_and_the_leading_columns(
    rank: ModelWorker, inverse: Preconditioner, tmp_path: Path, how: Compression
) -> None:
    queries = read(tmp_path, ROWS)
    found = stored(rank, inverse, Store(str(tmp_path / "batch")), queries, how)
    ranks = plan_layouts(found.spectra, rank.layers, 512, 0, 0.5).ranks
    for q in range(len(queries)):
        squares = [np.square(found.spectra[name].values_qr[q, : mine[q]]).sum() for name, mine in ranks.items()]
        assert sum(squares) >= 0.5 * sum(spectrum.totals_q[q] for spectrum in found.spectra.values())
    assert sum(map(sum, ranks.values())) < 6 * len(queries) * len(rank.layers)
    everything = multiplied(rank, kept(rank, found, 1.0), len(queries))
    for name, whole in multiplied(rank, found.batch, len(queries)).items():
        torch.testing.assert_close(everything[name], whole)


def scores(rank: ModelWorker, batch: QueryBatch, seed: int = 0) -> dict[str, Tensor]:
    """Every layer's scores of a few made-up tokens, [B, Q]."""
    queries = on_device(rank, batch)
    made = torch.Generator().manual_seed(seed)
    return {
        layer.name: score_layer(
            torch.randn(3, 5, layer.outputs, generator=made), torch.randn(3, 5, layer.inputs, generator=made), one
        )
        for layer, one in ((layer, queries[layer.name]) for layer in rank.layers)
    }


def many(rank: ModelWorker, inverse: Preconditioner, tmp_path: Path) -> StoredQueries:
    """A query batch of the same four queries 30 times over, which is more than its columns are good for."""
    found = stored(rank, inverse, Store(str(tmp_path / "batch")), read(tmp_path, ROWS))

    def times(array: np.ndarray) -> np.ndarray:
        return np.concatenate([array] * 30)

    return StoredQueries(
        {
            name: Factored(times(one.U_xo), times(one.V_xi), one.ranks * 30)
            for name, one in found.batch.items()
            if isinstance(one, Factored)
        },
        {name: Spectrum(times(one.values_qr), times(one.totals_q)) for name, one in found.spectra.items()},
    )


def test_densified_queries_score_the_same_and_have_the_entries_given_at_most(
    rank: ModelWorker, inverse: Preconditioner, tmp_path: Path
) -> None:
    found = many(rank, inverse, tmp_path)
    expected = scores(rank, found.batch)
    sizes = [120 * layer.size for layer in rank.layers]
    for entries, layers in ((0, 0), (sizes[0], 1), (sum(sizes), len(sizes))):
        plan = plan_layouts(found.spectra, rank.layers, 512, entries)
        assert list(plan.ways.values()).count("dense") == layers
        assert len(plan.over_budget) == len(sizes) - layers
        for name, mine in scores(rank, lay_out(found.batch, plan)).items():
            assert relative(mine, expected[name]) < 1e-5
    # Few queries are cheaper by their columns, whatever fits.
    few = {name: Spectrum(one.values_qr[:1], one.totals_q[:1]) for name, one in found.spectra.items()}
    assert set(plan_layouts(few, rank.layers, 512, sum(sizes)).ways.values()) == {"factored"}


@pytest.mark.parametrize("how", list(Compression))
def test_shared_bases_are_written_where_they_are_cheaper_and_score_as_the_columns(
    rank: ModelWorker, inverse: Preconditioner, tmp_path: Path, how: Compression
) -> None:
    found = many(rank, inverse, tmp_path)
    entries = 120 * sum(layer.size for layer in rank.layers)
    plan = plan_layouts(found.spectra, rank.layers, 512, entries, 1.0, share=True)
    assert list(plan.candidates) == [layer.name for layer in rank.layers]
    weights, batch = query_weights(found.spectra, rank.layers), dict(lay_out(found.batch, plan))
    # The first layer's queries have nothing in common: no basis pair that serves them all is cheap.
    first, made = rank.layers[0].name, np.random.default_rng(0)
    columns = batch[first]
    assert isinstance(columns, Factored)
    U, V = (made.normal(size=side.shape).astype(np.float32) for side in (columns.U_xo, columns.V_xi))
    batch[first] = Factored(U, V, columns.ranks)
    expected, store = scores(rank, batch), Store(str(tmp_path / "joint"))
    names = [(layer, f"joint-{number}.safetensors") for number, layer in enumerate(rank.layers)]
    for layer, name in names:
        task = SharedBasisTask(
            store, name, layer, inverse, how, weights, 1 - 1e-6, 512, plan.candidates[layer.name], "print"
        )
        shape = shared_basis_task(rank, task, batch)
        assert (shape == (0, 0)) is (layer.name == first)
    bases = read_shared_bases(store, names)
    assert list(bases) == [layer.name for layer in rank.layers[1:]]
    plan = plan.with_bases({name: basis.basis for name, basis in bases.items()})
    replaced = lay_out({**batch, **bases}, plan)
    for name, mine in scores(rank, replaced).items():
        assert isinstance(replaced[name], Factored if name == first else SharedBasis)
        assert relative(mine, expected[name]) < 5e-3


def test_a_querys_ranks_do_not_depend_on_the_others(rank: ModelWorker, inverse: Preconditioner, tmp_path: Path) -> None:
    queries, store = read(tmp_path, ROWS), Store(str(tmp_path / "batch"))
    together = multiplied(rank, kept(rank, stored(rank, inverse, store, queries), 0.9), len(queries))
    for index, query in enumerate(queries):
        alone = multiplied(rank, kept(rank, stored(rank, inverse, store / query.id, [query]), 0.9), 1)
        for name, matrix in alone.items():
            assert torch.equal(together[name][index], matrix[0])


def test_a_query_of_many_tokens_has_the_gradient_of_its_matrix(
    rank: ModelWorker, inverse: Preconditioner, tmp_path: Path
) -> None:
    """Rotating tokens or the gradient, whichever is cheaper, comes to the same."""
    [short, long] = read(tmp_path, [ROWS[1], ROWS[3]])
    for query in (short, long):
        V = query_gradients(rank, [query], rank.layers)
        found = preconditioned(rank, [query], rank.layers, inverse)
        for layer in rank.layers:
            known = layer_factors(inverse, layer, rank.device, rank.wide)
            assert known is not None
            expected = from_core(inverse_core(V[layer.name], *known), known[0])
            assert relative(found[layer.name], expected) < 1e-5
