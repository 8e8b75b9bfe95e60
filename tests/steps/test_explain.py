"""jobs/explain.py on a finished run: what it says agrees with what was published, and with itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from infscan.config import Backend, ClusterConfig, Config
from infscan.config.jobs import ExplainJob
from infscan.errors import ConfigError, CorpusError, QueryError, RunError
from infscan.report.explanation import show_explanation
from infscan.report.terminal import by_id
from infscan.results.read import read_layers, read_sequences, read_tokens, read_top
from infscan.steps.explain import explain
from infscan.steps.finished import reopen
from infscan.steps.run import Run
from tests.steps.runs import answer_here, compose, text_corpus, text_queries, tiny_model, write_jsonl

# A real Ray, for half a minute.
pytestmark = pytest.mark.slow
CLUSTER = ClusterConfig()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A scan of texts, joined into sequences of 16 tokens, in a folder that was moved since; its inputs are gone."""
    root = tmp_path_factory.mktemp("explain")
    tiny_model(root / "model", tokenizer=True)
    corpus, queries = text_corpus(root / "corpus.jsonl", 30), text_queries(root / "queries.jsonl", 2)
    answer_here(_scan(root, corpus, queries, "scan.top_k=6", "corpus.sequence_length=16"))
    (root / "made").rename(root / "run")
    corpus.unlink()
    queries.unlink()
    return str(root / "run")


def _scan(root: Path, corpus: Path, queries: Path, *overrides: str) -> Config:
    return compose(
        "scan",
        f"model.path={root / 'model'}",
        f"corpus.path={corpus}",
        f"queries.path={queries}",
        "factors.slices=1",
        f"output={root / 'made'}",
        *overrides,
    )


@pytest.fixture(scope="module")
def opened(run: str) -> Iterator[Run]:
    with reopen(run, replace(CLUSTER, backend=Backend.in_process)) as opened:
        yield opened


def explained(opened: Run, **settings: object) -> tuple[ExplainJob, dict[str, pa.Table]]:
    job = ExplainJob(run=opened.store.uri, **settings)  # type: ignore[arg-type]
    job.check()
    return job, explain(opened, job)


@pytest.fixture(scope="module")
def found(opened: Run) -> dict[str, pa.Table]:
    return explained(opened, rows=4, matrix=True)[1]


def near(ours: float, theirs: float) -> bool:
    return bool(np.isclose(ours, theirs, rtol=1e-4, atol=1e-4))


def test_the_rows_are_the_published_ones_with_their_scores(run: str, found: dict[str, pa.Table]) -> None:
    top = [row for row in read_top(run).to_pylist() if row["rank"] <= 4]
    key = {(row["query_id"], row["side"], row["rank"], row["sequence_id"]): row["score"] for row in top}
    mine = found["rows"].to_pylist()
    assert {(row["query_id"], row["side"], row["rank"], row["sequence_id"]) for row in mine} == set(key)
    scale = max(map(abs, key.values()))
    for row in mine:
        assert abs(row["score"] - key[row["query_id"], row["side"], row["rank"], row["sequence_id"]]) < 1e-5 * scale


def test_every_margin_adds_up_to_the_score(found: dict[str, pa.Table]) -> None:
    """Within 1e-5 of the largest score: layers, input positions, output tokens, the completion's tokens, the matrix."""
    scores = {(row["query_id"], row["item"]): row["score"] for row in found["rows"].to_pylist()}
    scale = max(map(abs, scores.values()))
    sums: dict[str, dict[tuple[str, str], float]] = {}
    for name, column in (("layers", "score"), ("tokens", "score"), ("tokens", "output"), ("completion", "score")):
        mine = sums.setdefault(f"{name}.{column}", dict.fromkeys(scores, 0.0))
        for row in found[name].to_pylist():
            mine[row["query_id"], row["item"]] += row[column]
    for name in ("matrix", "completion"):
        mine = sums.setdefault(f"{name}.scores", dict.fromkeys(scores, 0.0))
        for row in found[name].to_pylist():
            mine[row["query_id"], row["item"]] += sum(row["scores"])
    for name, mine in sums.items():
        for pair, score in scores.items():
            assert abs(mine[pair] - score) < 1e-5 * scale, (name, pair)


