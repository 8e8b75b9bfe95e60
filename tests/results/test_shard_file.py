"""A shard's file gives back its hits, counts and tokens, and its bytes depend on what it holds alone."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.errors import DamagedError, RunError
from infscan.influence.topk_tracker import ScoredRows
from infscan.results.shard_file import (
    GIVEN,
    MOST_SOURCES,
    ScanCounts,
    ShardCounts,
    count_sources,
    finished_shards,
    read_candidates,
    read_hits,
    shard_path,
    write_shard,
)
from infscan.storage import Store
from tests.conftest import Bucket
from tests.results.builders import COUNTS, QUERIES, hits, put_shard, sequence

ROWS = [
    ("alpha", "proponent", 3, 2.5),
    ("alpha", "opponent", 1, -1.0),
    ("beta#1", "proponent", 3, 0.25),
    ("beta#0", "opponent", 2, -7.0),
]
IDS = [0, 1, 2, 3]


def test_round_trip(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    put_shard(store, "shard-000007", IDS, ROWS)
    assert finished_shards(store) == {"shard-000007"}
    found, counts = read_hits(store, "shard-000007", QUERIES)
    assert counts == COUNTS
    expected = [(QUERIES.index(q), ("proponent", "opponent").index(s), i, score) for q, s, i, score in ROWS]
    assert sorted(found.rows()) == sorted(expected)
    assert [x.dtype for x in vars(found).values()] == [np.int32, np.int8, np.int64, np.float32]


def test_only_hit_sequences_are_kept_once_with_their_tokens_and_provenance(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    put_shard(store, "s", IDS, ROWS)
    rows = read_candidates(store, "s", np.asarray([3, 1, 99])).to_pylist()
    assert [row["sequence_id"] for row in rows] == [1, 3]
    assert rows[1] == {
        "sequence_id": 3,
        "token_ids": [3, 4, 5, 6, 7],
        "documents": [
            {"id": "doc-3", "source": "web", "start": 0, "end": 2},
            {"id": "doc-3b", "source": "books", "start": 3, "end": 5},
        ],
        "path": "corpus/part.jsonl",
        "byte_offset": 3000,
        "loss": 0.375,
        "loss_mask": None,
        "document_starts": None,
    }
    tokens = read_candidates(store, "s", np.asarray([2, 3]), columns=GIVEN)
    assert tokens.to_pydict() == {
        "sequence_id": [2, 3],
        "token_ids": [[2, 3, 4, 5, 6], [3, 4, 5, 6, 7]],
        "loss_mask": [None, None],
        "document_starts": [None, None],
    }
    assert pq.read_metadata(tmp_path / shard_path("s")).num_rows == 3


@settings(max_examples=20, deadline=None)
@given(st.permutations(ROWS))
def test_the_order_of_hits_is_irrelevant(tmp_path_factory: pytest.TempPathFactory, rows: list) -> None:
    one, other = (Store(str(tmp_path_factory.mktemp("run"))) for _ in range(2))
    put_shard(one, "s", IDS, ROWS)
    put_shard(other, "s", IDS, rows)
    assert one.read(shard_path("s")) == other.read(shard_path("s"))


def test_a_shard_of_another_scan_or_under_anothers_name_is_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    put_shard(store, "s", IDS, ROWS)
    read_hits(store, "s", QUERIES, "print")
    with pytest.raises(RunError, match=r"s\.parquet was made of other inputs or settings"):
        read_hits(store, "s", QUERIES, "of another scan")
    store.write(shard_path("t"), store.read(shard_path("s")))
    for read in (lambda: read_hits(store, "t", QUERIES), lambda: read_candidates(store, "t", np.asarray([1]))):
        with pytest.raises(DamagedError, match=r"t\.parquet is damaged \(it was written as shards/s\.parquet\)"):
            read()


def test_a_shard_without_a_hit_is_finished_all_the_same(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    assert finished_shards(store) == set()
    put_shard(store, "s", IDS, [])
    found, counts = read_hits(store, "s", QUERIES)
    assert (len(found), counts) == (0, COUNTS)
    assert len(ScoredRows.concatenate([found, found])) == 0
    assert read_candidates(store, "s", np.empty(0, np.int64)).num_rows == 0
    assert finished_shards(store) == {"s"}


def test_hits_of_other_queries_are_refused(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    put_shard(store, "s", IDS, ROWS)
    with pytest.raises(RunError, match="holds hits of other queries"):
        read_hits(store, "s", ["alpha"])


def test_the_same_on_an_object_store(s3: Bucket) -> None:
    store = Store(s3.uri())
    put_shard(store, "shard-000000", IDS, ROWS)
    put_shard(store, "shard-000000", IDS, ROWS)
    assert finished_shards(store) == {"shard-000000"}
    found, _ = read_hits(store, "shard-000000", QUERIES)
    assert len(found) == len(ROWS)
    assert read_candidates(store, "shard-000000", np.asarray([2])).num_rows == 1


def test_sources_are_counted_by_sequence_and_token_and_add_up(tmp_path: Path) -> None:
    sequences = [sequence(index) for index in (1, 2)]
    assert count_sources(sequences) == {"web": (2, 4), "books": (2, 4)}
    store = Store(str(tmp_path))
    scan = ScanCounts()
    for name in ("a", "b"):
        counts = ShardCounts(2, 10, 0, 2, 2, sources=count_sources(sequences))
        write_shard(store, name, sequences, np.zeros(2, np.float32), hits(ROWS[:0]), QUERIES, counts, "print")
        scan.add(read_hits(store, name, QUERIES)[1])
    assert scan.sources == {"web": (4, 8), "books": (4, 8)}
    # Of too many none is counted, whatever comes first.
    scan.add(ShardCounts(1, 1, 0, 0, 0, sources={f"s{n}": (1, 1) for n in range(MOST_SOURCES)}))
    assert scan.sources is None
    scan.add(ShardCounts(1, 1, 0, 0, 0, sources={"web": (1, 1)}))
    assert scan.sources is None
