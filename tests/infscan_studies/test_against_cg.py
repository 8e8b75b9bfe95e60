"""The validation against CG, on a tiny model: every method in the table, laws between them, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infscan.errors import ConfigError
from infscan.influence.cg import conjugate_gradients, damped
from infscan.model.gauss_newton import GaussNewton, damping_vector, join
from infscan.results.schema import footer_of
from infscan.steps.preconditioner import layer_factors, query_gradients
from infscan.steps.solve import ekfac_inverse
from infscan_studies.against_cg import Findings, against_cg, validate
from infscan_studies.api import of_run
from infscan_studies.comparison import AVERAGE, EKFAC
from infscan_studies.config import ValidateJob
from infscan_studies.in_process import Study, open_study
from infscan_studies.validation import Cost
from tests.steps.runs import answer_here, compose, small_run, tiny_model, token_corpus, token_queries

CG_ITERATES = [1, 3]
DEPTHS = [2, 6]


def asked(folder: Path, *overrides: str) -> ValidateJob:
    if not (folder / "model").exists():
        tiny_model(folder / "model", width=16)
        token_corpus(folder / "corpus.jsonl", 60, T=16)
        token_queries(folder / "queries.jsonl", 3)
    config = compose(
        "validate",
        f"model.path={folder / 'model'}",
        f"corpus.path={folder / 'corpus.jsonl'}",
        "corpus.tokens_field=tokens",
        "corpus.sequence_length=16",
        f"queries.path={folder / 'queries.jsonl'}",
        "model.dtype=float64",
        "validate.curvature_sequences=24",
        "factors.damping.relative=2",
        "validate.sequences=55",
        "validate.queries=2",
        "validate.resamples=50",
        "validate.cg.tolerance=1e-3",
        "validate.cg.max_iterations=60",
        f"validate.cg.snapshots={CG_ITERATES}",
        f"validate.lissa.depths={DEPTHS}",
        f"output={folder / 'run'}",
        *overrides,
    )
    assert isinstance(config, ValidateJob)
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validation")


@pytest.fixture(scope="module")
def study(folder: Path) -> Study:
    return open_study(asked(folder))


Judged = tuple[Findings, pa.Table, dict[str, Any]]


@pytest.fixture(scope="module")
def judged(folder: Path, study: Study) -> Judged:
    lines: list[str] = []
    found = validate(asked(folder), lines.append)
    assert any("minutes" in line for line in lines)
    return found


def test_the_job_writes_every_method_and_query(folder: Path, study: Study, judged: Judged) -> None:
    found, table, facts = judged
    methods = [EKFAC, "gradient dot product", "LiSSA-2", "LiSSA-6", "CG-1", "CG-3", "BM25", "random"]
    ids = [query.id for query in study.queries]
    assert len(ids) == 2
    rows = table.to_pylist()
    assert [(row["method"], row["query"]) for row in rows] == [(m, q) for m in methods for q in [*ids, AVERAGE]]
    assert all(row["low"] <= row["pearson"] <= row["high"] for row in rows if row["query"] != AVERAGE)
    assert all(-1 <= row["pearson"] <= 1 and row["seconds"] >= 0 and 0 <= row["recall"] <= 1 for row in rows)
    written = pq.read_table(folder / "run/validate/against_cg.parquet")
    assert written.replace_schema_metadata().equals(table.replace_schema_metadata())
    footer = footer_of(written.schema, "against_cg")
    assert footer["cg"] == json.loads(json.dumps(facts["cg"]))
    assert set(footer["gain_of_ekfac"]) == set(methods) - {EKFAC}
    assert bool(found.cg.converged_k.all())


def test_the_first_preconditioned_iterate_is_ek_fac_up_to_a_factor(judged: Judged) -> None:
    found, table, _ = judged
    scores = {one.name: one.scores_qn for one in found.scored}
    for row in range(2):
        assert np.corrcoef(scores["CG-1"][row], scores[EKFAC][row])[0, 1] == pytest.approx(1, abs=1e-9)
    pearson = {row["method"]: row["pearson"] for row in table.to_pylist() if row["query"] == AVERAGE}
    assert pearson["CG-1"] == pytest.approx(pearson[EKFAC], abs=1e-9)


def test_factors_are_fitted_once(folder: Path, study: Study) -> None:
    again = open_study(asked(folder))
    assert again.fit_seconds == study.fit_seconds
    assert again.fingerprints == study.fingerprints
    other = open_study(asked(folder, "validate.curvature_sequences=6"))
    assert other.fingerprints["factors"] != study.fingerprints["factors"]
    assert len(other.curvature) == 6


def test_ek_fac_saves_conjugate_gradients_iterations(folder: Path) -> None:
    """On one layer, whose curvature it holds whole: over several it knows nothing of what couples them."""
    layer = r"model.tracked=layers\.1\.mlp\.dense_4h_to_h"
    study = open_study(asked(folder, layer, "factors.damping.relative=0.1", "validate.curvature_sequences=48"))
    rank = study.worker
    v_kp = join(rank.layers, query_gradients(rank, study.queries, rank.layers))
    factors = {
        layer.name: known
        for layer in rank.layers
        if (known := layer_factors(study.inverse, layer, rank.device, rank.wide)) is not None
    }
    lambda_p = damping_vector(rank.layers, {name: lam for name, (_, lam) in factors.items()}, v_kp)
    system = damped(GaussNewton(rank, study.curvature, 4096).product, lambda_p)
    plain = conjugate_gradients(system, v_kp, tolerance=1e-3, max_iterations=100)
    helped = conjugate_gradients(
        system, v_kp, tolerance=1e-3, max_iterations=100, preconditioner=ekfac_inverse(rank.layers, factors)
    )
    assert bool((helped.converged_k & plain.converged_k).all())
    assert bool((helped.iterations_k < plain.iterations_k / 2).all())
    torch.testing.assert_close(helped.x_kp, plain.x_kp, rtol=0.02, atol=0.01 * float(plain.x_kp.abs().max()))


def test_one_seed_gives_one_table(folder: Path, judged: Judged) -> None:
    again = validate(asked(folder), lambda line: None)[1]
    assert judged[1].drop(["seconds"]).equals(again.drop(["seconds"]))


def test_too_long_a_validation_is_refused_with_its_estimate(study: Study, folder: Path) -> None:
    config = asked(folder, "validate.max_hours=1e-9")
    with pytest.raises(ConfigError, match=r"hours .* GFLOP/s.*validate\.curvature_sequences"):
        against_cg(
            study.worker,
            study.queries,
            study.curvature,
            study.candidates,
            study.inverse,
            config.validate,
            seed=0,
            fit_seconds=0.0,
        )


def test_the_estimate_names_work_and_speed() -> None:
    assert Cost(flops=3.6e15, seconds=3600).hours == 1
    Cost(flops=3.6e15, seconds=3600).refuse_above(1)
    with pytest.raises(ConfigError, match=r"1 hours \(3\.6e\+15 FLOP at 1e\+03 GFLOP/s\)"):
        Cost(flops=3.6e15, seconds=3600).refuse_above(0.99)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("validate.queries=0", r"validate\.queries"),
        ("validate.sequences=2", r"validate\.sequences"),
        ("validate.lissa.depths=[]", r"validate\.lissa\.depths"),
        ("cluster.ranks_per_worker=2", "one rank"),
        ("factors.solver=identity", r"factors\.solver=ekfac"),
    ],
)
def test_settings_that_cannot_work_are_refused(folder: Path, override: str, said: str) -> None:
    extra = ("scan.compression=plain",) if "identity" in override else ()
    with pytest.raises(ConfigError, match=said):
        open_study(asked(folder, override, *extra))


def test_a_finished_run_is_judged_with_its_own_model_corpus_and_queries(tmp_path: Path) -> None:
    run = small_run(tmp_path, "factors.damping.relative=0.3")
    answer_here(run)
    job = compose("validate", f"run={run.output}", f"output={tmp_path / 'judged'}")
    judged = of_run(job)
    assert (judged.model, judged.queries) == (run.model, run.queries)
    assert (judged.corpus.path, judged.factors.damping.relative) == (f"{run.output}/corpus", 0.3)
    assert judged.output == str(tmp_path / "judged")
