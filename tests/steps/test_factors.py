"""Fitting in tasks: slices add up to the whole, labels belong to sequences, and partial sums to their eigenbases."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from infscan.config import Compression, DampingConfig, Dtype, Labels, ModelConfig
from infscan.corpus.addressable import CorpusAddress, PreparedCorpus
from infscan.corpus.plan import Selection
from infscan.engine.in_process import InProcessExecutor
from infscan.errors import DamagedError, FactorsError
from infscan.influence.blocks import block_sizes
from infscan.model.architecture import describe
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Part, Query
from infscan.results.tensor_files import read_facts, read_tensors, write_tensors
from infscan.steps.check import CheckTask, check_task
from infscan.steps.eigenbases import decompose_layer, eigenbases_digest, finish_layer
from infscan.steps.factor_files import FactorsPlan, labels_path, partial_path, read_layer_factors
from infscan.steps.factors import covariance_task, fit_factors, lambda_task, slice_bounds
from infscan.steps.preconditioner import preconditioned, query_gradients
from infscan.steps.queries import QueryTask, query_task, read_query_batch
from infscan.storage import MissingError, Store
from tests.influence.factors import diagonal_blocks
from tests.steps.builders import fit, fit_in_pieces, fit_plan, fit_tasks, one_rank
from tests.steps.runs import tiny_model

Stores = Callable[[str], Store]


@pytest.fixture
def at(tmp_path: Path) -> Stores:
    return lambda name: Store(str(tmp_path / name))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def draw(rank: ModelWorker, store: Store, corpus: PreparedCorpus, plan: FactorsPlan) -> None:
    for task in fit_tasks(store, corpus, plan, Labels.sampled, draw=True):
        covariance_task(rank, task)


def labels(store: Store, plan: FactorsPlan, corpus: PreparedCorpus) -> list[list[int]]:
    """Each sequence's labels, whatever the slices."""
    found = []
    for index, (start, stop) in enumerate(plan.slices):
        rows = read_tensors(store, labels_path(index))["labels"].tolist()
        for row, sequence in zip(rows, corpus.read(plan.selection.ids(start, stop)), strict=True):
            assert not any(row[len(sequence) :])
            found.append(row[: len(sequence)])
    return found


@given(size=st.integers(0, 3000), slices=st.integers(1, 50))
def test_slices_cut_everything_into_near_equal_pieces(size: int, slices: int) -> None:
    bounds = slice_bounds(size, slices)
    assert len(bounds) == min(size, slices)
    assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])][: len(bounds)]
    assert all(stop == start for (_, stop), (start, _) in pairwise(bounds))
    if size:
        assert (bounds[0][0], bounds[-1][1]) == (0, size)
        sizes = [stop - start for start, stop in bounds]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 2


def test_a_rank_decomposes_what_a_process_of_its_own_does(
    rank: ModelWorker, corpus: PreparedCorpus, at: Stores
) -> None:
    """As ranks with a GPU do, here on a CPU."""
    plan = fit_plan(rank, corpus)
    executor = InProcessExecutor.on(rank)
    for name, gpus in (("apart", 0), ("rank", 1)):
        fit_factors(executor, at(name), corpus, plan, Labels.empirical, 0, gpus=gpus)
    files = [entry.name for entry in at("apart").list(suffix=".safetensors")]
    assert any(name.startswith("S/") for name in files)
    assert [at("rank").read(name) for name in files] == [at("apart").read(name) for name in files]


def test_labels_are_stored_and_drawn_alike_again(rank: ModelWorker, corpus: PreparedCorpus, at: Stores) -> None:
    plan = fit_plan(rank, corpus, slices=2)
    draw(rank, at("a"), corpus, plan)
    first = [at("a").read(labels_path(index)) for index in range(2)]
    sums = at("a").read(partial_path("covariance", 0, 1))
    # Again where they are, and in another place.
    for name in ("a", "b"):
        draw(rank, at(name), corpus, plan)
        assert [at(name).read(labels_path(index)) for index in range(2)] == first
        assert at(name).read(partial_path("covariance", 0, 1)) == sums
    assert len({tuple(row) for row in labels(at("a"), plan, corpus)}) > 1


