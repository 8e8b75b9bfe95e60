"""What rankings are worth: where the documents that answer stand in each order, and how often a document is on top."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from infscan.influence.agreement import INTERVAL

Floats = NDArray[np.floating]
TOP, RESAMPLES = 10, 10_000


def orders(found: Mapping[str, Floats]) -> dict[str, Floats]:
    """Scores [Q, N] of each method, the largest first, from what `exact_scores.score` found."""
    ekfac, dot = found["ekfac"], found["dot"]
    named = {
        "EK-FAC": ekfac,
        "EK-FAC, by size": np.abs(ekfac),
        "l-RelatIF": ekfac / np.sqrt(found["self_influence"]),
        "gradient dot product": dot,
        "gradient cosine": dot / np.sqrt(found["squares"]) / np.sqrt(found["query_squares"])[:, None],
    }
    return named | ({"BM25": found["bm25"]} if "bm25" in found else {})


def ranks_of(scores: Floats, golds: Sequence[int]) -> list[int]:
    """The rank of each of these documents, from 1; equal ones share the middle."""
    return [int((scores > scores[row]).sum() + (scores == scores[row]).sum() // 2) + 1 for row in golds]


def mean_with_interval(by_question: Sequence[float]) -> tuple[float, float, float]:
    """The mean over questions, and its 95 % interval by resampling them."""
    values = np.asarray(by_question, np.float64)
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), INTERVAL)
    return float(values.mean()), float(low), float(high)


def hubs(scores: Floats) -> str:
    """How unevenly documents share the questions' top lists."""
    Q, N = scores.shape
    top = np.argsort(-scores, axis=1)[:, :TOP]
    counts = np.bincount(top.ravel(), minlength=N)
    skewness = float(((counts - counts.mean()) ** 3).mean() / counts.std() ** 3)
    return f"{counts.max()} of {Q} | {(counts >= Q / 5).sum()} | {skewness:.1f}"


def table(found: Mapping[str, Floats], golds: Sequence[Sequence[int]]) -> list[str]:
    """A line per order: recall@10 over the documents that answer, the best one's reciprocal rank, and hubs."""
    lines = [
        f"| order | recall@{TOP} | median rank | MRR of the best | most often on top | in a fifth | skewness |",
        "|---|---|---|---|---|---|---|",
    ]
    asked = [query for query, rows in enumerate(golds) if rows]
    for name, scores in orders(found).items():
        ranks = [ranks_of(scores[query], golds[query]) for query in asked]
        recall = mean_with_interval([float(np.mean([rank <= TOP for rank in mine])) for mine in ranks])
        reciprocal = mean_with_interval([1 / min(mine) for mine in ranks])
        median = int(np.median([rank for mine in ranks for rank in mine]))
        said = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in (recall, reciprocal)]
        lines.append(f"| {name} | {said[0]} | {median} | {said[1]} | {hubs(scores)} |")
    return lines
