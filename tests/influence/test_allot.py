"""Ranks by what they bring: enough is kept, and no column more than was needed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.influence.allot import allot

_LAYERS = st.lists(
    st.tuples(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.floats(0.0, 1.0), st.integers(1, 50)),
    min_size=1,
    max_size=5,
)


def read(layers: list[tuple[list[float], float, int]]) -> tuple[list[np.ndarray], list[float], list[float]]:
    values = [np.asarray(sorted(layer, reverse=True)) for layer, _, _ in layers]
    totals = [float(np.square(found).sum()) + rest for found, (_, rest, _) in zip(values, layers, strict=True)]
    return values, totals, [float(cost) for _, _, cost in layers]


@given(layers=_LAYERS, kept=st.floats(0.05, 1.0))
def test_what_is_asked_for_is_kept_and_the_last_column_was_needed(layers: list, kept: float) -> None:
    values, totals, costs = read(layers)
    ranks = allot(values, totals, costs, kept)
    shares = [np.square(found) for found in values]
    have = sum(layer[:rank].sum() for layer, rank in zip(shares, ranks, strict=True))
    wanted = kept * sum(totals)
    everything = sum(map(len, values)) == sum(ranks)
    assert have >= wanted * (1 - 1e-12) or everything
    # Of the columns that entered, the one that brings least for its cost was still needed.
    last = [
        (layer[rank - 1] / cost, layer[rank - 1])
        for layer, rank, cost in zip(shares, ranks, costs, strict=True)
        if rank
    ]
    least = min(last)[1]
    assert have - least < wanted * (1 + 1e-12) or len(set(last)) < len(last)


@given(layers=_LAYERS, kept=st.floats(0.05, 1.0), factor=st.sampled_from([0.25, 4.0]))
def test_a_querys_scale_is_no_matter(layers: list, kept: float, factor: float) -> None:
    values, totals, costs = read(layers)
    scaled = allot([found * factor for found in values], [total * factor**2 for total in totals], costs, kept)
    assert scaled == allot(values, totals, costs, kept)


def test_cheap_columns_come_first_and_nothing_stays_out_that_is_needed() -> None:
    values = [np.asarray([2.0, 1.0]), np.asarray([2.0, 1.0])]
    assert allot(values, [5.0, 5.0], [1.0, 10.0], 0.4) == [1, 0]
    assert allot(values, [5.0, 5.0], [1.0, 10.0], 0.5) == [2, 0]
    assert allot(values, [5.0, 5.0], [1.0, 10.0], 0.9) == [2, 1]
    assert allot(values, [5.0, 5.0], [1.0, 10.0], 1.0) == [2, 2]


@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_a_query_without_a_gradient_needs_one_column_at_most(kept: float) -> None:
    assert sum(allot([np.zeros(3), np.zeros(2)], [0.0, 0.0], [1.0, 1.0], kept)) <= 1
