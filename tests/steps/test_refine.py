"""Refined units: each candidate exactly once, cut alike whatever the order they come in; scores at full rank."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.corpus.addressable import PreparedCorpus
from infscan.corpus.sequences import Sequence
from infscan.influence.topk_tracker import ScoredRows
from infscan.model.worker import ModelWorker
from infscan.pipeline import answer
from infscan.queries import Part, Query
from infscan.results.read import read_top
from infscan.results.refined import read_unit
from infscan.results.shard_file import ShardCounts, write_shard
from infscan.steps.preconditioner import Preconditioner, preconditioned, query_gradients
from infscan.steps.refine import Context, RefineTask, refine_task, refine_units, sequences_per_unit
from infscan.storage import Store
from tests.chaos.one_process import without_ray
from tests.steps.runs import small_run

_PAIRS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 30)), unique=True, max_size=60)


def _candidates(pairs: list[tuple[int, int]]) -> ScoredRows:
    queries, sequence_ids = np.asarray(pairs, np.int64).reshape(-1, 2).T
    return ScoredRows(
        queries.astype(np.int32), np.zeros(len(pairs), np.int8), sequence_ids, np.ones(len(pairs), np.float32)
    )


@given(
    pairs=_PAIRS,
    size=st.integers(1, 9),
    most=st.integers(1, 20),
    per_group=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_units_partition_the_candidates_whatever_their_order(
    pairs: list[tuple[int, int]], size: int, most: int, per_group: int, seed: int
) -> None:
    groups = [range(start, min(start + per_group, 8)) for start in range(0, 8, per_group)]
    units = refine_units(_candidates(pairs), groups, size, most)
    found = [
        (groups[unit.group][query], sequence_id)
        for unit in units
        for sequence_id, queries in unit.wanted.items()
        for query in queries
    ]
    assert sorted(found) == sorted(pairs)
    assert len(found) == len(set(found))
    for unit in units:
        group, wanted = unit.group, unit.wanted
        assert 1 <= len(wanted) <= size
        assert len(unit.queries) <= most or len(wanted) == 1
        assert list(wanted) == sorted(wanted)
        assert all(queries == tuple(sorted(queries)) for queries in wanted.values())
        assert all(0 <= query < len(groups[group]) for queries in wanted.values() for query in queries)
    shuffled = pairs.copy()
    random.Random(seed).shuffle(shuffled)
    again = refine_units(_candidates(shuffled), groups, size, most)
    assert [(unit.group, list(unit.wanted.items())) for unit in again] == [
        (unit.group, list(unit.wanted.items())) for unit in units
    ]
    # A sequence's pairs of one query group lie in one unit.
    places = [(unit.group, sequence_id) for unit in units for sequence_id in unit.wanted]
    assert len(places) == len(set(places))


@given(candidates=st.integers(0, 100_000), per_batch=st.integers(0, 400))
def test_units_are_whole_micro_batches_and_enough_for_several_workers(candidates: int, per_batch: int) -> None:
    size = sequences_per_unit(candidates, per_batch)
    assert 1 <= size <= 256
    if 1 <= per_batch <= 128:
        assert size % per_batch == 0 or size == 256
        assert size <= max(32, -(-candidates // 64)) + per_batch - 1
    # A small run is cut finely, a large one into no more units than it has to be.
    assert size >= min(256, max(32, -(-candidates // 64)))


def test_a_refined_score_is_the_product_of_two_gradients(
    rank: ModelWorker, corpus: PreparedCorpus, inverse: Preconditioner, tmp_path: Path
) -> None:
    """<P_q, grad L(z)> by layer, from the tokens in shard files; the margins over tokens add up to the same."""
    store = Store(str(tmp_path))
    queries = (Query("a", (Part((5, 9, 33, 4), (2, 3)),)), Query("b", (Part((7, 7, 12), (2,)),)))
    wanted = {2: (0,), 3: (0, 1), 9: (1,), 11: (0, 1)}
    for name, ids in (("shard-000000", [2, 3]), ("shard-000001", [9, 11])):
        sequences = corpus.read(np.asarray(ids))
        hits = ScoredRows(
            np.zeros(2, np.int32), np.zeros(2, np.int8), np.asarray(ids, np.int64), np.ones(2, np.float32)
        )
        counts = ShardCounts(2, 2, 0, 2, 2)
        write_shard(store, name, sequences, np.zeros(2, np.float32), hits, ["a", "b"], counts, "print")
    shards = (("shard-000000", np.asarray([2, 3])), ("shard-000001", np.asarray([9, 11])))
    task = RefineTask(store, "unit.parquet", "group", queries, rank.layers, inverse, shards, wanted, 100)
    assert refine_task(rank, task) == sum(map(len, corpus.read(np.asarray(list(wanted)))))
    layers = [layer.name for layer in rank.layers]
    unit = read_unit(store, ["unit.parquet"], layers)
    rows = list(zip(unit.query_ids.to_pylist(), unit.sequence_ids.tolist(), strict=True))
    assert sorted(rows) == sorted(("ab"[query], sequence_id) for sequence_id, some in wanted.items() for query in some)
    P = preconditioned(rank, queries, rank.layers, inverse)
    for row, (query_id, sequence_id) in enumerate(rows):
        tokens = unit.token_scores[unit.starts[row] : unit.starts[row + 1]]
        [sequence] = corpus.read(np.asarray([sequence_id]))
        ids = tuple(sequence.token_ids.tolist())
        # A training sequence's loss is the measurement of all its tokens but the first.
        g = query_gradients(rank, [Query("z", (Part(ids, tuple(range(1, len(ids)))),))], rank.layers)
        by_layer = [float((P[name]["ab".index(query_id)] * g[name][0]).sum()) for name in layers]
        np.testing.assert_allclose(unit.layer_scores[row], by_layer, rtol=1e-3, atol=1e-3 * np.abs(by_layer).max())
        assert len(tokens) == len(ids)
        score = float(unit.scores[row])
        assert float(tokens.sum()) == pytest.approx(score, rel=1e-3, abs=1e-3 * abs(score) + 1e-2)


def test_a_context_takes_the_separators_place_and_has_no_loss() -> None:
    given = Sequence(3, np.asarray([0, 5, 6, 7]), (), 0, "", starts=np.asarray([0, 2]))
    placed = Context((8, 9), (0,), 64).before(given)
    assert placed.token_ids.tolist() == [8, 9, 5, 6, 7]
    assert placed.loss is not None
    assert placed.loss.tolist() == [False, False, True, True, True]
    assert placed.starts is not None
    assert placed.starts.tolist() == [0, 3]
    # As long as the model allows: its last tokens stay.
    assert Context((8, 9), (0,), 4).before(given).token_ids.tolist() == [9, 5, 6, 7]
    assert Context((8, 9), (), 4).before(given).token_ids.tolist() == [0, 5, 6, 7]
    masked = replace(given, loss=np.asarray([False, True, False, True]))
    assert Context((8,), (0,), 64).before(masked).loss.tolist() == [False, True, False, True]


def test_a_score_after_a_context_is_of_the_rows_own_tokens(
    rank: ModelWorker, corpus: PreparedCorpus, inverse: Preconditioner, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    query = Query("a", (Part((5, 9, 33, 4), (2, 3)),))
    [sequence] = corpus.read(np.asarray([3]))
    hits = ScoredRows(np.zeros(1, np.int32), np.zeros(1, np.int8), np.asarray([3]), np.ones(1, np.float32))
    losses = np.zeros(1, np.float32)
    write_shard(store, "shard-000000", [sequence], losses, hits, ["a"], ShardCounts(1, 1, 0, 1, 1), "print")
    shards = (("shard-000000", np.asarray([3])),)
    context = Context((11, 2), (), 64)
    task = RefineTask(
        store, "unit.parquet", "other", (query,), rank.layers, inverse, shards, {3: (0,)}, 100, before=context
    )
    refine_task(rank, task)
    layers = [layer.name for layer in rank.layers]
    P = preconditioned(rank, [query], rank.layers, inverse)
    ids = (11, 2, *sequence.token_ids.tolist())
    g = query_gradients(rank, [Query("z", (Part(ids, tuple(range(2, len(ids)))),))], rank.layers)
    expected = sum(float((P[name][0] * g[name][0]).sum()) for name in layers)
    assert float(read_unit(store, ["unit.parquet"], layers).scores[0]) == pytest.approx(expected, rel=1e-3)


def test_the_strongest_rows_have_bounds_and_others_none(tmp_path: Path) -> None:
    config = small_run(tmp_path, "scan.stability=2", "scan.top_k=4")
    with without_ray():
        answer(config)
    rows = read_top(config.output).to_pylist()
    assert any(row["rank"] > 2 for row in rows)
    for row in rows:
        if row["rank"] > 2:
            assert (row["score_low"], row["score_high"], row["sign_sure"]) == (None, None, None)
        else:
            assert row["score_low"] <= row["score"] <= row["score_high"]
            assert row["score_low"] < row["score_high"]
            assert row["sign_sure"] == (row["score_low"] * row["score_high"] > 0)