@pytest.mark.parametrize("cut", [{"tokens_per_batch": 64}, {"slices": 3}, {"slices": 5, "tokens_per_batch": 1000}])
def test_labels_belong_to_sequences_not_to_the_cut(
    rank: ModelWorker, corpus: PreparedCorpus, at: Stores, cut: dict[str, int]
) -> None:
    whole, other = fit_plan(rank, corpus), fit_plan(rank, corpus, **cut)
    draw(rank, at("whole"), corpus, whole)
    draw(rank, at("other"), corpus, other)
    assert labels(at("other"), other, corpus) == labels(at("whole"), whole, corpus)


def test_labels_of_another_attempt_void_this_one(rank: ModelWorker, corpus: PreparedCorpus, at: Stores) -> None:
    """The sums must belong to the labels in storage, so a partial made with others is not written."""
    plan = fit_plan(rank, corpus)
    write_tensors(at("a"), labels_path(0), {"labels": torch.ones(corpus.sequences, 64, dtype=torch.int32)})
    with pytest.raises(RuntimeError, match="drawn by another attempt"):
        draw(rank, at("a"), corpus, plan)
    assert at("a").list("covariance") == []


def test_stored_labels_are_read_where_none_are_drawn(rank: ModelWorker, corpus: PreparedCorpus, at: Stores) -> None:
    plan = fit_plan(rank, corpus)
    draw(rank, at("a"), corpus, plan)
    drawn = at("a").read(partial_path("covariance", 0, 0))
    [task] = fit_tasks(at("a"), corpus, plan, Labels.sampled)
    covariance_task(rank, task)
    assert at("a").read(partial_path("covariance", 0, 0)) == drawn
    [task] = fit_tasks(at("none"), corpus, plan, Labels.sampled)
    with pytest.raises(MissingError, match=r"labels/slice-0000"):
        covariance_task(rank, task)


def test_labels_depend_on_the_seed_and_the_sequence_alone(
    rank: ModelWorker, corpus: PreparedCorpus, at: Stores
) -> None:
    """Not on which other sequences the factors are fitted on, nor on which layers are tracked."""
    whole = fit_plan(rank, corpus)
    draw(rank, at("whole"), corpus, whole)
    wanted = labels(at("whole"), whole, corpus)
    some = replace(whole, selection=Selection.of(corpus.sequences, 7, 3), slices=((0, 4), (4, 7)))
    draw(rank, at("some"), corpus, some)
    assert labels(at("some"), some, corpus) == [wanted[n] for n in some.selection.ids()]
    fewer = replace(whole, layers=rank.layers[1:2], groups=((rank.layers[1].name,),))
    draw(rank, at("fewer"), corpus, fewer)
    assert labels(at("fewer"), fewer, corpus) == wanted
    for task in fit_tasks(at("seed"), corpus, whole, Labels.sampled, draw=True):
        covariance_task(rank, replace(task, seed=task.seed + 1))
    assert labels(at("seed"), whole, corpus) != wanted


@pytest.mark.parametrize("kind", list(Labels))
@pytest.mark.parametrize("cut", [{"slices": 3}, {"slices": 3, "group_bytes": 60_000}])
def test_slices_and_layer_groups_add_up_to_the_whole(
    rank: ModelWorker, corpus: PreparedCorpus, at: Stores, kind: Labels, cut: dict[str, int]
) -> None:
    whole, pieces = fit_plan(rank, corpus), fit_plan(rank, corpus, **cut)
    assert (len(pieces.groups) > 1) == ("group_bytes" in cut)
    fit(rank, at("whole"), corpus, whole, kind)
    # Lambda is compared in one and the same basis: eigenvectors turn where A and S differ in their last bits.
    for task in fit_tasks(at("pieces"), corpus, pieces, kind, draw=kind is Labels.sampled):
        covariance_task(rank, task)
    for layer in rank.layers:
        decompose_layer(at("pieces"), pieces, layer)
        ours, theirs = (read_tensors(at(name), f"S/{layer.name}.safetensors")["S"] for name in ("pieces", "whole"))
        assert relative(ours, theirs) < 1e-6
        ours, theirs = (read_tensors(at(name), f"A/{layer.name}.safetensors")["A"] for name in ("pieces", "whole"))
        assert relative(ours, theirs) < 1e-6
    for folder in ("A", "S"):
        for entry in at("whole").list(folder):
            at("pieces").write(entry.name, at("whole").read(entry.name))
    rank.forget()
    for task in fit_tasks(at("pieces"), corpus, pieces, kind):
        lambda_task(rank, task)
    for layer in rank.layers:
        finish_layer(at("pieces"), pieces, layer)
        ours, theirs = (read_layer_factors(at(name), layer).Lambda for name in ("pieces", "whole"))
        assert relative(ours, theirs) < 1e-6


