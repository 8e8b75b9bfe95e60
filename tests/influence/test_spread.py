"""The spread of scores: shards add up to the whole, whatever their order; median and scale are near the exact ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.influence.spread import BINS, ShardSpread, Spread, bins_of


def drawn(n: int = 3000, seed: int = 0) -> np.ndarray:
    """Heavy tails, as influence has: [n, 3]; a query of other size, and one that lies on one side."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_t(1.5, (n, 3)) * [1.0, 1e5, 1e-3]
    scores[:, 2] += 2e-3
    return scores.astype(np.float32)


def whole(parts: list[np.ndarray]) -> Spread:
    spread = Spread(parts[0].shape[1])
    for part in parts:
        spread.add(ShardSpread.from_text(ShardSpread.of(part).to_text()))
    return spread


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)))
def test_the_order_of_shards_changes_no_bit(order: list[int]) -> None:
    shards = np.array_split(drawn(600), 6)
    one, other = whole(shards), whole([shards[index] for index in order])
    assert np.array_equal(one.counts_qb, other.counts_qb)
    assert np.array_equal(one.sums_qs, other.sums_qs)


def test_shards_add_up_to_the_whole() -> None:
    scores = drawn()
    cut, at_once = whole(np.array_split(scores, 7)), whole([scores])
    assert np.array_equal(cut.counts_qb, at_once.counts_qb)
    assert np.array_equal(cut.centres_q, at_once.centres_q)
    np.testing.assert_allclose(cut.sums_qs, at_once.sums_qs, rtol=1e-12)
    for side, mask in enumerate((scores > 0, scores < 0)):
        sums = np.where(mask, scores, 0).sum(axis=0, dtype=np.float64)
        np.testing.assert_allclose(cut.sums_qs[:, side], sums, rtol=1e-9)


def test_median_and_scale_are_near_the_exact_ones() -> None:
    scores = drawn()
    spread = whole(np.array_split(scores, 5))
    median = np.median(scores, axis=0)
    mad = 1.4826 * np.median(np.abs(scores - median), axis=0)
    np.testing.assert_allclose(spread.scales_q, mad, rtol=0.05)
    assert (np.abs(spread.centres_q - median) < 0.05 * mad).all()


def test_sums_of_a_sample_are_not_known() -> None:
    sample = Spread(3, sampled=True)
    sample.add(ShardSpread.of(drawn()))
    assert np.isnan(sample.sums_qs).all()
    np.testing.assert_array_equal(sample.centres_q, whole([drawn()]).centres_q)


def test_what_is_not_finite_takes_no_part() -> None:
    scores = drawn(50)
    scores[:3, 0] = [np.nan, np.inf, -np.inf]
    spread = whole([scores])
    assert spread.counts_qb.sum(axis=1).tolist() == [47, 50, 50]
    assert np.isfinite(spread.sums_qs).all()


def test_bins_are_in_the_order_of_scores_and_hold_whatever_there_is() -> None:
    scores = np.asarray([-np.finfo(np.float32).max, -3, -2.99, -1e-30, 0, 1e-30, 2.99, 3, 1e30], np.float32)
    bins = bins_of(scores)
    assert (np.diff(bins) >= 0).all()
    assert bins[0] == 0
    assert bins[-1] == BINS - 1
    assert len({*bins[3:6].tolist()}) == 1


@pytest.mark.parametrize("scores", [np.empty((0, 2), np.float32), np.zeros((5, 0), np.float32)])
def test_nothing_to_count_is_no_error(scores: np.ndarray) -> None:
    spread = whole([scores])
    assert np.isnan(spread.centres_q).all()
    assert np.isnan(spread.scales_q).all()
