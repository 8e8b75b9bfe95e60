"""PBRF as a ground truth, small: what is written, kept and refused, and laws of the pieces of the regression."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from infscan.errors import ConfigError, RunError
from infscan.influence.inverse import from_core, inverse_core
from infscan.model.gauss_newton import damping_vector, join, split
from infscan.results.schema import footer_of
from infscan.storage import Store
from infscan_studies import against_pbrf, regression
from infscan_studies.comparison import AVERAGE
from infscan_studies.config import PbrfConfig, RegressionConfig, ResponseConfig, TruthConfig, ValidateJob
from infscan_studies.regression import FEATURES
from infscan_studies.report.validation import lines
from infscan_studies.truth.pbrf import dampings_of
from tests.steps import runs as builders
from tests.steps.runs import tiny_model, token_corpus, token_queries

SMALL = [
    "truth=pbrf_regression",
    "truth.rows=40",
    "truth.points=6",
    "truth.widths=[5,4]",
    "truth.epochs=60",
    "truth.queries=3",
    "factors.damping.relative=1",
    "validate.lissa.depths=[2,2000]",
    "validate.resamples=20",
]


def compose(*overrides: str) -> ValidateJob:
    config = builders.compose("validate", *overrides)
    assert isinstance(config, ValidateJob)
    return config


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pbrf")


@pytest.fixture(scope="module")
def small(folder: Path) -> ValidateJob:
    return compose(*SMALL, f"output={folder / 'run'}")


def test_the_truth_is_a_group_and_conjugate_gradients_its_default() -> None:
    assert type(compose().truth) is TruthConfig
    assert isinstance(compose("truth=pbrf").truth, PbrfConfig)
    assert isinstance(compose("truth=pbrf_regression", "truth.points=7").truth, RegressionConfig)
    with pytest.raises(ConfigError, match=r"truth=retraining: there is no such preset; presets are cg, coverage, pbrf"):
        compose("truth=retraining")


def test_the_regression_writes_every_method_and_agrees_with_the_exact_solve(folder: Path, small: ValidateJob) -> None:
    found, table, facts = regression.validate(small, quiet)
    methods = ["EK-FAC", "gradient dot product", regression.GGN, "LiSSA-2", "LiSSA-2000", "random"]
    rows = [(row["method"], row["query"]) for row in table.to_pylist()]
    assert rows == [(method, query) for method in methods for query in [*found.query_ids, AVERAGE]]
    means = {row["method"]: row["pearson"] for row in table.to_pylist() if row["query"] == AVERAGE}
    assert means[regression.GGN] > 0.8
    written = pq.read_table(folder / "run/validate/against_pbrf_regression.parquet")
    assert written.replace_schema_metadata().equals(table.replace_schema_metadata())
    assert footer_of(written.schema, "")["pbrf"]["minimisations"] == 12
    assert "all 12 minimisations reached" in lines(facts)[0]


def test_finished_points_are_kept_and_other_settings_start_anew(folder: Path, small: ValidateJob) -> None:
    before, *_ = regression.validate(small, quiet)
    stored = Store(str(folder / "run/validate/responses")).list("", ".json")
    again, *_ = regression.validate(small, quiet)
    np.testing.assert_array_equal(again.reference.scores_qn, before.reference.scores_qn)
    assert again.reference.seconds == before.reference.seconds
    assert Store(str(folder / "run/validate/responses")).list("", ".json") == stored
    looser = compose(*SMALL, "truth.tolerance=0.5", "truth.max_steps=9", f"output={folder / 'run'}")
    regression.validate(looser, quiet)
    assert len(Store(str(folder / "run/validate/responses")).list("", ".json")) == 2 * len(stored)


def test_responses_that_did_not_converge_are_counted(folder: Path) -> None:
    short = compose(*SMALL, "truth.max_steps=1", "truth.tolerance=1e-9", f"output={folder / 'short'}")
    _, _, facts = regression.validate(short, quiet)
    assert facts["pbrf"]["not_converged"] == facts["pbrf"]["minimisations"] == 12
    assert facts["pbrf"]["points_converged"] == 0
    assert "12 of 12 minimisations did NOT reach the tolerance of 1e-09" in lines(facts)[0]


def test_a_response_of_another_point_is_refused(folder: Path) -> None:
    config = compose(*SMALL, "truth.max_steps=2", f"output={folder / 'moved'}")
    regression.validate(config, quiet)
    store = Store(str(folder / "moved/validate/responses"))
    first, second = [entry.name for entry in store.list("", ".json")][:2]
    store.write(first, store.read(second))
    with pytest.raises(RunError, match="another training point"):
        regression.validate(config, quiet)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("truth.points=2", r"truth\.points"),
        ("truth.points=37", "not enough for points=37"),
        ("truth.queries=5", "queries=5"),
        ("truth.widths=[]", r"widths=\[\]"),
        ("truth.tolerance=0", r"truth\.tolerance"),
    ],
)
def test_settings_that_cannot_work_are_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(*SMALL, override).truth.check()


def test_too_long_a_study_is_refused_with_its_estimate(folder: Path) -> None:
    config = compose(*SMALL, "validate.max_hours=1e-9", f"output={folder / 'long'}")
    with pytest.raises(ConfigError, match=r"6 training points would take up to .* hours .*truth\.points"):
        regression.validate(config, quiet)


def test_more_points_than_there_are_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"truth\.points=9 of 8 .*curvature_sequences"):
        against_pbrf.sampled_points(ResponseConfig(points=9), 8, 0)
    five, six = (set(against_pbrf.sampled_points(ResponseConfig(points=points), 8, 0)) for points in (5, 6))
    assert len(five) == 5
    assert five < six <= set(range(8))


def test_jacobians_are_autograds_and_the_exact_solve_solves() -> None:
    truth = RegressionConfig(rows=20, widths=[3], epochs=5, queries=2, points=3)
    data, model = regression.invent(truth, 1), regression.build(truth, 1)
    layers = regression.layers_of(model)
    J_np = regression.jacobian(layers, regression.tokens(model, data.x_ni))
    by_name = jacrev(lambda p: functional_call(model, p, (data.x_ni,))[:, 0])(
        {name: parameter.detach() for name, parameter in model.named_parameters()}
    )
    expected = [
        torch.cat([by_name[f"{layer.name}.weight"], by_name[f"{layer.name}.bias"][..., None]], dim=2).flatten(1)
        for layer in layers
    ]
    torch.testing.assert_close(J_np, torch.cat(expected, dim=1))
    lambda_p = damping_vector(layers, {"0": 0.3, "2": 0.05}, J_np)
    v_kp = torch.randn(2, J_np.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x_kp = regression.solve_exactly(J_np, lambda_p, v_kp)
    torch.testing.assert_close(x_kp @ J_np.T @ J_np / len(J_np) + lambda_p * x_kp, v_kp)


def test_ek_fac_of_one_linear_layer_is_the_exact_solve() -> None:
    """G of h = W a is A times S = 1, so that nothing is approximated but the noise's sampling."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 1)).double()
    x_ni = torch.randn(40_000, FEATURES, dtype=torch.float64, generator=generator)
    found, layers = regression.tokens(model, x_ni), regression.layers_of(model)
    factors = regression.fit(found, 3)
    dampings = dampings_of(factors, relative=0.1)
    v_kp = torch.randn(2, FEATURES + 1, dtype=torch.float64, generator=generator)
    estimated = join(
        layers,
        {
            name: from_core(inverse_core(split(layers, v_kp)[name], one, dampings[name]), one)
            for name, one in factors.items()
        },
    )
    J_np = regression.jacobian(layers, found)
    exact = torch.linalg.solve(J_np.T @ J_np / len(J_np) + torch.eye(FEATURES + 1) * dampings["0"], v_kp.T).T
    torch.testing.assert_close(estimated, exact, rtol=0.06, atol=0.02)


