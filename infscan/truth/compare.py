"""How well one table of scores [Q, N] agrees with another: correlations, recall, bootstrap intervals, a control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from infscan.errors import ConfigError
from infscan.influence.agreement import pearson as pearson_by_column

Floats = NDArray[np.float64]
Kind = Literal["pearson", "spearman"]
INTERVAL = (2.5, 97.5)
# Recall says something only where the candidates are a small share of what they were chosen from.
MAX_CANDIDATE_SHARE = 0.02


def pearson(x_qn: NDArray[np.floating], y_qn: NDArray[np.floating]) -> Floats:
    """Per query, over sequences: [Q]. NaN where a row is constant."""
    return pearson_by_column(np.asarray(x_qn).T, np.asarray(y_qn).T)


def spearman(x_qn: NDArray[np.floating], y_qn: NDArray[np.floating]) -> Floats:
    """Pearson of the ranks, ties sharing their mean rank: [Q]."""
    return pearson(ranks(x_qn), ranks(y_qn))


def ranks(x_qn: NDArray[np.floating]) -> Floats:
    """Ranks 1..N within each row, ties sharing their mean rank: [Q, N]."""

    def one(row: NDArray[np.floating]) -> Floats:
        _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return np.stack([one(row) for row in x_qn])


@dataclass(frozen=True)
class Agreement:
    """A correlation with a reference, per query and on average, each with a 95 % bootstrap interval.

    values, low, high: [Q], intervals over sequences. mean, mean_low, mean_high: over queries and sequences.
    replicates: [R], the mean in every resample; two methods' replicates of one seed are paired.
    """

    values: Floats
    low: Floats
    high: Floats
    mean: float
    mean_low: float
    mean_high: float
    replicates: Floats


def agreement(
    reference_qn: NDArray[np.floating],
    scores_qn: NDArray[np.floating],
    *,
    seed: int,
    resamples: int = 1000,
    kind: Kind = "pearson",
) -> Agreement:
    """Correlation per query with percentile intervals.

    A resample draws N sequences with replacement, the same ones for every query (queries are judged on one corpus), and
    for the mean Q queries as well. Spearman's ranks are taken once, of all sequences. A row that is constant (a
    sequence nothing tells apart) has no correlation and counts as 0.
    """
    if kind == "spearman":
        reference_qn, scores_qn = ranks(reference_qn), ranks(scores_qn)
    x_qn, y_qn = _wide(reference_qn), _wide(scores_qn)
    Q, N = x_qn.shape
    rng = np.random.default_rng(seed)
    counts_rn = rng.multinomial(N, np.full(N, 1 / N), size=resamples).astype(np.float64)
    chosen_rq = rng.integers(0, Q, (resamples, Q))
    values = np.nan_to_num(_weighted_pearson(x_qn, y_qn, np.ones((1, N)))[:, 0])
    by_query_qr = np.nan_to_num(_weighted_pearson(x_qn, y_qn, counts_rn))
    replicates = by_query_qr[chosen_rq.T, np.arange(resamples)].mean(axis=0)
    low, high = np.percentile(by_query_qr, INTERVAL, axis=1)
    mean_low, mean_high = np.percentile(replicates, INTERVAL)
    return Agreement(values, low, high, float(values.mean()), float(mean_low), float(mean_high), replicates)


def difference(a: Agreement, b: Agreement) -> tuple[float, float, float]:
    """a's mean less b's, with its paired 95 % interval; both must come from one seed, reference and resamples."""
    low, high = np.percentile(a.replicates - b.replicates, INTERVAL)
    return a.mean - b.mean, float(low), float(high)


def recall(reference_qn: NDArray[np.floating], scores_qn: NDArray[np.floating], *, top: int, candidates: int) -> Floats:
    """Per query, the share of the reference's `top` highest that are among the method's `candidates` highest: [Q].

    Ties: the lower column first.

    Raises:
        ConfigError: where candidates are fewer than `top` or more than 2 % of the sequences.
    """
    N = reference_qn.shape[1]
    if not top <= candidates <= MAX_CANDIDATE_SHARE * N:
        raise ConfigError(
            f"recall of the top {top} among {candidates} candidates of {N} sequences says little: candidates must be "
            f"at least the top and at most {MAX_CANDIDATE_SHARE:.0%} of the sequences; compare more sequences."
        )
    best = np.argsort(-reference_qn, axis=1, kind="stable")[:, :top]
    found = np.argsort(-scores_qn, axis=1, kind="stable")[:, :candidates]
    return np.asarray([np.isin(mine, other).mean() for mine, other in zip(best, found, strict=True)])


def random_scores(queries: int, sequences: int, seed: int) -> Floats:
    """The control: standard normal scores, [Q, N]. Its agreement with anything must be near 0."""
    return np.random.default_rng(seed).standard_normal((queries, sequences))


def _wide(x_qn: NDArray[np.floating]) -> Floats:
    # Centred first: raw scores can be large against their spread, and the sums below square them.
    wide = x_qn.astype(np.float64)
    return wide - wide.mean(axis=1, keepdims=True)


def _weighted_pearson(x_qn: Floats, y_qn: Floats, weights_rn: Floats) -> Floats:
    """Pearson with every sequence counted by its weight, for R sets of weights: [Q, R]."""
    total_r = weights_rn.sum(axis=1)
    x_qr, y_qr = (values @ weights_rn.T / total_r for values in (x_qn, y_qn))
    xx, yy, xy = (values @ weights_rn.T / total_r for values in (x_qn**2, y_qn**2, x_qn * y_qn))
    covariance, spread = xy - x_qr * y_qr, np.sqrt(np.maximum((xx - x_qr**2) * (yy - y_qr**2), 0))
    # Below rounding there is no spread to speak of: a constant row.
    tiny = 1e-12 * np.sqrt(np.maximum(xx * yy, np.finfo(np.float64).tiny))
    return np.where(spread > tiny, covariance / np.where(spread > tiny, spread, 1), np.nan)
