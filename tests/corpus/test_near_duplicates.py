"""Near-duplicates: groups are what exact Jaccard similarity connects; order and distance do not fool the hashes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.corpus.near_duplicates import _shingles, jaccard, near_duplicates
from infscan.errors import ConfigError


def by_hand(sequences: list[np.ndarray], threshold: float) -> list[int]:
    """Every pair compared."""
    first = list(range(len(sequences)))
    for x in range(len(sequences)):
        for y in range(x):
            if jaccard(_shingles(sequences[x]), _shingles(sequences[y])) >= threshold:
                old, new = max(first[x], first[y]), min(first[x], first[y])
                first = [new if value == old else value for value in first]
    return first


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.5, 0.8, 1.0]))
def test_the_groups_are_those_of_comparing_every_pair(seed: int, threshold: float) -> None:
    draw = np.random.default_rng(seed)
    sequences = [draw.integers(0, 1000, 80) for _ in range(6)]
    for original in range(3):
        # From a few tokens changed to most of them: similarities on both sides of the threshold.
        copy = sequences[original].copy()
        copy[: 4 + 30 * original] = draw.integers(0, 1000, 4 + 30 * original)
        sequences += [copy, sequences[original].copy()]
    assert near_duplicates(sequences, threshold) == by_hand(sequences, threshold)


def test_sequences_shorter_than_a_shingle_are_alike_where_they_are_equal() -> None:
    short = [np.asarray(ids, np.int64) for ids in ([1, 2], [1, 2], [2, 1], [1, 2, 3])]
    assert near_duplicates(short) == [0, 0, 2, 3]
    assert near_duplicates([]) == []


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_similarity_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"above 0 and up to 1"):
        near_duplicates([], threshold)
