"""The query loss difference (docs/method.md#ground-truths): what removing a method's strongest sequences costs.

For every query: retrain without the top 1 % of its sequences under a method, and without a random 1 %. QLD is the rise
of the query's loss -f of the one over the other, in nats, averaged over seeds and queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from infscan.errors import ConfigError
from infscan_studies.truth.lds import RESAMPLES, Estimate
from infscan_studies.truth.retrain import Retrainer


def removed(sequences: int, share: float) -> int:
    """How many sequences `share` of them are: at least one.

    Raises:
        ConfigError: where the share is not between 0 and 1, or nothing would be left to train on.
    """
    count = max(1, round(share * sequences))
    if not 0 < share < 1 or count >= sequences:
        raise ConfigError(f"a share of {share} of {sequences} sequences cannot be removed; give one like 0.01.")
    return count


def without_top(scores_nq: NDArray[np.floating], share: float) -> NDArray[np.bool_]:
    """What is kept without each query's strongest proponents: bool [Q, N]; ties go by row.

    Raises:
        ConfigError: where a score is NaN: it has no rank.
    """
    if np.isnan(scores_nq).any():
        raise ConfigError("a score is NaN and has no rank; leave that query or sequence out.")
    N, Q = scores_nq.shape
    kept_qn = np.ones((Q, N), np.bool_)
    strongest_rq = np.argsort(-scores_nq, axis=0, kind="stable")[: removed(N, share)]
    np.put_along_axis(kept_qn, strongest_rq.T, False, axis=1)
    return kept_qn


def without_random(sequences: int, share: float, draws: int, seed: int) -> NDArray[np.bool_]:
    """What is kept without as many random sequences: bool [draws, N]; the same for every query and method."""
    rng = np.random.default_rng([seed, 2])
    kept_dn = np.ones((draws, sequences), np.bool_)
    for kept_n in kept_dn:
        kept_n[rng.permutation(sequences)[: removed(sequences, share)]] = False
    return kept_dn


def loss_rises(
    retrainer: Retrainer, kept_qn: NDArray[np.bool_], random_dn: NDArray[np.bool_], seeds: Sequence[int]
) -> NDArray[np.float64]:
    """Rise of query q's loss without its own top sequences over its mean without random ones, by seed: [seeds, Q]."""
    rises = []
    for seed in seeds:
        random_q = np.mean([retrainer.measure(np.flatnonzero(kept_n), seed) for kept_n in random_dn], axis=0)
        top_q = [retrainer.measure(np.flatnonzero(kept_n), seed)[q] for q, kept_n in enumerate(kept_qn)]
        # The loss is -f, so its rise is the fall of f.
        rises.append(random_q - np.array(top_q))
    return np.array(rises)


def qld(rises_sq: NDArray[np.float64], seed: int, resamples: int = RESAMPLES) -> Estimate:
    """The mean over queries and training seeds, in nats, with its 95 % interval from bootstrap draws over both.

    The draws depend on `seed` and the shape alone: `qld(a - b, seed)` is the paired difference of two methods.
    """
    S, Q = rises_sq.shape
    rng = np.random.default_rng(seed)
    seeds_bs, queries_bq = rng.integers(0, S, (resamples, S)), rng.integers(0, Q, (resamples, Q))
    draws_b = rises_sq[seeds_bs[:, :, None], queries_bq[:, None, :]].mean(axis=(1, 2))
    low, high = np.percentile(draws_b, (2.5, 97.5))
    return Estimate(float(rises_sq.mean()), float(low), float(high), rises_sq.mean(axis=0))
