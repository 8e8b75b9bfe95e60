"""Laws of the comparison: textbook correlations, intervals that hold them, recall, a control near zero."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from infscan.errors import ConfigError
from infscan.influence.agreement import (
    agreement,
    difference,
    pearson,
    random_scores,
    ranks,
    recall,
    recall_agreement,
    spearman,
)

Q, N = 4, 500


def correlated(share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two tables whose correlation is `share` in expectation."""
    x, noise = random_scores(Q, N, seed), random_scores(Q, N, seed + 1)
    return x, share * x + np.sqrt(1 - share**2) * noise


def test_correlations_are_the_textbooks() -> None:
    x, y = correlated(0.6)
    y[:, ::3] = np.round(y[:, ::3])  # ties
    for row in range(Q):
        assert pearson(x, y)[row] == pytest.approx(np.corrcoef(x[row], y[row])[0, 1], rel=1e-12)
        assert ranks(y)[row] == pytest.approx(pd.Series(y[row]).rank().to_numpy())
        assert spearman(x, y)[row] == pytest.approx(pd.Series(x[row]).corr(pd.Series(y[row]), "spearman"), rel=1e-9)


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_scale_and_shift_change_nothing(kind: str) -> None:
    x, y = correlated(0.6)
    plain = agreement(x, y, seed=0, resamples=50, kind=kind)
    moved = agreement(1e4 + 3 * x, 1e-3 * y - 7, seed=0, resamples=50, kind=kind)
    assert moved.values == pytest.approx(plain.values, rel=1e-6)
    assert moved.replicates == pytest.approx(plain.replicates, rel=1e-6)


def test_intervals_hold_the_truth_and_narrow_with_sequences() -> None:
    found = agreement(*correlated(0.6), seed=0, resamples=400)
    assert bool(((found.low < found.values) & (found.values < found.high)).all())
    assert found.mean_low < 0.6 < found.mean_high
    assert found.mean == pytest.approx(found.values.mean())
    few = agreement(*(table[:, :50] for table in correlated(0.6)), seed=0, resamples=400)
    assert (few.high - few.low).mean() > 2 * (found.high - found.low).mean()


def test_one_seed_gives_one_interval() -> None:
    first, again = (agreement(*correlated(0.6), seed=3, resamples=50) for _ in range(2))
    assert np.array_equal(first.replicates, again.replicates)


def test_the_control_is_near_zero() -> None:
    x, _ = correlated(0.6)
    found = agreement(x, random_scores(Q, N, 9), seed=0, resamples=400)
    assert found.mean_low < 0 < found.mean_high


def test_differences_are_paired() -> None:
    x, y = correlated(0.6)
    better = agreement(x, y, seed=0, resamples=400)
    worse = agreement(x, y + 0.3 * random_scores(Q, N, 5), seed=0, resamples=400)
    gain, low, high = difference(better, worse)
    assert low < gain < high
    assert low > 0
    assert high - low < better.mean_high - better.mean_low
    assert difference(better, better) == (0, 0, 0)


def test_a_constant_row_agrees_with_nothing() -> None:
    x, y = correlated(0.6)
    y[1] = 5.0
    assert np.isnan(pearson(x, y)[1])
    assert agreement(x, y, seed=0, resamples=20).values[1] == 0


def test_recall_counts_the_reference_s_best_among_the_candidates() -> None:
    reference = np.arange(N, dtype=float)[None]
    assert recall(reference, reference, top=10, candidates=10) == 1
    assert recall(reference, -reference, top=10, candidates=10) == 0
    shifted = np.roll(reference, -5, axis=1)  # the best ten now stand five columns lower; five others come first
    assert recall(reference, shifted, top=10, candidates=10) == 0.5


@pytest.mark.parametrize(("top", "candidates"), [(10, 11), (11, 10)])
def test_recall_among_too_many_candidates_is_refused(top: int, candidates: int) -> None:
    with pytest.raises(ConfigError, match="2%"):
        recall(*correlated(0.6), top=top, candidates=candidates)


def test_recall_has_an_interval_that_holds_it_and_is_one_for_equal_scores() -> None:
    x, y = (table[:1] for table in correlated(0.9))
    found = recall_agreement(x, y, top=5, candidates=10, seed=0, resamples=200)
    assert found.values == pytest.approx(recall(x, y, top=5, candidates=10))
    assert found.low[0] <= found.values[0] <= found.high[0]
    assert found.low[0] < found.high[0]
    same = recall_agreement(x, x, top=5, candidates=10, seed=0, resamples=50)
    assert (same.replicates == 1).all()


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(400, 200))
    y = 0.6 * x + 0.8 * rng.normal(size=x.shape)
    found = agreement(x, y, seed=0)
    assert 0.9 < np.mean((found.low <= 0.6) & (found.high >= 0.6)) < 0.99
