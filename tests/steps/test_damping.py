"""factors.damping.auto: found after the fit, kept, the same however the fit is cut, and divided by as it was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infscan.config import DampingConfig, Labels
from infscan.corpus.addressable import CorpusAddress, PreparedCorpus
from infscan.engine.in_process import InProcessExecutor
from infscan.errors import FactorsError
from infscan.influence.even_damping import GRID
from infscan.model.worker import ModelWorker
from infscan.queries import Part, Query
from infscan.results.manifest import SUCCESS
from infscan.results.read import read_summary, read_top
from infscan.steps import damping
from infscan.steps.damping import fit_damping, moments_of, moments_plan
from infscan.steps.eigenbases import MOMENTS
from infscan.steps.factor_files import damping_path, found_damping
from infscan.steps.factors import lambda_task
from infscan.steps.labels import FitTask
from infscan.steps.preconditioner import preconditioned
from infscan.storage import Store
from tests.steps.builders import SEED, fit, fit_plan, one_rank, small_corpus
from tests.steps.runs import answer_here, small_run

Stores = Callable[[str], Store]


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> ModelWorker:
    return one_rank(tmp_path_factory.mktemp("model"), tracked="mlp+head")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def at(tmp_path: Path) -> Stores:
    return lambda name: Store(str(tmp_path / name))


def find(
    rank: ModelWorker,
    store: Store,
    corpus: PreparedCorpus,
    squares: Callable[[ModelWorker, FitTask], int] = lambda_task,
    **cut: int,
) -> dict[str, float]:
    plan = fit_plan(rank, corpus, **cut)
    fit(rank, store, corpus, plan)
    fit_damping(InProcessExecutor.on(rank), store, corpus, plan, Labels.sampled, SEED, squares)
    return {layer.name: found_damping(store, layer) for layer in rank.layers}


def test_it_does_not_depend_on_slices_layer_groups_or_batches(
    rank: ModelWorker, corpus: PreparedCorpus, at: Stores
) -> None:
    found = find(rank, at("a"), corpus)
    assert set(found.values()) <= set(GRID)
    assert find(rank, at("b"), corpus, slices=3, group_bytes=1 << 17, tokens_per_batch=64) == found
    assert not at("a").list(MOMENTS)


def test_it_goes_on_where_it_stopped_and_is_found_once(rank: ModelWorker, corpus: PreparedCorpus, at: Stores) -> None:
    whole = find(rank, at("a"), corpus, slices=3)
    plan = fit_plan(rank, corpus, slices=3)
    fit(rank, at("b"), corpus, plan)
    # Stopped after two slices: their sums are there.
    for number in range(2):
        lambda_task(rank, moments_of(at("b"), CorpusAddress.of(corpus), moments_plan(plan), (0, number), SEED))
    done: list[int] = []

    def counted(worker: ModelWorker, task: FitTask) -> int:
        done.append(task.slice)
        return lambda_task(worker, task)

    assert find(rank, at("b"), corpus, counted, slices=3) == whole
    assert done == [2]
    for layer in rank.layers:
        assert at("a").read(damping_path(layer)) == at("b").read(damping_path(layer))
    assert find(rank, at("b"), corpus, counted, slices=3) == whole
    assert done == [2]


def test_lambda_is_damped_by_what_was_found(rank: ModelWorker, corpus: PreparedCorpus, at: Stores) -> None:
    plan = fit_plan(rank, corpus)
    inverse = fit(rank, at("a"), corpus, plan)
    found = find(rank, at("a"), corpus)
    query = [Query("a", (Part((5, 9, 33, 4), (2, 3)),))]
    P = preconditioned(rank, query, rank.layers, replace(inverse, damping=DampingConfig(auto=True)))
    for layer in rank.layers:
        by_hand = replace(inverse, damping=DampingConfig(relative=found[layer.name]))
        assert torch.equal(P[layer.name], preconditioned(rank, query, [layer], by_hand)[layer.name])
    absolute = DampingConfig(absolute=0.3)
    by_value = preconditioned(rank, query, rank.layers, replace(inverse, damping=replace(absolute, auto=True)))
    for name, matrix in preconditioned(rank, query, rank.layers, replace(inverse, damping=absolute)).items():
        assert torch.equal(by_value[name], matrix)


def test_a_part_of_every_slice_is_enough(
    rank: ModelWorker, corpus: PreparedCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = fit_plan(rank, corpus, slices=3)
    assert moments_plan(plan).slices == plan.slices
    monkeypatch.setattr(damping, "MOST_SEQUENCES", 6)
    assert [stop - start for start, stop in moments_plan(plan).slices] == [2, 2, 2]


def test_a_lambda_of_true_labels_is_refused(rank: ModelWorker, corpus: PreparedCorpus, at: Stores) -> None:
    plan = fit_plan(rank, corpus)
    fit(rank, at("a"), corpus, plan, Labels.empirical)
    with pytest.raises(FactorsError, match=r"factors\.labels=empirical: .* use factors\.labels=sampled"):
        fit_damping(InProcessExecutor.on(rank), at("a"), corpus, plan, Labels.empirical, SEED, lambda_task)


def test_a_run_records_what_it_found_and_finds_it_again(tmp_path: Path) -> None:
    config = small_run(tmp_path, "factors.damping.auto=true", "scan.check_sequences=20")
    answer_here(config)
    found, top = read_summary(config.output)["damping"], read_top(config.output)
    assert found
    assert set(found.values()) <= set(GRID)
    Store(config.output).remove(SUCCESS)
    answer_here(config)
    assert read_summary(config.output)["damping"] == found
    assert read_top(config.output) == top
