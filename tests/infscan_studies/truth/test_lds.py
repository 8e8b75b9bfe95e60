"""Laws of LDS: fair halves, linear predictions, 1 for the truth and about 0 for noise, nothing trained twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from infscan.errors import ConfigError, ModelError, RunError
from infscan.storage import Store
from infscan_studies.truth.lds import (
    actual,
    half_subsets,
    lds,
    lds_difference,
    predict,
    random_scores,
    rank_correlation,
    resampled,
)
from infscan_studies.truth.retrain import Retrainer, check_affordable, left_out, trainings

RNG = np.random.default_rng(0)


class Ridge:
    """Ridge regression in closed form: what a subset's training gives, and its exact influence on predictions.

    f_q(theta) = theta . x_q; a measurement of a linear model.
    """

    def __init__(self, points: int = 60, width: int = 3, queries: int = 5) -> None:
        rng = np.random.default_rng(1)
        self.x_nd = rng.standard_normal((points, width))
        self.y_n = self.x_nd @ rng.standard_normal(width) + rng.standard_normal(points)
        self.query_qd = rng.standard_normal((queries, width))
        self.ids = [f"q{q}" for q in range(queries)]
        self.trained: list[int] = []

    def fit(self, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        x, y = self.x_nd[chosen], self.y_n[chosen]
        theta: NDArray[np.float64] = np.linalg.solve(x.T @ x + 0.1 * np.eye(x.shape[1]), x.T @ y)
        return theta

    def __call__(self, chosen: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
        self.trained.append(seed)
        noise = 1e-3 * np.random.default_rng(seed).standard_normal(len(self.ids))
        values: NDArray[np.float64] = self.query_qd @ self.fit(chosen) + noise
        return values

    def influence_nq(self) -> NDArray[np.float64]:
        """grad f^T H^-1 (-grad L(z)), H of the whole data."""
        everything = np.arange(len(self.x_nd))
        residual_n = self.y_n - self.x_nd @ self.fit(everything)
        H = self.x_nd.T @ self.x_nd + 0.1 * np.eye(self.x_nd.shape[1])
        values: NDArray[np.float64] = (self.x_nd * residual_n[:, None]) @ np.linalg.solve(H, self.query_qd.T)
        return values


@pytest.fixture
def ridge() -> Ridge:
    return Ridge()


def retrainer(folder: Path, ridge: Ridge, recipe: str = "ridge") -> Retrainer:
    return Retrainer(Store(str(folder)), recipe, ridge.ids, ridge)


@pytest.mark.parametrize("sequences", [2, 7, 40])
def test_subsets_are_half_sized_distinct_and_seeded(sequences: int) -> None:
    kept_mn = half_subsets(sequences, 2, seed=3)
    assert (kept_mn.sum(axis=1) == sequences // 2).all()
    assert len({row.tobytes() for row in kept_mn}) == 2
    assert np.array_equal(kept_mn, half_subsets(sequences, 2, seed=3))
    if sequences == 40:
        assert not np.array_equal(kept_mn, half_subsets(sequences, 2, seed=4))


def test_every_half_of_a_small_corpus_comes_once_and_no_more() -> None:
    assert len({row.tobytes() for row in half_subsets(4, 6, seed=0)}) == 6
    with pytest.raises(ConfigError, match="7 different half-subsets of 4"):
        half_subsets(4, 7, seed=0)


def test_more_subsets_keep_the_earlier_ones() -> None:
    assert np.array_equal(half_subsets(30, 9, seed=1)[:4], half_subsets(30, 4, seed=1))


def test_predictions_are_linear_and_sum_over_the_subset() -> None:
    kept_mn = half_subsets(12, 5, seed=0)
    a, b = RNG.standard_normal((2, 12, 3))
    assert np.allclose(predict(kept_mn, 2 * a + b), 2 * predict(kept_mn, a) + predict(kept_mn, b))
    assert np.allclose(predict(kept_mn, a)[1], a[kept_mn[1]].sum(axis=0))


def test_rank_correlation_is_spearmans_with_ties_and_zero_for_a_constant() -> None:
    x, y = RNG.integers(0, 5, (2, 30)).astype(float)
    assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert rank_correlation(np.ones(30), y) == 0


def test_a_bootstrap_draw_is_the_correlation_of_the_repeated_subsets() -> None:
    predicted_m1, actual_m1 = RNG.standard_normal((2, 9, 1))
    draws = resampled(predicted_m1, actual_m1, seed=5, resamples=4)
    weights_bm = np.random.default_rng(5).multinomial(9, np.full(9, 1 / 9), 4)
    for draw, weights_m in zip(draws, weights_bm, strict=True):
        rows = np.repeat(np.arange(9), weights_m)
        assert draw == pytest.approx(spearmanr(predicted_m1[rows, 0], actual_m1[rows, 0]).statistic)


def test_the_truth_has_lds_1_and_its_opposite_minus_1() -> None:
    truth_mq = predict(half_subsets(50, 30, seed=0), RNG.standard_normal((50, 4)))
    for sign in (1, -1):
        found = lds(sign * np.exp(truth_mq), truth_mq, seed=0)
        assert (found.mean, found.low, found.high) == pytest.approx((sign,) * 3)


def test_random_scores_have_lds_near_0_within_their_interval() -> None:
    kept_mn = half_subsets(100, 200, seed=0)
    truth_mq = predict(kept_mn, RNG.standard_normal((100, 20)))
    found = lds(predict(kept_mn, random_scores(100, 20, seed=7)), truth_mq, seed=0)
    assert abs(found.mean) < 0.1
    assert found.low < 0 < found.high


def test_a_ridge_regressions_influence_predicts_its_retrainings(tmp_path: Path, ridge: Ridge) -> None:
    kept_mn = half_subsets(len(ridge.x_nd), 40, seed=2)
    actual_mq = actual(retrainer(tmp_path, ridge), kept_mn, seeds=(0, 1)).mean(axis=1)
    exact_mq = predict(kept_mn, ridge.influence_nq())
    random_mq = predict(kept_mn, random_scores(len(ridge.x_nd), len(ridge.ids), seed=0))
    found = lds(exact_mq, actual_mq, seed=0)
    assert found.mean > 0.9
    assert found.low > 0.8
    assert lds_difference(exact_mq, random_mq, actual_mq, seed=0).low > 0.3
    same = lds_difference(exact_mq, 3 * exact_mq, actual_mq, seed=0)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_what_was_trained_is_not_trained_again(tmp_path: Path, ridge: Ridge) -> None:
    kept_mn = half_subsets(20, 4, seed=0)
    first = retrainer(tmp_path, ridge)
    values = actual(first, kept_mn[:2], seeds=(0, 1))
    assert ridge.trained == [0, 1, 0, 1]
    assert len(first.missing(trainings(kept_mn, (0, 1, 2)))) == 8
    again = actual(retrainer(tmp_path, ridge), kept_mn, seeds=(0, 1))
    assert len(ridge.trained) == 8
    assert np.array_equal(again[:2], values)
    assert len(retrainer(tmp_path, ridge, "another recipe").missing(trainings(kept_mn, (0, 1)))) == 8


def test_a_file_of_another_training_is_refused(tmp_path: Path, ridge: Ridge) -> None:
    store, first = Store(str(tmp_path)), retrainer(tmp_path, ridge)
    first.measure(np.arange(10), 0)
    store.write(first.path(np.arange(10), 1), store.read(first.path(np.arange(10), 0)))
    with pytest.raises(RunError, match="belongs to another training"):
        first.measure(np.arange(10), 1)


def test_a_training_that_diverged_is_refused_and_not_kept(tmp_path: Path) -> None:
    broken = Retrainer(Store(str(tmp_path)), "x", ["q"], lambda chosen, seed: np.array([np.nan]))
    with pytest.raises(ModelError, match="'q' measures NaN"):
        broken.measure(np.arange(3), 0)
    assert len(broken.missing([(np.arange(3), 0)] * 2)) == 1


def test_days_of_training_are_refused_with_the_estimate() -> None:
    assert check_affordable(64, 45, max_hours=1) == pytest.approx(0.8)
    with pytest.raises(ConfigError, match=r"64 trainings of 4500\.0 s each would take 80 hours, more than max_hours=1"):
        check_affordable(64, 4500, max_hours=1)


def test_subsets_without_a_querys_facts_are_named() -> None:
    kept_mn = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]], bool)
    ids = np.array([10, 11, 12, 13])
    proponents = {"rare": [11], "split": [11, 13], "common": [10, 12]}
    assert left_out(proponents, kept_mn, ids) == {"rare": [1, 2], "split": [2]}
    with pytest.raises(ConfigError, match="'typo': 1 proponents are given and 0"):
        left_out({"typo": [99]}, kept_mn, ids)


@pytest.mark.parametrize("subsets", [1, 2])
def test_two_subsets_are_too_few(subsets: int) -> None:
    with pytest.raises(ConfigError, match="LDS needs at least 3"):
        lds(np.zeros((subsets, 1)), np.zeros((subsets, 1)), seed=0)
