"""Refined units: each candidate exactly once, cut alike whatever the order they come in; scores at full rank."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.corpus.addressable import PreparedCorpus
from infscan.influence.standings import Hits
from infscan.passes.queries import Inverse, preconditioned, query_gradients
from infscan.passes.rank import Rank
from infscan.passes.refine import RefineTask, refine_task, refine_units
from infscan.queries import Part, Query
from infscan.results.refined import read_unit
from infscan.results.shard_file import ShardCounts, write_shard
from infscan.storage import Store

_PAIRS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 30)), unique=True, max_size=60)


@given(pairs=_PAIRS, size=st.integers(1, 9), per_group=st.integers(1, 8), seed=st.integers(0, 99))
def test_units_partition_the_candidates_whatever_their_order(
    pairs: list[tuple[int, int]], size: int, per_group: int, seed: int
) -> None:
    groups = [range(start, min(start + per_group, 8)) for start in range(0, 8, per_group)]
    units = refine_units(pairs, groups, size)
    found = [
        (groups[group][query], sequence_id)
        for group, wanted in units
        for sequence_id, queries in wanted.items()
        for query in queries
    ]
    assert sorted(found) == sorted(pairs)
    assert len(found) == len(set(found))
    for group, wanted in units:
        assert 1 <= len(wanted) <= size
        assert list(wanted) == sorted(wanted)
        assert all(queries == tuple(sorted(queries)) for queries in wanted.values())
        assert all(0 <= query < len(groups[group]) for queries in wanted.values() for query in queries)
    shuffled = pairs.copy()
    random.Random(seed).shuffle(shuffled)
    assert refine_units(shuffled, groups, size) == units
    assert [list(wanted) for _, wanted in refine_units(shuffled, groups, size)] == [list(wanted) for _, wanted in units]


def test_a_refined_score_is_the_product_of_two_gradients(
    rank: Rank, corpus: PreparedCorpus, inverse: Inverse, tmp_path: Path
) -> None:
    """<P_q, grad L(z)> by layer, from the tokens in shard files; the margins over tokens add up to the same."""
    store = Store(str(tmp_path))
    queries = (Query("a", (Part((5, 9, 33, 4), (2, 3)),)), Query("b", (Part((7, 7, 12), (2,)),)))
    wanted = {2: (0,), 3: (0, 1), 9: (1,), 11: (0, 1)}
    for name, ids in (("shard-000000", [2, 3]), ("shard-000001", [9, 11])):
        sequences = corpus.read(np.asarray(ids))
        hits = Hits(np.zeros(2, np.int32), np.zeros(2, np.int8), np.asarray(ids, np.int64), np.ones(2, np.float32))
        counts = ShardCounts(2, 2, 0, 2, 2)
        write_shard(store, name, sequences, np.zeros(2, np.float32), hits, ["a", "b"], counts, "print")
    shards = (("shard-000000", np.asarray([2, 3])), ("shard-000001", np.asarray([9, 11])))
    task = RefineTask(store, "unit.parquet", "group", queries, rank.layers, inverse, shards, wanted, 100)
    assert refine_task(rank, task) == sum(map(len, corpus.read(np.asarray(list(wanted)))))
    layers, margins = read_unit(store, "unit.parquet")
    assert set(margins) == {("ab"[query], sequence_id) for sequence_id, some in wanted.items() for query in some}
    P = preconditioned(rank, queries, rank.layers, inverse)
    for (query_id, sequence_id), found in margins.items():
        [sequence] = corpus.read(np.asarray([sequence_id]))
        ids = tuple(sequence.token_ids.tolist())
        # A training sequence's loss is the measurement of all its tokens but the first.
        g = query_gradients(rank, [Query("z", (Part(ids, tuple(range(1, len(ids)))),))], rank.layers)
        by_layer = [float((P[name]["ab".index(query_id)] * g[name][0]).sum()) for name in layers]
        np.testing.assert_allclose(found.layer_scores, by_layer, rtol=1e-3, atol=1e-3 * np.abs(by_layer).max())
        assert len(found.token_scores) == len(ids)
        assert float(found.token_scores.sum()) == pytest.approx(
            found.score, rel=1e-3, abs=1e-3 * abs(found.score) + 1e-2
        )
