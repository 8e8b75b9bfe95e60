"""What people read: sorted, ranked from 1, margins that add up, each sequence once, nothing stale."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.results import publish, read
from infscan.results.manifest import TABLES
from infscan.results.publish import Publisher, is_spurious
from infscan.results.schema import LAYERS as LAYERS_SCHEMA
from infscan.results.schema import ROW_DOCUMENTS, SEQUENCES, TOKENS, TOP, footer_of
from infscan.storage import Store
from tests.conftest import Bucket
from tests.results.builders import LAYERS, QUERIES, margins_of, published, publisher, ranked


@pytest.fixture
def run(tmp_path: Path) -> Store:
    store = Store(str(tmp_path))
    published(store)
    return store


def test_top_is_sorted_and_ranked_from_one(run: Store) -> None:
    rows = read.read_top(run.uri).to_pylist()
    keys = [(row["query_id"], row["side"], row["rank"]) for row in rows]
    assert keys == sorted(keys)
    assert keys == [
        ("alpha", "opponent", 1),
        ("alpha", "opponent", 2),
        ("alpha", "proponent", 1),
        ("alpha", "proponent", 2),
        ("alpha", "proponent", 3),
        ("beta#1", "proponent", 1),
    ]
    assert [row["sequence_id"] for row in rows] == [11, 2, 1, 12, 3, 1]
    for row in rows:
        assert (row["score"] > 0) == (row["side"] == "proponent")
    assert rows[2]["scan_score"] == pytest.approx(0.9 * rows[2]["score"])


def test_a_row_is_named_after_the_document_that_carries_it(run: Store) -> None:
    tokens = {(row["query_id"], row["sequence_id"]): row["scores"] for row in read.read_tokens(run.uri).to_pylist()}
    rows = read.read_top(run.uri).to_pylist()
    found: dict[tuple[str, int], list[dict]] = {}
    for row in read.read_documents(run.uri).to_pylist():
        found.setdefault((row["query_id"], row["sequence_id"]), []).append(row)
    names = set()
    for row in rows:
        pair = row["query_id"], row["sequence_id"]
        # Tokens 0 and 1 are of one document, 2 is a separator, the others are of another document.
        sums = {f"doc-{pair[1]}": sum(tokens[pair][:2]), f"doc-{pair[1]}b": sum(tokens[pair][3:])}
        assert {each["document_id"]: each["score"] for each in found[pair]} == pytest.approx(sums, rel=1e-5)
        name = max(sums, key=lambda name: sums[name] * np.sign(row["score"]))
        assert (row["document_id"], row["source"]) == (name, "books" if name.endswith("b") else "web")
        assert row["document_share"] == pytest.approx(sums[name] / row["score"], rel=1e-4)
        names.add(name[-1])
    assert "b" in names
    assert len(names) > 1


def test_a_sequence_is_named_after_the_document_that_carries_most_of_its_rows(run: Store) -> None:
    weights: dict[int, dict[str, float]] = {}
    for row in read.read_documents(run.uri).to_pylist():
        mine = weights.setdefault(row["sequence_id"], {})
        mine[row["document_id"]] = mine.get(row["document_id"], 0.0) + abs(row["score"])
    for row in read.read_sequences(run.uri).to_pylist():
        assert row["document_id"] == max(weights[row["sequence_id"]], key=weights[row["sequence_id"]].__getitem__)


def test_margins_add_up_to_the_scores(run: Store) -> None:
    layers, tokens = read.read_layers(run.uri).to_pylist(), read.read_tokens(run.uri).to_pylist()
    for row in read.read_top(run.uri).to_pylist():
        pair = (row["query_id"], row["sequence_id"])
        by_layer = {r["layer"]: r["score"] for r in layers if (r["query_id"], r["sequence_id"]) == pair}
        (by_token,) = [r["scores"] for r in tokens if (r["query_id"], r["sequence_id"]) == pair]
        assert list(by_layer) == LAYERS
        assert sum(by_layer.values()) == pytest.approx(row["score"], rel=1e-5)
        assert sum(by_token) == pytest.approx(row["score"], rel=1e-5)
        assert row["spurious"] == is_spurious(np.asarray(by_token, np.float32))


def test_sequences_are_there_once_each_with_text_and_provenance(run: Store) -> None:
    rows = read.read_sequences(run.uri).to_pylist()
    assert [row["sequence_id"] for row in rows] == [1, 2, 3, 11, 12]
    row = rows[3]
    assert row["text"] == "11 12 13 14 15"
    assert row["token_ids"] == [11, 12, 13, 14, 15]
    assert (row["byte_offset"], row["loss"]) == (11000, 1.375)
    assert [document["id"] for document in row["documents"]] == ["doc-11", "doc-11b"]


def test_without_a_tokenizer_text_is_null(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    published(store)
    made = publisher(store)
    wanted = [("shard-000000", np.asarray([1]))]
    made.write_sequences(wanted, made.documents(wanted))
    made.remove_stale()
    assert read.read_sequences(store.uri)["text"].to_pylist() == [None]


def test_a_publication_is_the_same_bytes_twice(tmp_path: Path) -> None:
    first, second = Store(str(tmp_path / "a")), Store(str(tmp_path / "b"))
    for store in (first, second):
        published(store)
    for folder in TABLES:
        for entry in first.list(folder):
            assert first.read(entry.name) == second.read(entry.name)


def test_many_queries_and_shards_make_parts_and_stale_ones_go(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {folder: read._read(run.uri, folder, unfinished=False) for folder in TABLES}
    monkeypatch.setattr(publish, "_QUERIES_PER_PART", 1)
    monkeypatch.setattr(publish, "_SHARDS_PER_PART", 1)
    published(run)
    assert [entry.name[:14] for entry in run.list("top")] == [f"top/part-{part:05d}" for part in range(3)]
    assert len(run.list("sequences")) == 2
    for folder, table in before.items():
        assert read._read(run.uri, folder, unfinished=False).equals(table)
    monkeypatch.undo()
    published(run)
    for folder in before:
        assert len(run.list(folder)) == 1


@pytest.mark.parametrize("queries", [[], QUERIES])
def test_a_run_without_rows_has_readable_empty_tables(tmp_path: Path, queries: list[str]) -> None:
    store = Store(str(tmp_path))
    made = Publisher(store, LAYERS, queries, None, "print")
    documents = made.documents([])
    made.write_rows(ranked([]), margins_of([]), documents, 5)
    made.write_sequences([], documents)
    made.remove_stale()
    tables = {"top": TOP, "layers": LAYERS_SCHEMA, "tokens": TOKENS, "sequences": SEQUENCES, "documents": ROW_DOCUMENTS}
    for name, schema in tables.items():
        table = getattr(read, f"read_{name}")(store.uri, unfinished=True)
        assert (table.num_rows, table.schema) == (0, schema)


def test_files_carry_the_schema_version_the_fingerprint_and_statistics(run: Store) -> None:
    for folder in TABLES:
        (entry,) = run.list(folder)
        with run.open(entry.name) as stream:
            file = pq.ParquetFile(stream)
            facts = {"schema_version": 1, "fingerprint": "print"}
            assert facts.items() <= footer_of(file.schema_arrow, "x").items()
            column = file.metadata.row_group(0).column(0)
            assert (column.compression, column.is_stats_set) == ("ZSTD", True)


def test_the_same_on_an_object_store(s3: Bucket) -> None:
    store = Store(s3.uri())
    published(store)
    assert read.read_top(store.uri).num_rows == 6
    assert read.read_sequences(store.uri).num_rows == 5
    assert read.read_summary(store.uri) == {"counts": {}}


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(0, 99), st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, np.nan, np.inf]), max_size=12),
    st.integers(1, 5),
)
def test_ranks_follow_the_refined_score_alone(scores: dict[int, float], top_k: int) -> None:
    for side, sign in (("proponent", 1), ("opponent", -1)):
        rows = ranked([("alpha", side, index, score) for index, score in scores.items()], top_k)
        wanted = sorted((-sign * s, i) for i, s in scores.items() if np.isfinite(s) and sign * s > 0)[:top_k]
        assert list(zip((-sign * rows.scores).tolist(), rows.sequence_ids.tolist(), strict=True)) == wanted
        assert rows.ranks.tolist() == list(range(1, len(rows) + 1))


def test_a_row_whose_sign_changed_when_refined_leaves_its_side() -> None:
    rows = ranked([("alpha", "proponent", 1, 2.0), ("alpha", "proponent", 2, -0.1)])
    assert rows.sequence_ids.tolist() == [1]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0, 5, 0], True),
        ([3, -3, 3, -3], False),
        ([10, 1, 1], True),
        ([1, 1], True),
        ([1, 1, 1], False),
        ([0, 0], False),
    ],
)
def test_spurious_rows_hang_on_a_few_tokens(scores: list[float], expected: bool) -> None:
    values = np.asarray(scores, np.float32)
    assert is_spurious(values) == expected
    assert is_spurious(-1e-20 * values) == expected
