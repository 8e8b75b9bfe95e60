"""How well approximate scores agree with exact ones: Pearson with a bootstrap interval, and recall of the strongest."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating]

_RESAMPLES = 500
# Recall says something only where candidates are few among the sequences compared.
_RECALL_TOP, _RECALL_CANDIDATES, _RECALL_SHARE = 10, 40, 0.02


@dataclass(frozen=True)
class Agreement:
    """One query's approximate scores against its exact ones over a sample of sequences.

    pearson, with the bootstrap's 95 % interval [low, high] over sequences. recall: share of the exact top 10 among the
    approximate top 40; None where 40 are more than 2 % of the sample.
    """

    pearson: float
    low: float
    high: float
    recall: float | None


def pearson(x_nq: Scores, y_nq: Scores) -> NDArray[np.float64]:
    """Pearson's correlation of every column: [Q]; NaN where a column does not vary."""
    x, y = np.asarray(x_nq, np.float64), np.asarray(y_nq, np.float64)
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(axis=0) / np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))


def agreement(approximate_nq: Scores, exact_nq: Scores, seed: int) -> list[Agreement]:
    """Per query. approximate_nq, exact_nq: [n, Q], the same n sequences."""
    n, _ = exact_nq.shape
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, n, (_RESAMPLES, n))
    resampled = np.stack([pearson(approximate_nq[chosen], exact_nq[chosen]) for chosen in rows])
    with warnings.catch_warnings():
        # A column that never varies has no interval: NaN, as its correlation is.
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = np.nanquantile(resampled, [0.025, 0.975], axis=0)
    recall = _recall(approximate_nq, exact_nq)
    return [
        Agreement(float(r), float(a), float(b), found)
        for r, a, b, found in zip(pearson(approximate_nq, exact_nq), low, high, recall, strict=True)
    ]


def _recall(approximate_nq: Scores, exact_nq: Scores) -> list[float | None]:
    n, Q = exact_nq.shape
    if n * _RECALL_SHARE < _RECALL_CANDIDATES:
        return [None] * Q
    best = np.argsort(-exact_nq, axis=0, kind="stable")[:_RECALL_TOP]
    candidates = np.argsort(-approximate_nq, axis=0, kind="stable")[:_RECALL_CANDIDATES]
    return [float(np.isin(best[:, query], candidates[:, query]).mean()) for query in range(Q)]
