"""Methods' scores beside a reference's: the table that every validation writes, whatever its ground truth is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infscan.influence.agreement import MAX_CANDIDATE_SHARE, Agreement, agreement, difference, recall, spearman

AVERAGE = "*"  # the row over all queries; no query id can be this
EKFAC, DOT, BM25, RANDOM = "EK-FAC", "gradient dot product", "BM25", "random"
SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("method", pa.string()),
        ("pearson", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("spearman", pa.float64()),
        ("recall", pa.float64()),
        ("seconds", pa.float64()),
    ]
)
_TOP = 10


@dataclass(frozen=True)
class Scored:
    """One method's scores [Q, N], and the seconds it took on the query side, for all queries together."""

    name: str
    scores_qn: NDArray[np.floating]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """scored: by method, the reference apart. fit_seconds: EK-FAC's factors."""

    query_ids: tuple[str, ...]
    reference: Scored
    scored: list[Scored]
    fit_seconds: float


def judge(found: Comparison, resamples: int, seed: int) -> dict[str, Agreement]:
    """Each method's Pearson with the reference; one seed, so that any two can be compared in pairs."""
    return {
        one.name: agreement(found.reference.scores_qn, one.scores_qn, seed=seed, resamples=resamples)
        for one in found.scored
    }


def to_table(found: Comparison, agreements: Mapping[str, Agreement]) -> pa.Table:
    """Rows by method: one per query, then the average over queries (`*`).

    seconds: the method's, for all queries together. recall: of the reference's strongest proponents (ten, or as many
    as 2 % of the sequences are) among as many candidates as 2 % allow; null where they allow none.
    """
    reference_qn = found.reference.scores_qn
    candidates = int(MAX_CANDIDATE_SHARE * reference_qn.shape[1])
    rows = []
    for one in found.scored:
        judged = agreements[one.name]
        rank_correlations = np.nan_to_num(spearman(reference_qn, one.scores_qn))
        recalls = (
            recall(reference_qn, one.scores_qn, top=min(_TOP, candidates), candidates=candidates)
            if candidates
            else np.full(len(found.query_ids), np.nan)
        )
        columns = zip(found.query_ids, judged.values, judged.low, judged.high, rank_correlations, recalls, strict=True)
        average = (
            AVERAGE,
            judged.mean,
            judged.mean_low,
            judged.mean_high,
            rank_correlations.mean(),
            recalls.mean(),
        )
        for query, value, low, high, by_rank, recalled in [*columns, average]:
            rows.append(
                {
                    "query": query,
                    "method": one.name,
                    "pearson": float(value),
                    "low": float(low),
                    "high": float(high),
                    "spearman": float(by_rank),
                    "recall": float(recalled) if np.isfinite(recalled) else None,
                    "seconds": one.seconds,
                }
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def facts_of(found: Comparison, agreements: Mapping[str, Agreement]) -> dict[str, Any]:
    """What every table's footer contains: the reference, EK-FAC's lead over each other method (paired interval)."""
    return {
        "reference": found.reference.name,
        "reference_seconds": found.reference.seconds,
        "fit_seconds": found.fit_seconds,
        "points": int(found.reference.scores_qn.shape[1]),
        "gain_of_ekfac": {
            name: difference(agreements[EKFAC], other) for name, other in agreements.items() if name != EKFAC
        },
    }
