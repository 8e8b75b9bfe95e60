"""Laws of the retraining study: it goes on where it stopped, takes scores of its own model alone, and refuses days."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from infscan.config import Packing
from infscan.corpus.addressable import PreparedCorpus
from infscan.errors import ConfigError, RunError
from infscan.model.architecture import describe
from infscan.queries import Part, Query
from infscan.results.dense import score_column
from infscan.storage import Store
from infscan_studies.config import RetrainingConfig, Sizes, TrainingSettings
from infscan_studies.retraining import RetrainingStudy, lines, read_proponents
from infscan_studies.truth.lds import actual, half_subsets
from infscan_studies.truth.retrain import measure_queries
from tests.corpus.builders import prepare, settings, write_rows

STUDY = RetrainingConfig(
    model=Sizes(layers=1, width=8, heads=2, mlp_width=8),
    training=TrainingSettings(epochs=1, batch_sequences=8),
    subsets=4,
    seeds=2,
    share=0.1,
    random_draws=1,
)
QUERIES = [Query("b", (Part((7, 8, 9), (1, 2)),)), Query("a", (Part((5, 6), (1,)), Part((5, 7), (1,), -1.0)))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """20 sequences; number 3 has a single token, and so no loss."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"id": f"d{n}", "tokens": [(n + step) % 40 + 2 for step in range(1 if n == 3 else 6)]} for n in range(20)]
    write_rows(folder / "in.jsonl", rows)
    return prepare(folder / "in.jsonl", folder / "out", settings(Packing.document, 8))[1]


def open_study(folder: Path, corpus: PreparedCorpus, study: RetrainingConfig = STUDY) -> RetrainingStudy:
    return RetrainingStudy(study, corpus, QUERIES, Store(str(folder)))


