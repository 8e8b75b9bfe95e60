"""Scores judged by a bank: LDS by kind of query, its ceiling, and what removing the strongest sequences costs.

    ceiling = sqrt(2 r / (1 + r)),   r = Spearman's correlation of what two seeds measure, over the subsets

By Spearman and Brown, 2 r / (1 + r) is how far the mean of two seeds agrees with another such mean; its root is how far
it agrees with the mean of infinitely many, which is the most that a prediction of the subset's effect can reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infscan.influence.agreement import INTERVAL
from infscan_studies.side_by_side import kind_of
from infscan_studies.truth.lds import predict, rank_correlation

# The row over all queries.
ALL = "all"
# How far a row's LDS is above EK-FAC's of the same layers, damping and queries, with its interval; null where there is
# no such row before it.
LEAD = ("lead", "lead_low", "lead_high")


@dataclass(frozen=True)
class Mean:
    """Over queries, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    queries: int


def over_queries(values_q: NDArray[np.floating], seed: int, resamples: int) -> Mean:
    """The draws depend on `seed` and the number of queries alone."""
    rows_bq = np.random.default_rng(seed).integers(0, len(values_q), (resamples, len(values_q)))
    low, high = np.percentile(values_q[rows_bq].mean(axis=1), INTERVAL)
    return Mean(float(values_q.mean()), float(low), float(high), len(values_q))


def ceilings(actual_msq: NDArray[np.floating]) -> NDArray[np.float64]:
    """The most that LDS can be, by query, [Q]; 1 where a single seed was trained and nothing is known of it."""
    seeds = actual_msq.shape[1]
    if seeds < 2:
        return np.ones(actual_msq.shape[2])
    pairs = list(combinations(range(seeds), 2))
    r_pq = np.array(
        [
            [rank_correlation(actual_msq[:, a, q], actual_msq[:, b, q]) for q in range(actual_msq.shape[2])]
            for a, b in pairs
        ]
    )
    r_q = np.clip(r_pq.mean(axis=0), 0, 1)
    return np.sqrt(seeds * r_q / (1 + (seeds - 1) * r_q))


def lds_by_query(
    kept_mn: NDArray[np.bool_], scores_nq: NDArray[np.floating], actual_mq: NDArray[np.floating]
) -> NDArray[np.float64]:
    """Spearman's correlation of prediction and measurement over the subsets, by query: [Q]."""
    predicted_mq = predict(kept_mn, scores_nq)
    return np.array([rank_correlation(predicted_mq[:, q], actual_mq[:, q]) for q in range(actual_mq.shape[1])])


def kinds_of(query_ids: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """The places of every kind's queries, all of them first."""
    kinds = [kind_of(query_id) for query_id in query_ids]
    found = {ALL: np.arange(len(kinds))}
    return found | {kind: np.flatnonzero([one == kind for one in kinds]) for kind in dict.fromkeys(kinds)}


def rows_of(
    query_ids: Sequence[str],
    lds_q: NDArray[np.floating],
    ceiling_q: NDArray[np.floating],
    facts: dict[str, Any],
    seed: int,
    resamples: int,
    before_q: NDArray[np.floating] | None = None,
) -> list[dict[str, Any]]:
    """A row for each kind of query; share: of the ceilings' mean. before_q: the LDS that its lead is over."""
    rows = []
    for kind, places in kinds_of(query_ids).items():
        found, ceiling = over_queries(lds_q[places], seed, resamples), float(ceiling_q[places].mean())
        lead = None if before_q is None else over_queries(lds_q[places] - before_q[places], seed, resamples)
        rows.append(
            {
                **facts,
                **(dict(zip(LEAD, (lead.mean, lead.low, lead.high), strict=True)) if lead else {}),
                "kind": kind,
                "lds": found.mean,
                "low": found.low,
                "high": found.high,
                "ceiling": ceiling,
                "share": found.mean / ceiling if ceiling else 0.0,
                "queries": found.queries,
            }
        )
    return rows