def test_tasks_report_and_record_their_tokens(rank: ModelWorker, corpus: PreparedCorpus, at: Stores) -> None:
    plan = fit_plan(rank, corpus, slices=3)
    tokens = [covariance_task(rank, task) for task in fit_tasks(at("a"), corpus, plan, Labels.empirical)]
    assert sum(tokens) == corpus.tokens
    recorded = [int(read_tensors(at("a"), partial_path("covariance", 0, n))["tokens"]) for n in range(3)]
    assert recorded == tokens


def test_a_partial_of_other_eigenbases_is_refused(rank: ModelWorker, corpus: PreparedCorpus, at: Stores) -> None:
    plan, store, layer = fit_plan(rank, corpus, slices=2), at("a"), rank.layers[0]
    fit_in_pieces(rank, store, corpus, plan)
    path = partial_path("lambda", 0, 1)
    assert read_facts(store, path)["eigenbases"] == eigenbases_digest(store, plan.group(0))
    write_tensors(store, path, read_tensors(store, path), {"eigenbases": "of another fit"})
    store.remove(f"Lambda/{layer.name}.safetensors")
    with pytest.raises(
        DamagedError, match=r"lambda/group-000-slice-0001\.safetensors is damaged \(it was summed in oth"
    ):
        finish_layer(store, plan, layer)
    assert not store.exists(f"Lambda/{layer.name}.safetensors")


def test_eigenbases_are_created_once(rank: ModelWorker, corpus: PreparedCorpus, at: Stores) -> None:
    """A second decomposition, of other sums, changes nothing: Lambda belongs to the first."""
    plan, layer = fit_plan(rank, corpus), rank.layers[0]
    fit_in_pieces(rank, at("a"), corpus, plan)
    before = at("a").read(f"S/{layer.name}.safetensors")
    path = partial_path("covariance", 0, 0)
    tensors = read_tensors(at("a"), path)
    write_tensors(at("a"), path, tensors | {f"S|{layer.name}": 2 * tensors[f"S|{layer.name}"]})
    decompose_layer(at("a"), plan, layer)
    assert at("a").read(f"S/{layer.name}.safetensors") == before


def test_layers_with_one_input_share_one_a(corpus: PreparedCorpus, at: Stores, tmp_path: Path) -> None:
    """Llama's gate and up, cut into different layer groups: A is summed by its leader alone, and both are finished."""
    llama = one_rank(tmp_path / "model", family="llama")
    shared = [layer for layer in llama.layers if layer.input_of != layer.name]
    assert shared
    smallest = max(4 * (layer.inputs**2 + layer.outputs**2 + layer.size) for layer in llama.layers)
    plan = fit_plan(llama, corpus, group_bytes=smallest)
    assert len(plan.groups) == len(llama.layers)
    fit(llama, at("pieces"), corpus, plan)
    fit(llama, at("whole"), corpus, fit_plan(llama, corpus))
    for layer in llama.layers:
        assert at("pieces").exists(f"A/{layer.name}.safetensors") == (layer not in shared)
        ours, theirs = (read_layer_factors(at(name), layer) for name in ("pieces", "whole"))
        for mine, other in ((ours.A, theirs.A), (ours.S, theirs.S)):
            assert relative(mine.dense(), other.dense()) < 1e-5
        assert relative(ours.Lambda, theirs.Lambda) < 1e-5


