"""Scores against a step of training: one pass gives what many give, and what foretells the effects is judged so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from infscan.config import DampingConfig
from infscan.errors import ConfigError
from infscan.influence.inverse import from_core, inverse_core
from infscan.steps.preconditioner import query_gradients
from infscan.steps.solve import ekfac_factors
from infscan.storage import Store
from infscan_studies import against_step
from infscan_studies.against_step import judged, measured_effects, validate
from infscan_studies.bank_scores import Labelled, RecipeScores, layer_scores
from infscan_studies.config import BankMethod, ScoresConfig, StepConfig, StepOptimizer, StepScoresConfig, ValidateJob
from infscan_studies.report.validation import show_steps
from infscan_studies.swept import Way, sweep
from infscan_studies.truth.retrain import measure_queries
from infscan_studies.truth.steps import effects
from tests.steps.runs import compose, tiny_model, token_corpus, token_queries

SEQUENCES, QUERIES = 14, 4
DAMPINGS = [0.01, 1.0]


def asked(folder: Path, *overrides: str) -> ValidateJob:
    if not (folder / "model").exists():
        tiny_model(folder / "model", width=16)
        token_corpus(folder / "corpus.jsonl", SEQUENCES, T=16)
        token_queries(folder / "queries.jsonl", QUERIES)
    config = compose(
        "validate",
        "truth=step",
        f"model.path={folder / 'model'}",
        "model.tracked=linear+head",
        "model.dtype=float64",
        f"corpus.path={folder / 'corpus.jsonl'}",
        "corpus.tokens_field=tokens",
        "corpus.sequence_length=16",
        f"queries.path={folder / 'queries.jsonl'}",
        "factors.damping.auto=true",
        "validate.curvature_sequences=12",
        "truth.sweep.damping=[0.01,1.0]",
        "truth.sweep.tracked=[mlp,lower,middle,mlp+attention+head]",
        "truth.sweep.resamples=50",
        "truth.against='ekfac mlp 1'",
        f"output={folder / 'run'}",
        *overrides,
    )
    assert isinstance(config, ValidateJob)
    return config


def sweep_of(config: ValidateJob) -> ScoresConfig:
    assert isinstance(config.truth, StepConfig)
    return config.truth.sweep


@pytest.mark.parametrize("spanned", [False, True])
def test_one_pass_gives_what_a_pass_for_every_damping_gives(tmp_path: Path, spanned: bool) -> None:
    config = asked(tmp_path, *(("factors.span_from=90", "factors.span=4") if spanned else ()))
    scored = RecipeScores(Store(config.output), config, sweep_of(config))
    study, worker = scored.study, scored.worker
    assert {layer.span for layer in worker.layers} == ({0, 4} if spanned else {0})
    V = query_gradients(worker, study.queries, worker.layers)
    ekfac = [Way(BankMethod.ekfac, damping) for damping in (*DAMPINGS, None)]
    kfac, identity = Way(BankMethod.kfac, 0.1), Way(BankMethod.identity, None)
    found = sweep(worker, study.queries, study.candidates, study.inverse, 9.0, [*ekfac, kfac, identity], 64)
    for way in ekfac:
        asked_for = DampingConfig(auto=True) if way.damping is None else DampingConfig(relative=way.damping)
        factors = ekfac_factors(worker, replace(study.inverse, damping=asked_for))
        P = {name: from_core(inverse_core(V[name], *known), known[0]) for name, known in factors.items()}
        for name, scores_qn in layer_scores(worker, study.candidates, P).items():
            assert found[way].by_layer[name] == pytest.approx(scores_qn, rel=1e-3, abs=1e-4 * np.abs(scores_qn).max())
    for name, scores_qn in layer_scores(worker, study.candidates, V).items():
        assert found[identity].by_layer[name] == pytest.approx(scores_qn, rel=1e-3, abs=1e-4 * np.abs(scores_qn).max())
    # K-FAC's Lambda: the products of the eigenvalues, as many times as a sequence has tokens.
    for name, (known, _) in ekfac_factors(worker, study.inverse).items():
        Lambda = 9.0 * torch.outer(known.S_eigenvalues.clamp_min(0), known.A_eigenvalues.clamp_min(0))
        own = replace(known, Lambda=Lambda)
        P = {name: from_core(inverse_core(V[name], own, 0.1 * float(Lambda.mean())), own)}
        scores_qn = layer_scores(worker, study.candidates, P)[name]
        assert found[kfac].by_layer[name] == pytest.approx(scores_qn, rel=1e-3, abs=1e-4 * np.abs(scores_qn).max())


def test_every_sequence_is_trained_on_alone_and_what_foretells_that_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small step of SGD is the dot product over all parameters, of which the tracked layers are nearly all."""
    config = asked(tmp_path, "truth.optimizer=sgd", "truth.learning_rate=1e-5", "truth.top=2")
    _, table, facts = validate(config, lambda _: None)
    scored = RecipeScores(Store(config.output), config, sweep_of(config))
    study, worker = scored.study, scored.worker
    effect_nq, _ = measured_effects(study, config, lambda _: None)
    before = measure_queries(worker.model.module, study.queries)
    assert measure_queries(worker.model.module, study.queries, 64) == pytest.approx(before, rel=1e-9)
    _, (after,) = effects(worker, study.candidates[5], study.queries, StepOptimizer.sgd, 1e-5, [1])
    assert effect_nq[5] == pytest.approx(np.asarray(after.values) - before, rel=1e-4, abs=1e-9)
    rows = {(row["label"], row["kind"]): row for row in table.to_pylist()}
    # `<P, grad L>` with P of grad(-f): what lowers L raises f where it is positive.
    assert rows["identity mlp+attention+head", "all"]["pearson"] > 0.9
    assert rows["identity mlp+attention+head", "all"]["top"] > facts["any"]
    assert {"ekfac lower auto", "kfac middle 0.01", "bm25", "cosine", "random"} <= {label for label, _ in rows}
    base = rows["ekfac mlp 1", "all"]
    assert base["lead_spearman"] == base["lead_top"] == 0
    other = rows["kfac mlp 1", "all"]
    assert other["lead_pearson"] == pytest.approx(other["pearson"] - base["pearson"])
    show_steps(table, facts)
    shown = capsys.readouterr().out
    assert shown.startswith("The effect of a step of sgd (1e-05) on each of 14 sequences alone")
    assert all(label in shown for label, _ in rows)
    assert all(row["pearson_low"] <= row["pearson"] <= row["pearson_high"] for row in rows.values())
    # Stopped and called again, nothing is trained or scored again.
    monkeypatch.setattr(against_step, "effects_on", pytest.fail)
    monkeypatch.setattr("infscan_studies.bank_scores.sweep", pytest.fail)
    assert validate(config, lambda _: None)[1].equals(table)


