"""Laws of the plan: the sample is fixed by the seed, shards partition it, and nothing else takes part."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.corpus.plan import Plan, Selection, default_shard_sequences
from infscan.errors import RunError


def plan(total: int, size: int | None, shard_sequences: int, seed: int = 0) -> Plan:
    return Plan("f" * 64, total, Selection.of(total, size, seed), shard_sequences, order_seed=seed)


sizes = st.one_of(st.none(), st.integers(1, 400))


@given(st.integers(1, 300), sizes, st.integers(0, 5))
def test_a_selection_is_sorted_distinct_and_of_the_size_asked_for(total: int, size: int | None, seed: int) -> None:
    ids = Selection.of(total, size, seed).ids()
    assert ids.dtype == np.int64
    assert len(ids) == min(size or total, total)
    assert np.all(np.diff(ids) > 0)
    assert ids[0] >= 0
    assert ids[-1] < total


@given(st.integers(1, 300), sizes, st.integers(1, 90), st.integers(1, 90))
def test_shards_partition_the_selection_whatever_their_size(total: int, size: int | None, one: int, two: int) -> None:
    for shard_sequences in (one, two):
        made = plan(total, size, shard_sequences, seed=3)
        shards = [made.shard(number) for number in range(made.num_shards)]
        assert all(0 < len(shard) <= shard_sequences for shard in shards)
        joined = np.concatenate([made.ids(number) for number in range(made.num_shards)])
        assert np.array_equal(joined, Selection.of(total, size, 3).ids())


def test_every_number_is_as_likely_to_be_chosen() -> None:
    total, size, draws = 40, 10, 2000
    counts = np.zeros(total)
    for seed in range(draws):
        counts[Selection(total, size, seed).ids()] += 1
    expected = draws * size / total
    deviation = np.abs(counts - expected) / np.sqrt(expected * (1 - size / total))
    assert deviation.max() < 5


def test_a_share_is_rounded_and_the_smaller_of_share_and_number_counts() -> None:
    assert Selection.of(1000, share=0.25).size == 250
    assert Selection.of(1000, 100, share=0.25).size == 100
    assert Selection.of(1000, 300, share=0.25).size == 250
    assert Selection.of(3, share=0.01).size == 1
    assert Selection.of(1000, among=np.arange(0, 1000, 10), share=0.5).size == 50
    assert (Selection.of(1000, share=0.25, seed=3).ids() == Selection.of(1000, 250, 3).ids()).all()


def test_the_sample_does_not_travel_with_a_pickle_and_is_the_same_after_it() -> None:
    selection = Selection(1_000_000, 50_000, 7)
    before = selection.ids(10, 20)
    data = pickle.dumps(selection)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).ids(10, 20), before)


@given(st.integers(1, 300), sizes, st.integers(1, 90), st.integers(0, 5))
def test_a_plan_reads_back_from_its_json(total: int, size: int | None, shard_sequences: int, seed: int) -> None:
    made = plan(total, size, shard_sequences, seed)
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


@given(st.integers(1, 300), sizes, st.integers(1, 90))
def test_the_order_is_a_permutation_and_the_table_says_what_the_shards_hold(
    total: int, size: int | None, shard_sequences: int
) -> None:
    made = plan(total, size, shard_sequences, seed=1)
    assert sorted(made.order().tolist()) == list(range(made.num_shards))
    assert np.array_equal(made.order(), made.order())
    for row in made.shards_table().to_pylist():
        shard, ids = made.shard(row["shard"]), made.ids(row["shard"])
        assert (row["start"], row["stop"]) == (shard.start, shard.stop)
        assert (row["first_sequence_id"], row["last_sequence_id"]) == (ids[0], ids[-1])


def test_shard_names_sort_as_their_numbers_do() -> None:
    made = plan(10_000, None, 1)
    assert made.shard(42).name == "shard-000042"


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (0, 8),
        (1, 8),
        (128, 8),
        (129, 9),
        (960, 60),
        (1024, 64),
        (16_384, 64),
        (16_385, 65),
        (256_000, 1000),
        (10**7, 4096),
    ],
)
def test_the_default_shard_size_is_a_256th_within_bounds_and_a_16th_of_a_small_corpus(n: int, expected: int) -> None:
    assert default_shard_sequences(n) == expected


def test_a_plan_of_another_schema_or_another_sample_is_refused() -> None:
    value = plan(100, 10, 4).to_json()
    with pytest.raises(RunError, match="schema version 99"):
        Plan.from_json({**value, "schema_version": 99})
    with pytest.raises(RunError, match="draws another sample of 10 sequences"):
        Plan.from_json({**value, "selection": {**value["selection"], "digest": "0" * 64}})


@pytest.mark.parametrize("size", [100, 37])
def test_positions_and_numbers_lead_to_each_other(size: int) -> None:
    selection = Selection.of(100, size, seed=3)
    ids = selection.ids()
    positions = np.array([0, 5, size - 1])
    assert selection.at(positions).tolist() == ids[positions].tolist()
    assert selection.positions(selection.at(positions)).tolist() == positions.tolist()