@pytest.mark.parametrize("blocks", [2, 3])
def test_blocks_are_cut_out_of_the_whole_and_drop_no_gradient(
    rank: ModelWorker, corpus: PreparedCorpus, at: Stores, blocks: int
) -> None:
    """A and S are the whole ones' diagonal blocks; Lambda, in any orthonormal basis, adds up to the mean of |g|^2."""
    whole, cut = fit_plan(rank, corpus), fit_plan(rank, corpus, slices=2, group_bytes=60_000, blocks=blocks)
    assert len(cut.groups) > 1
    fit(rank, at("whole"), corpus, whole)
    fit(rank, at("cut"), corpus, cut)
    for layer in rank.layers:
        ours, theirs = (read_layer_factors(at(name), layer) for name in ("cut", "whole"))
        for mine, values, basis, other in (
            (ours.A, ours.A_eigenvalues, ours.Q_A, theirs.A),
            (ours.S, ours.S_eigenvalues, ours.Q_S, theirs.S),
        ):
            n = len(other.dense())
            assert mine.sizes == basis.sizes == block_sizes(n, blocks)
            assert relative(mine.dense(), diagonal_blocks(other.dense(), blocks).dense()) < 1e-6
            assert relative(basis @ values.diag() @ basis.T, mine.dense()) < 1e-5
        assert ours.Lambda.shape == (layer.outputs, layer.inputs)
        assert relative(ours.Lambda.sum(), theirs.Lambda.sum()) < 1e-5


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_plan_knows_what_its_partial_sums_take(
    rank: ModelWorker, corpus: PreparedCorpus, at: Stores, blocks: int
) -> None:
    plan = fit_plan(rank, corpus, slices=2, blocks=blocks)
    fit_in_pieces(rank, at("a"), corpus, plan)
    stored = [read_tensors(at("a"), entry.name) for kind in ("covariance", "lambda") for entry in at("a").list(kind)]
    assert plan.partial_bytes() == sum(
        tensor.nbytes for tensors in stored for key, tensor in tensors.items() if key != "tokens"
    )


@pytest.mark.parametrize("blocks", [1, 2])
def test_queries_are_preconditioned_by_the_dense_inverse_of_the_stored_blocks(
    rank: ModelWorker, corpus: PreparedCorpus, at: Stores, blocks: int
) -> None:
    inverse = fit(rank, at("a"), corpus, fit_plan(rank, corpus, blocks=blocks))
    queries = [Query("a", (Part((5, 9, 33, 4), (2, 3)),))]
    V, P = query_gradients(rank, queries, rank.layers), preconditioned(rank, queries, rank.layers, inverse)
    for layer in rank.layers:
        factors = read_layer_factors(at("a"), layer)
        lam = inverse.damping.relative * factors.Lambda.double().mean()
        Q_S, Q_A = factors.Q_S.dense().double(), factors.Q_A.dense().double()
        expected = Q_S @ ((Q_S.T @ V[layer.name].double() @ Q_A) / (factors.Lambda + lam)) @ Q_A.T
        assert relative(P[layer.name], expected) < 1e-5


