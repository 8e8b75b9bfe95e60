"""Laws of micro-batches: a partition, within the budget, by (length, position), whatever else is going on."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from infscan.corpus.batches import micro_batches, pad

lengths = st.lists(st.integers(1, 64), max_size=60)


@given(lengths, st.integers(1, 300))
def test_batches_partition_the_positions_in_the_order_of_length_and_position(sizes: list[int], budget: int) -> None:
    batches = micro_batches(sizes, budget)
    joined = [int(position) for batch in batches for position in batch]
    assert joined == sorted(range(len(sizes)), key=lambda position: (sizes[position], position))
    assert all(len(batch) for batch in batches)


@given(lengths, st.integers(1, 300))
def test_padded_tokens_stay_within_the_budget_and_batches_are_as_full_as_they_can_be(
    sizes: list[int], budget: int
) -> None:
    batches = micro_batches(sizes, budget)
    longest = [max(sizes[position] for position in batch) for batch in batches]
    for batch, length in zip(batches, longest, strict=True):
        assert len(batch) == 1 or length * len(batch) <= budget
    for batch, after in pairwise(batches):
        assert sizes[after[0]] * (len(batch) + 1) > budget


@given(st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=6))
def test_padding_can_be_taken_off_again(rows: list[list[int]]) -> None:
    ids, mask = pad([np.array(row, np.int64) for row in rows])
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows), default=0))
    assert ids.dtype == np.int64
    assert mask.dtype == np.bool_
    assert [ids[n][mask[n]].tolist() for n in range(len(rows))] == rows
    assert not ids[~mask].any()
