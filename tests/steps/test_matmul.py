"""factors.matmul: which products of which step are in TF32, what a stored fit says of it, and that a CPU never is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from infscan.config import Labels, Matmul
from infscan.errors import FactorsError
from infscan.influence.precision import Multiply
from infscan.steps import factors, preconditioner, refine, scan
from infscan.steps.factor_files import store_plan
from infscan.steps.factors import covariance_task, lambda_task
from infscan.steps.prepare import prepare_factors_corpus
from tests.gpu.kit.agreement import REFERENCE
from tests.gpu.kit.study import Study
from tests.steps.runs import answer_here, open_here, small_run


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study.make(tmp_path_factory.mktemp("study"))
    study.fit(study.rank("cpu"), REFERENCE)
    return study


def spied(patch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[bool, bool]]:
    """(TF32, bfloat16 reductions) in every call of a module's function."""
    seen: list[tuple[bool, bool]] = []
    cuda, function = torch.backends.cuda.matmul, getattr(module, name)

    def spy(*arguments: Any, **named: Any) -> Any:
        seen.append((cuda.allow_tf32, cuda.allow_bf16_reduced_precision_reduction))
        return function(*arguments, **named)

    patch.setattr(module, name, spy)
    return seen


@pytest.mark.parametrize("matmul", ["exact", "tf32"])
def test_lambda_rotations_and_refining_are_in_it_and_nothing_else(
    study: Study, matmul: Multiply, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {
        name: spied(monkeypatch, module, name)
        for name, module in {
            "add_second_moment": factors,
            "add_squared_gradients": factors,
            "full_rank": preconditioner,
            "score_tokens": refine,
            "score_layer": scan,
        }.items()
    }
    rank = study.rank("cpu")
    task = study.fit_task(REFERENCE, Labels.empirical)
    task = replace(task, plan=replace(task.plan, fields=task.plan.fields | {"matmul": matmul}))
    lambda_task(rank, task)
    covariance_task(rank, study.fit_task(f"again-{matmul}", Labels.empirical))
    study.refined(rank, REFERENCE, matmul)
    study.scores(rank, REFERENCE, None)
    asked = (matmul == "tf32", False)
    assert set(calls["add_squared_gradients"]) == set(calls["score_tokens"]) == {asked}
    # The scan's and the moments' products are never in it; and nothing sums in bfloat16.
    assert set(calls["add_second_moment"]) == set(calls["score_layer"]) == {(False, False)}
    assert {tf32 for tf32, _ in calls["full_rank"]} == {matmul == "tf32"}
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_factors_in_tf32_are_others_and_what_never_said_is_exact(study: Study) -> None:
    made = study.fit_task("plans", Labels.empirical).plan
    store = study.factors("plans")
    assert store_plan(store, made).matmul == "exact"
    tf32 = replace(made, fields=made.fields | {"matmul": "tf32"})
    assert tf32.fingerprint != made.fingerprint
    with pytest.raises(FactorsError, match="matmul: 'exact' -> 'tf32'"):
        store_plan(store, tf32)
    other = study.factors("plans-tf32")
    store_plan(other, tf32)
    with pytest.raises(FactorsError, match="matmul: 'tf32' -> 'exact'"):
        store_plan(other, made)


def test_a_cpu_is_exact_whatever_is_asked_for(tmp_path: Path) -> None:
    config = small_run(tmp_path, "factors.matmul=tf32")
    assert config.factors.matmul is Matmul.tf32
    with open_here(config) as run:
        assert run.inputs.matmul == "exact"
        assert replace(run.inputs, device="cuda").matmul == "tf32"
        corpus = prepare_factors_corpus(run)
        on_gpu = replace(run.inputs, device="cuda")
        assert [factors.plan_factors(on, corpus).matmul for on in (run.inputs, on_gpu)] == ["exact", "tf32"]


def test_a_run_is_resumed_with_the_micro_batches_that_it_began_with(tmp_path: Path) -> None:
    answer_here(small_run(tmp_path, "scan.tokens_per_batch=128"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run/shards").iterdir()}
    removed = sorted(before)[0]
    (tmp_path / "run/shards" / removed).unlink()
    answer_here(small_run(tmp_path, "scan.tokens_per_batch=null"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run/shards").iterdir()} == before
