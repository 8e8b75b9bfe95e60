"""What a GPU computes is what a CPU computes in float64, quantity by quantity: the kit's checks, one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from infscan.model.worker import ModelWorker
from tests.gpu.kit import agreement, faults
from tests.gpu.kit.study import Study

GPU = "cuda:0"


@pytest.fixture(scope="module", params=["gpt_neox", "llama", "gpt2"])
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, ModelWorker]:
    """A study, and the CPU rank that has fitted its factors in float64."""
    made = Study.make(tmp_path_factory.mktemp("study"), request.param, width=256, sequences=1024, tokens_per_batch=4096)
    return made, agreement.reference(made)


@pytest.mark.parametrize("name", agreement.OF_A_STUDY)
def test_it_agrees_with_the_cpu(study: tuple[Study, ModelWorker], name: str) -> None:
    found = list(agreement.OF_A_STUDY[name](*study, GPU))
    assert found
    assert not [check for check in found if not check.ok]


def test_products_are_right_in_every_precision() -> None:
    assert not [check for check in agreement.products(GPU) if not check.ok]


def test_grouped_heads_in_float32_keep_no_matrices_of_t_by_t(tmp_path: Path) -> None:
    assert not [check for check in agreement.grouped_heads(tmp_path, GPU, 4096) if not check.ok]


@pytest.mark.parametrize("n", [96, 1024, 4096])
def test_a_second_moment_is_decomposed(n: int) -> None:
    assert not [check for check in agreement.decomposition(GPU, n) if not check.ok]


def test_memory_that_runs_out_halves_micro_batches(study: tuple[Study, ModelWorker]) -> None:
    assert not [check for check in faults.memory_halving(study[0], GPU) if not check.ok]


def test_a_fit_that_was_cut_off_ends_with_the_same_files(study: tuple[Study, ModelWorker]) -> None:
    assert not [check for check in faults.resumed_fit(study[0], GPU) if not check.ok]


def test_a_sticky_error_is_no_memory_error_and_kills_its_process_alone() -> None:
    (found,) = faults.sticky_error()
    assert found["ok"], found