def noise(corpus: PreparedCorpus, seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal((corpus.sequences, len(QUERIES)))


def write_scores(path: Path, corpus: PreparedCorpus, scores_nq: NDArray[np.float64], ids: tuple[str, ...]) -> str:
    columns = {score_column(query_id): scores_nq[::-1, q] for q, query_id in enumerate(ids)}
    pq.write_table(pa.table({"sequence_id": np.arange(corpus.sequences)[::-1], **columns}), path)
    return str(path)


def test_a_study_is_repeated_from_storage_and_written_as_tables(tmp_path: Path, corpus: PreparedCorpus) -> None:
    study = open_study(tmp_path, corpus, replace(STUDY, qld=True))
    methods = {"one": noise(corpus, 0), "other": noise(corpus, 1)}
    rows = study.run(methods, {"a": [3]})
    trained = {entry.name for entry in study.store.list("lds/retrained")}
    # Eight of LDS, and of QLD: two of the baseline, and one for each query, method (the control too) and seed.
    assert 8 + 2 + 2 < len(trained) <= 8 + 2 + 2 * 3 * 2

    again = open_study(tmp_path, corpus, replace(STUDY, qld=True, max_hours=1e-9))
    assert again.run(methods, {"a": [3]}) == rows
    assert {entry.name for entry in study.store.list("lds/retrained")} == trained

    assert [(row["measure"], row["method"], row["minus"]) for row in rows] == [
        ("lds", "one", None),
        ("lds", "other", None),
        ("lds", "random", None),
        ("lds", "one", "other"),
        ("lds", "one", "random"),
        ("qld", "one", None),
        ("qld", "other", None),
        ("qld", "random", None),
        ("qld", "one", "other"),
        ("qld", "one", "random"),
    ]
    assert len(lines(rows)) == 1 + len(rows)
    assert pq.read_table(tmp_path / "lds" / "lds.parquet").to_pylist() == rows
    measured = pq.read_table(tmp_path / "lds" / "measurements.parquet")
    assert measured.column_names == [
        "subset",
        "query_id",
        "actual",
        "predicted_one",
        "predicted_other",
        "predicted_random",
    ]
    assert measured.num_rows == 4 * 2
    by_query = pq.read_table(tmp_path / "lds" / "queries.parquet").to_pylist()
    assert {row["query_id"] for row in by_query} == {"a", "b"}
    missing = np.flatnonzero(~half_subsets(corpus.sequences, 4, 0)[:, 3]).tolist()
    left_out = pq.read_table(tmp_path / "lds" / "left_out.parquet").to_pylist()
    assert {"trainings": "lds", "query_id": "a", "rows": missing, "of": 4} in left_out
    assert any(f"a: {len(missing)} of 4 trainings (lds) saw none" in sentence for sentence in again.missed())


def test_the_truth_itself_has_lds_1(tmp_path: Path, corpus: PreparedCorpus) -> None:
    """Scores whose sums over the subsets are the measurements: least squares on the retrainings themselves."""
    study = open_study(tmp_path, corpus)
    kept_mn = half_subsets(corpus.sequences, 4, 0)
    actual_mq = actual(study.retrainer, kept_mn, range(2)).mean(axis=1)
    fitted_nq = np.linalg.lstsq(kept_mn.astype(float), actual_mq, rcond=None)[0]
    assert study.run({"fitted": fitted_nq})[0]["mean"] == pytest.approx(1)


def test_queries_measure_what_the_full_model_says(tmp_path: Path, corpus: PreparedCorpus) -> None:
    study = open_study(tmp_path, corpus)
    model = study.full_model()
    values = measure_queries(model, study.queries)
    assert study.query_ids == ["a", "b"]
    np.testing.assert_allclose(study.retrainer.measure(study.sequence_ids, 0), values, rtol=1e-6)
    assert not np.allclose(study.retrainer.measure(study.sequence_ids[::2], 0), values)


def test_other_queries_or_settings_are_other_trainings(tmp_path: Path, corpus: PreparedCorpus) -> None:
    study = open_study(tmp_path, corpus)
    longer = replace(STUDY, training=replace(STUDY.training, epochs=2))
    fewer = RetrainingStudy(STUDY, corpus, QUERIES[:1], study.store)
    others = [
        open_study(tmp_path, corpus, longer),
        open_study(tmp_path, corpus, replace(STUDY, vary_initial=True)),
        fewer,
    ]
    assert len({one.retrainer.fingerprint for one in [study, *others]}) == 4
    more = replace(STUDY, subsets=9, qld=True, max_hours=9)
    assert open_study(tmp_path, corpus, more).retrainer.fingerprint == study.retrainer.fingerprint
    study.claim()
    fewer.claim()
    with pytest.raises(RunError, match="another recipe"):
        others[0].claim()


def test_days_are_refused_before_anything_is_retrained(tmp_path: Path, corpus: PreparedCorpus) -> None:
    study = open_study(tmp_path, corpus, replace(STUDY, max_hours=1e-9))
    with pytest.raises(ConfigError, match=r"8 trainings of .* s each would take .* hours, more than max_hours=1e-09"):
        study.run({"one": noise(corpus, 0)})
    assert not study.store.list("lds")


def test_scores_are_aligned_by_sequence_and_query(tmp_path: Path, corpus: PreparedCorpus) -> None:
    study, scores = open_study(tmp_path, corpus), noise(corpus, 0)
    uri = write_scores(tmp_path / "s.parquet", corpus, scores[:, ::-1], ("b", "a"))
    assert np.array_equal(study.scores(uri), scores)


@pytest.mark.parametrize("case", ["no query", "no sequence", "nan", "no run"])
def test_scores_that_do_not_fit_are_refused(tmp_path: Path, corpus: PreparedCorpus, case: str) -> None:
    study, scores = open_study(tmp_path, corpus), noise(corpus, 0)
    if case == "nan":
        scores[4, 1] = np.nan
    uri = write_scores(tmp_path / "s.parquet", corpus, scores, ("a", "x" if case == "no query" else "b"))
    if case == "no sequence":
        pq.write_table(pq.read_table(uri).slice(1), uri)
    said = {
        "no query": "no column score_b",
        "no sequence": "scores 19 sequences",
        "nan": "NaN",
        "no run": "no run folder",
    }
    with pytest.raises(RunError, match=said[case]):
        study.scores(str(tmp_path / "empty") if case == "no run" else uri)


@pytest.mark.parametrize("methods", [{}, {"random": np.zeros((20, 2))}])
def test_the_control_is_the_studys_own(
    tmp_path: Path, corpus: PreparedCorpus, methods: dict[str, NDArray[np.float64]]
) -> None:
    with pytest.raises(ConfigError, match="none of them named 'random'"):
        open_study(tmp_path, corpus).run(methods)


def test_a_scan_of_another_model_or_corpus_is_refused(tmp_path: Path, corpus: PreparedCorpus) -> None:
    study = open_study(tmp_path, corpus)
    study.full_model().save_pretrained(tmp_path / "model")
    run = Store(str(tmp_path / "run"))
    for what in ("corpus", "model"):
        fingerprint = corpus.fingerprint if what == "model" else "another"
        run.write_json("plan.json", {"corpus_fingerprint": fingerprint, "inputs": {"model": "another"}})
        with pytest.raises(RunError, match=f"scanned another {what}"):
            study.scores(run.uri)
    inputs = {"model": describe(str(tmp_path / "model"), "mlp").fingerprint}
    plan = {"corpus_fingerprint": corpus.fingerprint, "inputs": inputs, "attention": "within"}
    run.write_json("plan.json", plan)
    with pytest.raises(RunError, match=r"corpus\.attention=within, and this study trains across documents"):
        study.scores(run.uri)


def test_proponents_are_read_by_query(tmp_path: Path) -> None:
    path = tmp_path / "proponents.jsonl"
    path.write_text(json.dumps({"query_id": "a", "sequence_ids": [3, 4]}) + "\n")
    assert read_proponents(str(path)) == {"a": [3, 4]}
    path.write_text('{"query_id": "a"}\n')
    with pytest.raises(ConfigError, match="line 1: write query_id"):
        read_proponents(str(path))


def run_job(*overrides: str) -> str:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, str(root / "jobs" / "lds.py"), *overrides], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_job_trains_a_model_to_scan_and_then_judges_scores(tmp_path: Path, corpus: PreparedCorpus) -> None:
    queries = tmp_path / "queries.jsonl"
    queries.write_text("".join(json.dumps({"id": i, "input_ids": [5, 6, 7], "prompt_len": 1}) + "\n" for i in "ab"))
    overrides = [
        f"corpus.path={corpus.store}",
        f"queries.path={queries}",
        "tokenizer=null",
        *("study.model.layers=1", "study.model.width=8", "study.model.heads=2", "study.model.mlp_width=8"),
        "study.training.epochs=1",
        "study.subsets=3",
        "study.seeds=1",
        f"output={tmp_path / 'out'}",
    ]
    said = run_job(*overrides)
    assert said.startswith("trained by AdamW")
    assert "then add scores.<method>=<run>" in said
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    uri = write_scores(tmp_path / "s.parquet", corpus, noise(corpus, 0), ("a", "b"))
    judged = run_job(*overrides, f"scores.mine={uri}")
    assert [line.split()[:2] for line in judged.splitlines()[2:5]] == [
        ["lds", "mine"],
        ["lds", "random"],
        ["lds", "mine"],
    ]
    assert (tmp_path / "out" / "lds" / "lds.parquet").exists()
    assert (tmp_path / "out" / "model" / "model.safetensors").read_bytes() == weights