def test_a_moment_that_is_none_is_named(rank: ModelWorker, corpus: PreparedCorpus, at: Stores) -> None:
    plan, layer = fit_plan(rank, corpus), rank.layers[1]
    draw(rank, at("a"), corpus, plan)
    path = partial_path("covariance", 0, 0)
    tensors = read_tensors(at("a"), path)
    tensors[f"S|{layer.name}"][1, 2] = float("inf")
    write_tensors(at("a"), path, tensors)
    with pytest.raises(FactorsError, match=rf"S of {layer.name} has 2 entries"):
        decompose_layer(at("a"), plan, layer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_lambda_that_is_none_is_named(rank: ModelWorker, corpus: PreparedCorpus, at: Stores, value: float) -> None:
    """Squares overflow where their roots did not. An absolute damping would let them through to the scores."""
    plan, layer = fit_plan(rank, corpus), rank.layers[1]
    fit_in_pieces(rank, at("a"), corpus, plan)
    path = partial_path("lambda", 0, 0)
    tensors = read_tensors(at("a"), path)
    tensors[layer.name][1, 2] = value
    write_tensors(at("a"), path, tensors, read_facts(at("a"), path))
    with pytest.raises(FactorsError, match=rf"Lambda of {layer.name} has 1 entries that are NaN or infinite"):
        finish_layer(at("a"), plan, layer)


@pytest.mark.parametrize("kind", ["A", "S", "Lambda"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_stored_factors_that_are_none_are_never_multiplied_with(
    rank: ModelWorker, corpus: PreparedCorpus, at: Stores, kind: str, value: float
) -> None:
    """A file of whole bytes and right digests whose numbers are none, as another program might put there."""
    layer = rank.layers[1]
    inverse = replace(fit(rank, at("a"), corpus, fit_plan(rank, corpus)), damping=DampingConfig(absolute=1e-3))
    name = f"{kind}/{layer.input_of if kind == 'A' else layer.name}.safetensors"
    tensors = read_tensors(at("a"), name)
    next(tensor for tensor in tensors.values() if tensor.ndim == 2)[1, 2] = value
    write_tensors(at("a"), name, tensors)
    with pytest.raises(FactorsError, match=rf"{kind} of {layer.name} has 1 entries that are NaN or infinite"):
        preconditioned(rank, [Query("a", (Part((5, 9, 33, 4), (2, 3)),))], rank.layers, inverse)


def test_a_layer_without_gradients_is_named_with_two_ways_out(
    corpus: PreparedCorpus, at: Stores, tmp_path: Path
) -> None:
    """A layer that nothing reads has Lambda zero everywhere: no relative damping, but an absolute one or none of it."""
    broken = one_rank(tmp_path / "model")
    dead, after = broken.layers[:2]
    with torch.no_grad():
        broken.model.module.get_submodule(after.name).weight.zero_()
    plan = fit_plan(broken, corpus)
    inverse = fit(broken, at("a"), corpus, plan)
    assert not read_layer_factors(at("a"), dead).Lambda.any()
    query = [Query("a", (Part((5, 9, 33, 4), (2, 3)),))]
    with pytest.raises(FactorsError, match=rf"^{dead.name}: .*model\.tracked=<regex>, or give factors\.damping\.abs"):
        preconditioned(broken, query, broken.layers, inverse)
    assert preconditioned(broken, query, broken.layers[1:], inverse)[after.name].any()
    P = preconditioned(broken, query, broken.layers, replace(inverse, damping=DampingConfig(absolute=1e-3)))
    assert torch.equal(P[dead.name], torch.zeros_like(P[dead.name]))


@pytest.mark.parametrize("kind", list(Labels))
def test_a_bfloat16_model_has_float32_factors_and_the_scores_of_float32(
    corpus: PreparedCorpus, at: Stores, tmp_path: Path, kind: Labels
) -> None:
    folder, scores = tiny_model(tmp_path / "model"), {}
    queries = tuple(Query(f"q{n}", (Part(ids, (2, 3)),)) for n, ids in enumerate([(5, 9, 33, 4), (7, 60, 12, 90)]))
    layers = describe(str(folder), "mlp").layers
    for dtype in (Dtype.float32, Dtype.bfloat16):
        rank = ModelWorker(WorkerSettings(ModelConfig(str(folder), dtype), layers, sharded=False), RankContext())
        inverse = fit(rank, at(dtype), corpus, fit_plan(rank, corpus, slices=2), kind)
        for partial in at(dtype).list("covariance") + at(dtype).list("lambda"):
            sums = read_tensors(at(dtype), partial.name)
            assert {sums[key].dtype for key in sums if key != "tokens"} == {torch.float32}
        for layer in layers:
            found = read_layer_factors(at(dtype), layer)
            moments = (found.A, found.S, found.Q_A, found.Q_S)
            assert {moment.dense().dtype for moment in moments} == {found.Lambda.dtype} == {torch.float32}
        query_task(rank, QueryTask(at(dtype), "queries", queries, layers, inverse, 8, Compression.weighted, "print"))
        task = CheckTask(
            CorpusAddress.of(corpus), np.arange(corpus.sequences), queries, (0, 1), layers, inverse, "print", 256
        )
        scores[dtype] = check_task(rank, task, read_query_batch(at(dtype), [["queries"]]).batch)
    for low, full in zip(scores[Dtype.bfloat16], scores[Dtype.float32], strict=True):
        for query in range(len(queries)):
            assert np.corrcoef(low[:, query], full[:, query])[0, 1] > 0.99


def test_what_needs_no_model_imports_none() -> None:
    """A layer's task has a process of its own: what a model needs would be most of the time that it takes to start."""
    asked = "import sys, infscan.steps.eigenbases; print('transformers' in sys.modules, 'ray' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["False", "False"]
