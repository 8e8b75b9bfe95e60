"""The linear datamodeling score (LDS; Park et al. 2023; docs/method.md#ground-truths).

Models are retrained on half-subsets of the training sequences, with several seeds each. A method predicts what a query
measures on a subset as the sum of its scores over the subset's sequences. LDS is the Spearman correlation, over
subsets, of prediction and mean measurement, averaged over queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infscan.errors import ConfigError
from infscan.influence.agreement import INTERVAL
from infscan_studies.truth.retrain import Retrainer, trainings

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean over queries with its 95 % bootstrap interval; `by_query` [Q] are the values it averages."""

    mean: float
    low: float
    high: float
    by_query: NDArray[np.float64]


def half_subsets(sequences: int, subsets: int, seed: int) -> NDArray[np.bool_]:
    """Distinct uniform subsets of floor(N / 2) of N sequences: bool [M, N]. More subsets keep the earlier ones.

    Raises:
        ConfigError: where there are not so many different ones.
    """
    if sequences < 2 or subsets < 1 or subsets > math.comb(sequences, sequences // 2):
        raise ConfigError(f"{subsets} different half-subsets of {sequences} sequences do not exist; ask for fewer.")
    rng = np.random.default_rng(seed)
    kept_mn = np.zeros((subsets, sequences), np.bool_)
    seen: set[bytes] = set()
    while len(seen) < subsets:
        row = np.zeros(sequences, np.bool_)
        row[rng.permutation(sequences)[: sequences // 2]] = True
        if row.tobytes() not in seen:
            kept_mn[len(seen)] = row
            seen.add(row.tobytes())
    return kept_mn


def predict(kept_mn: NDArray[np.bool_], scores_nq: NDArray[np.floating]) -> NDArray[np.float64]:
    """The sum of the scores over each subset's sequences: [M, Q], linear in the scores."""
    return kept_mn.astype(np.float64) @ scores_nq.astype(np.float64)


def actual(retrainer: Retrainer, kept_mn: NDArray[np.bool_], seeds: Sequence[int]) -> NDArray[np.float64]:
    """What every query measures after training on each subset with each seed: [M, seeds, Q]."""
    measured = [retrainer.measure(chosen, seed) for chosen, seed in trainings(kept_mn, seeds)]
    return np.array(measured).reshape(len(kept_mn), len(seeds), -1)


def rank_correlation(x_m: NDArray[np.floating], y_m: NDArray[np.floating]) -> float:
    """Spearman's correlation, ties at their mean rank; 0 where a side is constant and so orders nothing."""
    return float(_weighted_rank_correlation(x_m, y_m, np.ones((1, len(x_m))))[0])


def resampled(
    predicted_mq: NDArray[np.floating], actual_mq: NDArray[np.floating], seed: int, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """LDS under `resamples` bootstrap draws over subsets and queries: [resamples].

    The draws depend on the seed and the shape alone, so two methods' results are paired.
    """
    M, Q = predicted_mq.shape
    rng = np.random.default_rng(seed)
    weights_bm = rng.multinomial(M, np.full(M, 1 / M), resamples).astype(np.float64)
    queries_bq = rng.integers(0, Q, (resamples, Q))
    by_query = [_weighted_rank_correlation(predicted_mq[:, q], actual_mq[:, q], weights_bm) for q in range(Q)]
    means: NDArray[np.float64] = np.take_along_axis(np.stack(by_query, axis=1), queries_bq, axis=1).mean(axis=1)
    return means


def lds(predicted_mq: NDArray[np.floating], actual_mq: NDArray[np.floating], seed: int) -> Estimate:
    """LDS with its interval. predicted_mq, actual_mq: [M, Q]; actual is the mean over training seeds.

    Raises:
        ConfigError: where fewer than three subsets were trained, or a prediction is not finite.
    """
    if len(predicted_mq) < 3:
        raise ConfigError(f"{len(predicted_mq)} subsets order nothing; LDS needs at least 3, and 32 to say much.")
    if not np.isfinite(predicted_mq).all():
        raise ConfigError("a prediction is NaN or infinite, because a score is; leave that query or sequence out.")
    Q = predicted_mq.shape[1]
    by_query = np.array([rank_correlation(predicted_mq[:, q], actual_mq[:, q]) for q in range(Q)])
    return _estimate(by_query, resampled(predicted_mq, actual_mq, seed))


def lds_difference(
    predicted_mq: NDArray[np.floating], other_mq: NDArray[np.floating], actual_mq: NDArray[np.floating], seed: int
) -> Estimate:
    """LDS of one method less another's, with the interval of paired bootstrap draws."""
    first, second = lds(predicted_mq, actual_mq, seed), lds(other_mq, actual_mq, seed)
    draws = resampled(predicted_mq, actual_mq, seed) - resampled(other_mq, actual_mq, seed)
    return _estimate(first.by_query - second.by_query, draws)


def random_scores(sequences: int, queries: int, seed: int) -> NDArray[np.float64]:
    """The control: scores that know nothing, [N, Q]."""
    return np.random.default_rng([seed, 1]).standard_normal((sequences, queries))


def _estimate(by_query: NDArray[np.float64], draws_b: NDArray[np.float64]) -> Estimate:
    low, high = np.percentile(draws_b, INTERVAL)
    return Estimate(float(by_query.mean()), float(low), float(high), by_query)


def _weighted_rank_correlation(
    x_m: NDArray[np.floating], y_m: NDArray[np.floating], weights_bm: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Spearman's correlation of samples that contain observation m weights_bm[b, m] times: [b]."""
    total_b1 = weights_bm.sum(axis=1, keepdims=True)

    def centred_ranks(v_m: NDArray[np.floating]) -> NDArray[np.float64]:
        below_mm = (v_m[:, None] < v_m[None, :]) + 0.5 * (v_m[:, None] == v_m[None, :])
        ranks_bm = weights_bm @ below_mm
        return ranks_bm - (weights_bm * ranks_bm).sum(axis=1, keepdims=True) / total_b1

    x_bm, y_bm = centred_ranks(x_m), centred_ranks(y_m)
    covariance_b = (weights_bm * x_bm * y_bm).sum(axis=1)
    scale_b = np.sqrt((weights_bm * x_bm**2).sum(axis=1) * (weights_bm * y_bm**2).sum(axis=1))
    return np.divide(covariance_b, scale_b, out=np.zeros_like(covariance_b), where=scale_b > 1e-9)
