"""Dense scores: one part per shard, every sequence, what is not finite left as it is."""

from pathlib import Path

import numpy as np

from infscan.results.dense import write_scores
from infscan.results.read import read_scores
from infscan.storage import Store
from tests.results.builders import QUERIES, sequence


def test_parts_join_into_one_table_by_sequence(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    scores_nq = np.arange(12, dtype=np.float32).reshape(4, 3)
    scores_nq[1, 2] = np.nan
    for name, ids in {"shard-000001": [0, 1], "shard-000000": [2, 3]}.items():
        write_scores(store, name, [sequence(index) for index in ids], scores_nq[ids], QUERIES, "print")
    table = read_scores(str(tmp_path), unfinished=True)
    assert table.column_names == ["sequence_id", "document_id", "score_alpha", "score_beta#0", "score_beta#1"]
    assert table["sequence_id"].to_pylist() == [0, 1, 2, 3]
    assert table["document_id"].to_pylist() == [f"doc-{index}" for index in range(4)]
    found = np.stack([table[column].to_numpy() for column in table.column_names[2:]], axis=1)
    np.testing.assert_array_equal(found, scores_nq)
    assert {str(table[column].type) for column in table.column_names[2:]} == {"float"}


def test_scores_of_a_shard_that_was_given_up_do_not_count(tmp_path: Path) -> None:
    """An attempt may have died after its scores; a shard's file outranks its note."""
    store = Store(str(tmp_path))
    for number in range(3):
        ids = [sequence(number)]
        write_scores(store, f"shard-{number:06d}", ids, np.ones((1, 3), np.float32), QUERIES, "print")
    for number in (1, 2):
        store.write_json(f"quarantine/shard-{number:06d}.json", {})
    store.write("shards/shard-000002.parquet", b"")
    assert read_scores(str(tmp_path), unfinished=True)["sequence_id"].to_pylist() == [0, 2]
