"""The TF-IDF job: the same rows however it is cut and resumed, and a corpus that a scan takes as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from infscan.config.jobs import TfidfJob
from infscan.corpus.tfidf import document_frequencies, top_matches
from infscan.errors import ConfigError
from infscan.steps import tfidf
from infscan.steps.prepare import prepare_corpus
from infscan.steps.tfidf import tfidf_filter
from tests.steps.runs import VOCAB, answer_here, compose, open_here, small_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 documents, prepared."""
    base = tmp_path_factory.mktemp("tfidf")
    with open_here(small_run(base, "scan.scores=all")) as run:
        prepare_corpus(run)
    return base


def filtered(folder: Path, name: str, **settings: Any) -> list[dict[str, Any]]:
    config = compose(
        "tfidf",
        f"model.path={folder / 'model'}",
        f"corpus.path={folder / 'run' / 'corpus'}",
        f"queries.path={folder / 'queries.jsonl'}",
        f"output={folder / name}",
        *(f"tfidf.{key}={value}" for key, value in settings.items()),
    )
    assert isinstance(config, TfidfJob)
    with open_here(config) as run:
        rows: list[dict[str, Any]] = tfidf_filter(run, prepare_corpus(run), config.tfidf).to_pylist()
    assert pq.read_table(folder / name / "candidates.parquet").to_pylist() == rows
    return rows


def test_rows_are_those_of_one_pass_in_memory_whatever_the_slices(folder: Path) -> None:
    config = small_run(folder, "scan.scores=all")
    with open_here(config, needs_queries=True) as run:
        corpus = prepare_corpus(run)
        tokens = [sequence.token_ids for sequence in corpus.read(np.arange(corpus.sequences))]
        queries = [np.asarray(query.parts[0].token_ids) for query in run.queries]
        ids = run.inputs.query_ids
    idf = document_frequencies(tokens, VOCAB).idf()
    expected = [
        {"query_id": query_id, "rank": rank, "sequence_id": int(number), "score": float(score)}
        for query_id, rows in zip(ids, top_matches(enumerate(tokens), queries, idf, 7), strict=True)
        for rank, (number, score) in enumerate(zip(rows.sequence_ids, rows.scores, strict=True), start=1)
    ]
    for size in (3, 16):
        assert filtered(folder, f"slices-{size}", top_k=7, slice_sequences=size) == expected
    sampled = filtered(folder, "sampled", top_k=7, idf_sequences=20)
    assert len(sampled) == len(expected)
    assert filtered(folder, "sampled-all", top_k=7, idf_sequences=40) == expected


def test_an_interrupted_filter_goes_on_and_ends_with_the_same_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = filtered(folder, "whole", top_k=5, slice_sequences=4)
    real, seen = tfidf.merge, []

    def breaks(*arguments: Any) -> Any:
        seen.append(1)
        if len(seen) == 9:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(tfidf, "merge", breaks)
    with pytest.raises(KeyboardInterrupt):
        filtered(folder, "broken", top_k=5, slice_sequences=4)
    kept = [path.name for path in (folder / "broken" / "tfidf").rglob("*.parquet")]
    assert any("scores" in name for name in kept)
    assert not (folder / "broken" / "addressable.json").exists()
    monkeypatch.setattr(tfidf, "merge", real)
    assert filtered(folder, "broken", top_k=5, slice_sequences=4) == whole
    assert not list((folder / "broken" / "tfidf").rglob("*.parquet"))


@pytest.mark.slow
def test_a_scan_of_the_filtered_corpus_has_the_whole_corpuss_numbers_factors_and_scores(folder: Path) -> None:
    answer_here(small_run(folder, "scan.scores=all"))
    rows = filtered(folder, "few", top_k=6)
    chosen = sorted({row["sequence_id"] for row in rows})
    config = compose(
        "scan",
        *(f"model.path={folder / 'model'}", f"corpus.path={folder / 'few'}"),
        *(f"queries.path={folder / 'queries.jsonl'}", f"factors.path={folder / 'run' / 'factors'}"),
        *("factors.slices=2", "scan.rank=8", "scan.top_k=5", "scan.shard_sequences=5", "scan.tokens_per_batch=256"),
        f"output={folder / 'scan-few'}",
    )
    answer_here(config)
    whole = pq.read_table(folder / "run" / "scores").to_pandas().set_index("sequence_id")
    top = pq.read_table(folder / "scan-few" / "top").to_pandas()
    assert set(top["sequence_id"]) <= set(chosen)
    for row in top.itertuples():
        assert row.scan_score == pytest.approx(whole.loc[row.sequence_id, f"score_{row.query_id}"], rel=1e-5)
    shown = pq.read_table(folder / "scan-few" / "sequences").to_pandas().set_index("sequence_id")
    assert all(shown.loc[number, "document_id"] == f"d{number}" for number in shown.index)


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    paths = [f"{key}.path={tmp_path}" for key in ("model", "corpus", "queries")]
    with pytest.raises(ConfigError, match=r"tfidf\.top_k=0: must be greater than 0"):
        compose("tfidf", *paths, "tfidf.top_k=0")