def language_model(folder: Path, *overrides: str) -> ValidateJob:
    tiny_model(folder / "model", width=16)
    token_corpus(folder / "corpus.jsonl", 12, T=8)
    token_queries(folder / "queries.jsonl", 2)
    return compose(
        "truth=pbrf",
        f"model.path={folder / 'model'}",
        "model.dtype=float64",
        f"corpus.path={folder / 'corpus.jsonl'}",
        "corpus.tokens_field=tokens",
        "corpus.sequence_length=8",
        f"queries.path={folder / 'queries.jsonl'}",
        "factors.damping.relative=2000",
        "validate.curvature_sequences=10",
        "validate.queries=2",
        "validate.resamples=20",
        "validate.cg.tolerance=1e-4",
        "validate.lissa.depths=[2]",
        "truth.points=8",
        "truth.tolerance=0.01",
        f"output={folder / 'lm'}",
        *overrides,
    )


def test_days_of_responses_of_a_language_model_are_refused_before_any_is_computed(tmp_path: Path) -> None:
    config = language_model(tmp_path, "validate.max_hours=1e-9")
    with pytest.raises(ConfigError, match=r"8 training points would take up to .* hours .* gradients over 10 training"):
        against_pbrf.validate(config, quiet)
    assert not list(tmp_path.glob("lm/validate/responses/*/point-*.json"))


def test_documents_that_do_not_see_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"whole sequences; use corpus\.attention=across, or corpus\.packing=document"
    ):
        against_pbrf.validate(language_model(tmp_path, "corpus.packing=concat", "corpus.attention=within"), quiet)


def test_a_language_model_is_judged_by_its_responses(folder: Path) -> None:
    config = language_model(folder)
    found, table, facts = against_pbrf.validate(config, quiet)
    assert [one.name for one in found.scored][:3] == ["EK-FAC", "gradient dot product", "CG"]
    means = {row["method"]: row["pearson"] for row in table.to_pylist() if row["query"] == AVERAGE}
    assert means["CG"] > 0.9
    assert set(means) >= {"EK-FAC", "LiSSA-2", "BM25", "random"}
    assert facts["pbrf"]["not_converged"] == 0
    assert "largest relative residual" in lines(facts)[1]