def test_the_margins_are_those_that_were_published(run: str, found: dict[str, pa.Table]) -> None:
    by_token = {(row["query_id"], str(row["sequence_id"])): row["scores"] for row in read_tokens(run).to_pylist()}
    by_layer = {
        (row["query_id"], str(row["sequence_id"]), row["layer"]): row["score"] for row in read_layers(run).to_pylist()
    }
    for row in found["tokens"].to_pylist():
        assert near(row["score"], by_token[row["query_id"], row["item"]][row["position"]])
    for row in found["layers"].to_pylist():
        assert near(row["score"], by_layer[row["query_id"], row["item"], row["layer"]])


def test_a_neighbour_goes_on_in_the_same_document(run: str, found: dict[str, pa.Table]) -> None:
    first = {str(row["sequence_id"]): row["documents"][0]["id"] for row in read_sequences(run).to_pylist()}
    rows = found["neighbours"].to_pylist()
    assert rows
    for row in rows:
        assert row["sequence_id"] == int(row["item"]) + row["offset"]
        if row["offset"] < 0:
            assert row["document_id"] == first[row["item"]]


def test_a_given_text_is_explained_as_the_same_sequence_of_the_corpus(opened: Run, tmp_path: Path) -> None:
    number = read_top(opened.store.uri)["sequence_id"][0].as_py()
    _, there = explained(opened, sequences=[number], output=str(tmp_path / "there"))
    tokens = there["tokens"].filter(pc.field("query_id") == "q0").sort_by("position")["token_id"].to_pylist()
    write_jsonl(tmp_path / "texts.jsonl", [{"id": "same", "input_ids": tokens}])
    job, given = explained(opened, texts=str(tmp_path / "texts.jsonl"), output=str(tmp_path / "given"))
    for name, columns in (("rows", ["score"]), ("layers", ["score"]), ("tokens", ["score", "output", "input"])):
        assert there[name]["query_id"].to_pylist() == given[name]["query_id"].to_pylist()
        for column in columns:
            ours, theirs = given[name][column].to_numpy(), there[name][column].to_numpy()
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())
    assert set(given["rows"]["item"].to_pylist()) == {"same"}
    assert given["rows"]["sequence_id"].null_count == given["rows"].num_rows
    for name, table in given.items():
        assert pq.read_table(f"{job.folder}/{name}.parquet").to_pylist() == table.to_pylist()


def test_a_screen_says_every_row(opened: Run, found: dict[str, pa.Table], capsys: pytest.CaptureFixture[str]) -> None:
    queries = {query.id: query for query in opened.queries}
    show_explanation(found, queries, by_id(opened.store.uri, "queries"))
    shown = capsys.readouterr().out
    explained_queries = set(found["rows"]["query_id"].to_pylist())
    assert shown.count("  the model gives it -") == len(explained_queries)
    for row in found["rows"].to_pylist():
        assert f"sequence {row['item']}  {row['document_id']}" in shown
    assert "as output" in shown
    assert "raised" in shown


def test_what_is_not_there_is_refused_by_name(opened: Run, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="'nobody' is none of the run's"):
        explained(opened, query_ids=["nobody"])
    with pytest.raises(CorpusError, match="1 tokens; a sequence has 2 to 64"):
        explained(opened, text="a")
    with pytest.raises(ConfigError, match="give one of them"):
        explained(opened, text="a", sequences=[1])
    with pytest.raises(RunError, match="not finished"):
        reopen(str(tmp_path), CLUSTER)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"id": "a b", "text": "the river"}) + "\n")
    with pytest.raises(CorpusError, match=r"line 1: id 'a b'"):
        explained(opened, texts=str(tmp_path / "texts.jsonl"))
