"""Fitting in tasks: slices add up to the whole, labels belong to sequences, and partial sums to their eigenbases."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from infscan.config import Labels
from infscan.corpus.addressable import PreparedCorpus
from infscan.errors import FactorsError
from infscan.passes.factor_store import (
    FactorsPlan,
    labels_path,
    partial_path,
    read_facts,
    read_layer_factors,
    read_tensors,
    write_tensors,
)
from infscan.passes.factors import (
    covariance_task,
    decompose_layer,
    eigenbases_digest,
    finish_layer,
    lambda_task,
    slice_bounds,
)
from infscan.passes.rank import Rank
from infscan.storage import MissingError, Store
from tests.passes.builders import fit, fit_plan, fit_tasks, one_rank

Stores = Callable[[str], Store]


@pytest.fixture
def at(tmp_path: Path) -> Stores:
    return lambda name: Store(str(tmp_path / name))


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def draw(rank: Rank, store: Store, corpus: PreparedCorpus, plan: FactorsPlan) -> None:
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


def test_labels_are_stored_and_drawn_alike_again(rank: Rank, corpus: PreparedCorpus, at: Stores) -> None:
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
    rank: Rank, corpus: PreparedCorpus, at: Stores, cut: dict[str, int]
) -> None:
    whole, other = fit_plan(rank, corpus), fit_plan(rank, corpus, **cut)
    draw(rank, at("whole"), corpus, whole)
    draw(rank, at("other"), corpus, other)
    assert labels(at("other"), other, corpus) == labels(at("whole"), whole, corpus)


def test_labels_of_another_attempt_void_this_one(rank: Rank, corpus: PreparedCorpus, at: Stores) -> None:
    """The sums must belong to the labels in storage, so a partial made with others is not written."""
    plan = fit_plan(rank, corpus)
    write_tensors(at("a"), labels_path(0), {"labels": torch.ones(corpus.sequences, 64, dtype=torch.int32)})
    with pytest.raises(RuntimeError, match="drawn by another attempt"):
        draw(rank, at("a"), corpus, plan)
    assert at("a").list("covariance") == []


def test_stored_labels_are_read_where_none_are_drawn(rank: Rank, corpus: PreparedCorpus, at: Stores) -> None:
    plan = fit_plan(rank, corpus)
    draw(rank, at("a"), corpus, plan)
    drawn = at("a").read(partial_path("covariance", 0, 0))
    [task] = fit_tasks(at("a"), corpus, plan, Labels.sampled)
    covariance_task(rank, task)
    assert at("a").read(partial_path("covariance", 0, 0)) == drawn
    [task] = fit_tasks(at("none"), corpus, plan, Labels.sampled)
    with pytest.raises(MissingError, match=r"labels/slice-0000"):
        covariance_task(rank, task)


@pytest.mark.parametrize("kind", list(Labels))
@pytest.mark.parametrize("cut", [{"slices": 3}, {"slices": 3, "group_bytes": 60_000}])
def test_slices_and_layer_groups_add_up_to_the_whole(
    rank: Rank, corpus: PreparedCorpus, at: Stores, kind: Labels, cut: dict[str, int]
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


def test_tasks_report_and_record_their_tokens(rank: Rank, corpus: PreparedCorpus, at: Stores) -> None:
    plan = fit_plan(rank, corpus, slices=3)
    tokens = [covariance_task(rank, task) for task in fit_tasks(at("a"), corpus, plan, Labels.empirical)]
    assert sum(tokens) == corpus.tokens
    recorded = [int(read_tensors(at("a"), partial_path("covariance", 0, n))["tokens"]) for n in range(3)]
    assert recorded == tokens


def test_a_partial_of_other_eigenbases_is_refused(rank: Rank, corpus: PreparedCorpus, at: Stores) -> None:
    plan, store, layer = fit_plan(rank, corpus, slices=2), at("a"), rank.layers[0]
    fit(rank, store, corpus, plan)
    path = partial_path("lambda", 0, 1)
    assert read_facts(store, path)["eigenbases"] == eigenbases_digest(store, plan.group(0))
    write_tensors(store, path, read_tensors(store, path), {"eigenbases": "of another fit"})
    store.remove(f"Lambda/{layer.name}.safetensors")
    with pytest.raises(RuntimeError, match=r"lambda/group-000-slice-0001\.safetensors was made in other eigenbases"):
        finish_layer(store, plan, layer)
    assert not store.exists(f"Lambda/{layer.name}.safetensors")


def test_eigenbases_are_created_once(rank: Rank, corpus: PreparedCorpus, at: Stores) -> None:
    """A second decomposition, of other sums, changes nothing: Lambda belongs to the first."""
    plan, layer = fit_plan(rank, corpus), rank.layers[0]
    fit(rank, at("a"), corpus, plan)
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
        for kind in ("A", "S", "Lambda"):
            assert relative(getattr(ours, kind), getattr(theirs, kind)) < 1e-5


def test_a_moment_that_is_none_is_named(rank: Rank, corpus: PreparedCorpus, at: Stores) -> None:
    plan, layer = fit_plan(rank, corpus), rank.layers[1]
    draw(rank, at("a"), corpus, plan)
    path = partial_path("covariance", 0, 0)
    tensors = read_tensors(at("a"), path)
    tensors[f"S|{layer.name}"][1, 2] = float("inf")
    write_tensors(at("a"), path, tensors)
    with pytest.raises(FactorsError, match=rf"S of {layer.name} has 2 entries"):
        decompose_layer(at("a"), plan, layer)