def test_scores_that_are_the_effects_are_judged_right(tmp_path: Path) -> None:
    effect_nq: NDArray[np.float64] = np.random.default_rng(0).standard_normal((20, 3))
    ids = ("a-0", "a-1", "b-0")
    rows = [
        Labelled("truth", {"method": "truth"}, 3 * effect_nq + 1, ids),
        Labelled("wrong", {"method": "wrong"}, -effect_nq[:, 1:], ids[1:]),
        Labelled("bm25", {"method": "bm25"}, np.zeros((20, 3)), ids),
    ]
    truth = StepConfig(top=2, against="truth", sweep=StepScoresConfig(resamples=50))
    found = {(row["label"], row["kind"]): row for row in judged(rows, ids, effect_nq, truth, 0)}
    right = found["truth", "all"]
    assert (right["pearson"], right["spearman"], right["lead_top"]) == pytest.approx((1, 1, 0))
    strongest_2q = np.sort(effect_nq, axis=0)[-2:]
    assert right["top"] == pytest.approx(strongest_2q.mean())
    assert right["over_any"] == pytest.approx(strongest_2q.mean() - effect_nq.mean())
    assert right["over_bm25"] == pytest.approx(strongest_2q.mean() - effect_nq[:2].mean())
    assert found["wrong", "all"]["lead_pearson"] == pytest.approx(-2)
    assert found["wrong", "a"]["queries"] == 1
    assert found["bm25", "b"]["spearman"] == 0
    with pytest.raises(ConfigError, match="no row of the sweep; its rows are truth, wrong, bm25"):
        judged(rows, ids, effect_nq, replace(truth, against="ekfac head 3"), 0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.dtype=bfloat16", "is lost in the rounding of bfloat16"),
        ("validate.max_hours=1e-9", "more than validate.max_hours"),
        ("model.tracked=mlp", "no tracked layer is of attention"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(asked(tmp_path, override), lambda _: None)
    with pytest.raises(ConfigError, match=r"truth.top=0"):
        StepConfig(top=0).check()
    with pytest.raises(ConfigError, match="fall=2"):
        StepConfig(fall=2).check()
