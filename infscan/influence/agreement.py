"""How well one table of scores [Q, N] agrees with another: correlations, recall, bootstrap intervals, a control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from infscan.errors import ConfigError

Floats = NDArray[np.float64]
Kind = Literal["pearson", "spearman"]
INTERVAL = (2.5, 97.5)
# Recall says something only where the candidates are a small share of what they were chosen from.
MAX_CANDIDATE_SHARE = 0.02


def pearson(x_qn: NDArray[np.floating], y_qn: NDArray[np.floating]) -> Floats:
    """Per query, over sequences: [Q]. NaN where a row is constant."""
    x, y = (np.asarray(values, np.float64) for values in (x_qn, y_qn))
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))


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
    counts_rn, chosen_rq = _draws(Q, N, seed, resamples)
    values = np.nan_to_num(_weighted_pearson(x_qn, y_qn, np.ones((1, N)))[:, 0])
    by_query_qr = np.nan_to_num(_weighted_pearson(x_qn, y_qn, counts_rn))
    return _summary(values, by_query_qr, chosen_rq)


def difference(a: Agreement, b: Agreement) -> tuple[float, float, float]:
    """a's mean less b's, with its paired 95 % interval; both must come from one seed, reference and resamples."""
    low, high = np.percentile(a.replicates - b.replicates, INTERVAL)
    return a.mean - b.mean, float(low), float(high)


def check_recall(top: int, candidates: int, sequences: int) -> None:
    """Raises ConfigError where candidates are fewer than `top` or more than 2 % of the sequences."""
    if not top <= candidates <= MAX_CANDIDATE_SHARE * sequences:
        raise ConfigError(
            f"recall of the top {top} among {candidates} candidates of {sequences} sequences says little: candidates "
            f"must be at least the top and at most {MAX_CANDIDATE_SHARE:.0%} of the sequences; compare more sequences."
        )


def recall(reference_qn: NDArray[np.floating], scores_qn: NDArray[np.floating], *, top: int, candidates: int) -> Floats:
    """Per query, the share of the reference's `top` highest that are among the method's `candidates` highest: [Q].

    Ties: the lower column first.

    Raises:
        ConfigError: where candidates are fewer than `top` or more than 2 % of the sequences.
    """
    Q, N = reference_qn.shape
    check_recall(top, candidates, N)
    once_1n = np.ones((1, N))
    rows = [_weighted_recall(reference_qn[q], scores_qn[q], once_1n, top, candidates)[0] for q in range(Q)]
    return np.asarray(rows)


def recall_agreement(
    reference_qn: NDArray[np.floating],
    scores_qn: NDArray[np.floating],
    *,
    top: int,
    candidates: int,
    seed: int,
    resamples: int = 1000,
) -> Agreement:
    """`recall` with percentile intervals, from the draws that `agreement` makes of one seed.

    In a resample a sequence counts as often as it was drawn, among the top as among the candidates.

    Raises:
        ConfigError: as `recall`.
    """
    values = recall(reference_qn, scores_qn, top=top, candidates=candidates)
    Q, N = reference_qn.shape
    counts_rn, chosen_rq = _draws(Q, N, seed, resamples)
    by_query_qr = np.stack(
        [_weighted_recall(reference_qn[q], scores_qn[q], counts_rn, top, candidates) for q in range(Q)]
    )
    return _summary(values, by_query_qr, chosen_rq)


def random_scores(queries: int, sequences: int, seed: int) -> Floats:
    """The control: standard normal scores, [Q, N]. Its agreement with anything must be near 0."""
    return np.random.default_rng(seed).standard_normal((queries, sequences))


def _draws(Q: int, N: int, seed: int, resamples: int) -> tuple[Floats, NDArray[np.int64]]:
    """How often each sequence is in each resample [R, N], and the queries of each [R, Q]."""
    rng = np.random.default_rng(seed)
    counts_rn = rng.multinomial(N, np.full(N, 1 / N), size=resamples).astype(np.float64)
    return counts_rn, rng.integers(0, Q, (resamples, Q))


def _summary(values: Floats, by_query_qr: Floats, chosen_rq: NDArray[np.int64]) -> Agreement:
    replicates = by_query_qr[chosen_rq.T, np.arange(len(chosen_rq))].mean(axis=0)
    low, high = np.percentile(by_query_qr, INTERVAL, axis=1)
    mean_low, mean_high = np.percentile(replicates, INTERVAL)
    return Agreement(values, low, high, float(values.mean()), float(mean_low), float(mean_high), replicates)


def _weighted_recall(
    reference_n: NDArray[np.floating], scores_n: NDArray[np.floating], weights_rn: Floats, top: int, candidates: int
) -> Floats:
    """Recall with every sequence counted as often as its weight, for R sets of weights: [R]."""
    best_rn, found_rn = (
        _standing_in_top(values, weights_rn, size) for values, size in ((reference_n, top), (scores_n, candidates))
    )
    # Copies of one sequence are alike: as many as one side holds of it can be found on the other.
    shared_r: Floats = np.minimum(best_rn, found_rn).sum(axis=1) / top
    return shared_r


def _standing_in_top(values_n: NDArray[np.floating], weights_rn: Floats, size: int) -> Floats:
    """How often each sequence is among the `size` highest, ties by column: [R, N]."""
    order = np.argsort(-values_n, kind="stable")
    ordered_rn = weights_rn[:, order]
    before_rn = np.cumsum(ordered_rn, axis=1) - ordered_rn
    within_rn = np.empty_like(weights_rn)
    within_rn[:, order] = np.clip(size - before_rn, 0, ordered_rn)
    return within_rn


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
