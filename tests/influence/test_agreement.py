"""Agreement of approximate with exact scores."""

from __future__ import annotations

import numpy as np
import pytest

from infscan.influence.agreement import agreement, pearson


def test_pearson_is_the_textbook_one_column_by_column() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 3)), rng.normal(size=(50, 3))
    wanted = [np.corrcoef(x[:, query], y[:, query])[0, 1] for query in range(3)]
    np.testing.assert_allclose(pearson(x, y), wanted, rtol=1e-12)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 400))
    y = 0.6 * x + 0.8 * rng.normal(size=x.shape)
    covered = np.mean([row.low <= 0.6 <= row.high for row in agreement(x, y, seed=0)])
    assert 0.9 < covered < 0.99


def test_exact_scores_agree_wholly_and_the_seed_decides_the_interval() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2000, 1))
    [same] = agreement(x, x, seed=0)
    assert (same.pearson, same.low, same.high, same.recall) == pytest.approx((1, 1, 1, 1))
    noisy = x + rng.normal(size=x.shape)
    assert agreement(noisy, x, seed=3) == agreement(noisy, x, seed=3)
    assert agreement(noisy, x, seed=3)[0].recall is not None


def test_recall_is_not_reported_where_candidates_are_a_large_share() -> None:
    x = np.random.default_rng(3).normal(size=(1999, 2))
    assert [row.recall for row in agreement(x, x, seed=0)] == [None, None]


def test_a_query_that_does_not_vary_has_no_correlation() -> None:
    x = np.random.default_rng(4).normal(size=(30, 1))
    assert np.isnan(agreement(np.zeros_like(x), x, seed=0)[0].pearson)
