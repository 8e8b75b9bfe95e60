"""A published run is read alike by DuckDB, Polars, pandas and infscan, with the very code that the documents show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import infscan
from infscan.corpus.sequences import Sequence, Span
from infscan.influence.topk import OPPONENT, PROPONENT, SIDES
from infscan.influence.topk_tracker import ScoredRows
from infscan.results.dense import write_scores
from infscan.results.manifest import SUCCESS
from infscan.results.publish import Publisher, rank_rows
from infscan.results.refined import Margins
from infscan.results.shard_file import ShardCounts, write_shard
from infscan.storage import Store
from tests.conftest import Bucket

ROOT = Path(__file__).resolve().parents[1]
READERS = ("duckdb", "polars", "pandas", "infscan")
QUERIES = ("astrobia", "gleem")
LAYERS = ("h.0.mlp", "h.1.mlp")
TOP_K, LENGTH = 12, 6
Row = tuple[str, int, float, str]


def decode(token_ids: list[int]) -> str:
    return " ".join(f"word{token}" for token in token_ids)


def publish_run(uri: str, *, sequences: int = 40, seed: int = 0) -> list[Row]:
    """Two shards, two queries, both sides, as a finished run; returns the ten strongest proponents of `astrobia`."""
    rng = np.random.default_rng(seed)
    store = Store(uri)
    # margins[query, sequence, layer, token]; a score is the sum over layers and tokens.
    margins = rng.normal(size=(len(QUERIES), sequences, len(LAYERS), LENGTH)).astype(np.float32)
    scores_qn = margins.sum(axis=(2, 3))
    corpus = [
        Sequence(n, rng.integers(0, 99, LENGTH), (Span(f"d{n}", f"s{n % 3}", 0, LENGTH),), 10 * n, "corpus.jsonl")
        for n in range(sequences)
    ]
    half = sequences // 2
    for shard, ids in enumerate((np.arange(half), np.arange(half, sequences))):
        pairs = [(query, n) for query in range(len(QUERIES)) for n in ids.tolist()]
        hits = ScoredRows(
            queries=np.asarray([query for query, _ in pairs], np.int32),
            sides=np.asarray([SIDES.index(PROPONENT if scores_qn[pair] > 0 else OPPONENT) for pair in pairs], np.int8),
            sequence_ids=np.asarray([n for _, n in pairs], np.int64),
            scores=np.asarray([scores_qn[pair] for pair in pairs], np.float32),
        )
        counts = ShardCounts(len(ids), len(ids) * LENGTH, 0, len(ids), len(hits))
        mine = [corpus[n] for n in ids.tolist()]
        losses = np.ones(len(ids), np.float32)
        write_scores(store, f"shard-{shard:06d}", mine, scores_qn[:, ids].T, QUERIES, "run")
        write_shard(store, f"shard-{shard:06d}", mine, losses, hits, QUERIES, counts, "run")
    # Every sequence is a candidate on both sides: rank_rows leaves out what has the other sign.
    places = np.indices((len(QUERIES), len(SIDES), sequences)).reshape(3, -1)
    queries, sides, ids = places[0].astype(np.int32), places[1].astype(np.int8), places[2]
    scores = scores_qn[queries, ids]
    ranking = rank_rows(ScoredRows(queries, sides, ids, scores), scores, TOP_K)

    def margins_of(rows: np.ndarray) -> Margins:
        found = margins[queries[rows], ids[rows]]
        return Margins(found.sum(axis=2), list(found.sum(axis=1)))

    publisher = Publisher(store, LAYERS, QUERIES, decode, "run")
    published = np.unique(ranking.sequence_ids)
    wanted = [("shard-000000", published[published < half]), ("shard-000001", published[published >= half])]
    documents = publisher.documents(wanted)
    publisher.write_rows(ranking, margins_of, documents, LENGTH)
    publisher.write_sequences(wanted, documents)
    store.write_json("summary.json", {"counts": {"scanned": {"sequences": sequences}}})
    store.write(SUCCESS, b"")
    order = np.argsort(-scores_qn[0])[:10]
    return [
        ("astrobia", rank, float(scores_qn[0, n]), decode(corpus[n].token_ids.tolist()))
        for rank, n in enumerate(order.tolist(), start=1)
    ]


def documented() -> dict[str, str]:
    """The code blocks of README.md and docs/reading.md that read one run, by page and reader."""
    found = {}
    for page in (ROOT / "README.md", ROOT / "docs" / "reading.md"):
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            if (first := re.match(r"# reading: (\w+)\n", block)) and first[1] in READERS:
                found[f"{page.name}-{first[1]}"] = block
    return found


def rows_of(answer: Any) -> list[Row]:
    if isinstance(answer, duckdb.DuckDBPyRelation):
        return answer.fetchall()
    if isinstance(answer, pl.DataFrame):
        return answer.rows()
    if isinstance(answer, pd.DataFrame):
        return list(answer.itertuples(index=False, name=None))
    assert isinstance(answer, pa.Table)
    return [tuple(row.values()) for row in answer.to_pylist()]


def assert_same_rows(rows: list[Row], expected: list[Row]) -> None:
    assert [(row[0], row[1], row[3]) for row in rows] == [(row[0], row[1], row[3]) for row in expected]
    np.testing.assert_allclose([row[2] for row in rows], [row[2] for row in expected], rtol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Row]]:
    uri = str(tmp_path_factory.mktemp("run"))
    return uri, publish_run(uri)


@pytest.mark.parametrize("name", documented())
def test_the_documents_code_finds_the_strongest_proponents(run: tuple[str, list[Row]], name: str) -> None:
    uri, expected = run
    code = documented()[name]
    assert re.search("runs/(demo|mine)", code)
    code = re.sub("runs/(demo|mine)", uri, code).replace("'capital'", "'astrobia'")
    names: dict[str, Any] = {}
    exec(compile(code, f"<{name}>", "exec"), names)
    assert_same_rows(rows_of(names["answer"]), expected)


def test_every_reader_is_documented() -> None:
    assert {name.rpartition("-")[2] for name in documented()} == set(READERS)


def test_the_margins_add_up_to_the_published_scores(run: tuple[str, list[Row]]) -> None:
    uri, _ = run
    top = {(row["query_id"], row["sequence_id"]): row["score"] for row in infscan.read_top(uri).to_pylist()}
    layers = dict.fromkeys(top, 0.0)
    for row in infscan.read_layers(uri).to_pylist():
        layers[row["query_id"], row["sequence_id"]] += row["score"]
    tokens = {(row["query_id"], row["sequence_id"]): sum(row["scores"]) for row in infscan.read_tokens(uri).to_pylist()}
    assert layers == pytest.approx(top, abs=1e-5)
    assert tokens == pytest.approx(top, abs=1e-5)


def test_top_holds_each_side_by_rank(run: tuple[str, list[Row]]) -> None:
    uri, _ = run
    order = [(row["query_id"], row["side"], row["rank"]) for row in infscan.read_top(uri).to_pylist()]
    assert order == sorted(order)
    assert {(query, side) for query, side, _ in order} == {(query, side) for query in QUERIES for side in SIDES}
    assert max(rank for *_, rank in order) == TOP_K


def test_a_run_on_s3_is_read_like_a_local_one(run: tuple[str, list[Row]], s3: Bucket) -> None:
    uri, remote = run[0], s3.uri()
    publish_run(remote)
    for read in (
        infscan.read_top,
        infscan.read_sequences,
        infscan.read_layers,
        infscan.read_tokens,
        infscan.read_scores,
    ):
        assert read(remote).equals(read(uri)), read.__name__
    assert infscan.read_summary(remote) == infscan.read_summary(uri)


def test_duckdb_reads_s3_through_fsspec(s3: Bucket) -> None:
    remote = s3.uri()
    expected = publish_run(remote)
    with duckdb.connect() as connection:
        connection.register_filesystem(fsspec.filesystem("s3", skip_instance_cache=True))
        rows = connection.sql(f"""
            SELECT query_id, rank, score, text
            FROM '{remote}/top/*.parquet' JOIN '{remote}/sequences/*.parquet' USING (sequence_id)
            WHERE query_id = 'astrobia' AND side = 'proponent' AND rank <= 10
            ORDER BY rank
        """).fetchall()
    assert_same_rows(rows, expected)


def test_reading_tables_imports_neither_torch_nor_ray(run: tuple[str, list[Row]]) -> None:
    code = f"""
import sys, infscan
heavy = {{"torch", "transformers", "ray", "deepspeed"}}
assert not {{*heavy, "pyarrow"}} & set(sys.modules), "import infscan is no longer quick"
assert infscan.read_top({run[0]!r}).num_rows == {2 * 2 * TOP_K}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_everything_promised_is_exported() -> None:
    assert set(infscan.__all__) <= set(dir(infscan))
    assert all(getattr(infscan, name) for name in infscan.__all__)
    with pytest.raises(AttributeError, match="no_such_reader"):
        _ = infscan.no_such_reader
