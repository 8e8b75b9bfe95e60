"""How far must an unfiltered scan go to find what the TF-IDF filter's candidates held?

Grosse et al. 2023 (section 5.2.2) scan a sample of the corpus without a filter, fit a power law to the tail of its
scores, and ask after how many sequences the law expects the k-th strongest to be as strong as the filter's:
k / P(score >= s_k).

A tail that is no power law makes this wrong by a factor, and a short one does not show it. So the interval is that of
two laws: the power law, and the generalised Pareto law, to which the tail of every usual distribution tends (Pickands
1975) and of which the power law is a special case. Its shape is estimated after Zhang and Stephens (2009).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infscan.config import from_yaml
from infscan.errors import RunError
from infscan.influence.agreement import INTERVAL
from infscan.results.dense import score_column
from infscan.results.read import read_scores, read_summary, read_top
from infscan.storage import Store
from infscan_studies.config import ExtrapolationConfig
from infscan_studies.sparsity import DECIDED, exponent_of, held_to_law

Floats = NDArray[np.float64]

SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("k", pa.int64()),
        # The filter's k-th strongest scan score, and how many sequences it kept.
        ("score", pa.float64()),
        ("kept", pa.int64()),
        # The unfiltered scan: its sequences, and the power law from `threshold` on over its `tail` strongest.
        ("scanned", pa.int64()),
        ("threshold", pa.float64()),
        ("tail", pa.int64()),
        ("exponent", pa.float64()),
        # Of tails of that law, the share that are further from it: a small one speaks against the law.
        ("fit", pa.float64()),
        # Sequences after which its k-th strongest is expected to reach `score`; 95 % over tails drawn anew, by
        # whichever of the two laws is further off (infinite: a tail may end before `score`).
        ("needed", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)


def needed(scores: Floats, wanted: float, k: int, tail: int, resamples: int, seed: int) -> dict[str, Any]:
    """Sequences after which the k-th strongest is expected at `wanted` or above. scores: [N], all of a sample's.

    A power law over the `tail` strongest gives P(score >= wanted); below its threshold the sample's own share does.
    low, high: 95 % percentiles over the tail's scores drawn anew, its threshold held, of the power law and of the
    generalised Pareto law together (below the threshold: over how many of so many sequences reach `wanted`); they leave
    out what chance does to the few strongest that are to be matched.

    Raises:
        RunError: where fewer than `tail` scores are positive.
    """
    strongest = np.sort(scores[scores > 0])[::-1][:tail]
    if len(strongest) < tail:
        raise RunError(f"{len(strongest)} of {len(scores)} scores are positive, and study.tail={tail}; lower it.")
    threshold, rng = float(strongest[-1]), np.random.default_rng(seed)
    exponent = exponent_of(strongest, threshold)
    if wanted <= threshold:
        count = int((scores >= wanted).sum())
        expected = k * len(scores) / count
        drawn = [k * len(scores) / np.maximum(rng.binomial(len(scores), count / len(scores), resamples), 1)]
    else:

        def at(beyond: Floats) -> Floats:
            """beyond: the share of the tail's rows at `wanted` or above."""
            with np.errstate(divide="ignore"):
                return k * len(scores) / (tail * beyond)

        expected = float(at(np.asarray((wanted / threshold) ** (1 - exponent))))
        # A tail drawn as one value throughout would have no exponent; ten rows and more do not come out so.
        drawn_rn = rng.choice(strongest, (resamples, tail))
        exponents_r = 1 + tail / np.log(drawn_rn / threshold).sum(axis=1)
        drawn = [
            at((wanted / threshold) ** (1 - exponents_r)),
            at(np.asarray([share_beyond(row, threshold, wanted) for row in drawn_rn])),
        ]
    # One that lies there: between two numbers, one of which may be infinite, is none.
    bounds = np.asarray([np.percentile(drawn_r, INTERVAL, method="nearest") for drawn_r in drawn])
    return {
        "threshold": threshold,
        "tail": tail,
        "exponent": exponent,
        "fit": held_to_law(strongest, threshold, exponent, resamples, seed)[1],
        "needed": expected,
        "low": float(bounds[:, 0].min()),
        "high": float(bounds[:, 1].max()),
    }


def share_beyond(tail: Floats, threshold: float, wanted: float) -> float:
    """P(score >= wanted | score >= threshold) by the generalised Pareto law that fits a tail, [n] of any order.

    (1 + shape (wanted - threshold) / scale)^(-1 / shape), 0 beyond the end of a law of negative shape. Zhang and
    Stephens 2009: the posterior mean of shape / scale under a prior that the data scale, then the likeliest shape.
    """
    # A quartile of 0, where scores repeat, would scale nothing.
    excess = np.maximum(np.sort(tail) - threshold, 1e-9 * threshold)
    size, grid = len(excess), 30 + int(np.sqrt(len(excess)))
    quartile = excess[int(size / 4 + 0.5) - 1]
    ratios = (1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))) / (3 * quartile) + 1 / excess[-1]
    shapes = np.log1p(-ratios[:, None] * excess).mean(axis=1)
    likelihood = size * (np.log(-ratios / shapes) - shapes - 1)
    weights = np.exp(likelihood - likelihood.max())
    ratio = float((ratios * weights).sum() / weights.sum())
    shape = float(np.log1p(-ratio * excess).mean())
    inside = 1 - ratio * (wanted - threshold)
    return float(inside ** (-1 / shape)) if inside > 0 else 0.0


def extrapolated(
    scores: Mapping[str, Floats], filtered: Mapping[str, Floats], kept: int, config: ExtrapolationConfig, seed: int
) -> pa.Table:
    """scores: by query, every scan score of the unfiltered run; filtered: the filtered run's, strongest first."""
    rows = []
    for query, mine in scores.items():
        found = filtered.get(query, np.empty(0))
        tail = max(config.least, round(config.tail * len(mine)))
        for k in (k for k in config.ks if k <= len(found)):
            wanted = float(found[k - 1])
            known = {"query": query, "k": k, "score": wanted, "kept": kept, "scanned": len(mine)}
            rows.append(known | needed(mine, wanted, k, tail, config.resamples, seed))
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def study(run: str, config: ExtrapolationConfig, seed: int) -> pa.Table:
    """`run` scanned sequences that no filter chose, with scan.scores=all; study.filtered scanned the filter's.

    Raises:
        RunError: where their queries or factors differ, or one is not finished.
    """
    assert config.filtered is not None
    mine, theirs = (made_with(uri) for uri in (run, config.filtered))
    for what in mine:
        if mine[what] != theirs[what]:
            raise RunError(
                f"{run} and {config.filtered} have other {what}, so that their scores are of two kinds; scan the "
                "filtered corpus with the same model, queries and factors.path."
            )
    table = read_scores(run)
    columns = [name for name in table.column_names if name.startswith(score_column(""))]
    scores = {name.removeprefix(score_column("")): np.asarray(table[name].to_numpy(), np.float64) for name in columns}
    filtered: dict[str, list[float]] = {}
    for row in read_top(config.filtered).to_pylist():
        if row["side"] == "proponent":
            filtered.setdefault(row["query_id"], []).append(row["scan_score"])
    ordered = {query: np.sort(np.asarray(values))[::-1] for query, values in filtered.items()}
    return extrapolated(
        {query: values[np.isfinite(values)] for query, values in scores.items()},
        ordered,
        int(read_summary(config.filtered)["counts"]["scanned"]["sequences"]),
        config,
        seed,
    )


def made_with(run: str) -> dict[str, Any]:
    """What two runs must share for their scores to be of one kind.

    Raises:
        RunError: where the run is not finished.
    """
    inputs = read_summary(run)["inputs"]
    factors = from_yaml(Store(run).read("config.yaml").decode())["factors"]
    return {
        "model": inputs.get("model"),
        "queries": inputs.get("queries"),
        "factors": [factors[name] for name in ("path", "solver", "damping")],
    }


def words(table: pa.Table) -> list[str]:
    """What was found, and what that cannot say."""
    rows = table.to_pylist()
    said = []
    for k in sorted({row["k"] for row in rows}):
        mine = [row for row in rows if row["k"] == k]
        sequences = np.asarray([row["needed"] for row in mine])
        beyond = sum(row["needed"] > row["scanned"] for row in mine)
        said.append(
            f"For a {k}. row as strong as the filter's ({mine[0]['kept']:,} sequences for all queries), an unfiltered "
            f"scan needs {np.median(sequences):,.0f} sequences (median; {sequences.min():,.0f} to "
            f"{sequences.max():,.0f} over {len(mine)} queries); {beyond} of them more than the "
            f"{mine[0]['scanned']:,} that were scanned."
        )
    tails = {row["query"]: row for row in rows}.values()
    rejected = sum(row["fit"] < DECIDED for row in tails)
    return [
        *said,
        f"Of {len(tails)} tails, {rejected} are no power law (p < {DECIDED}); of those the number itself is wrong, and "
        "the interval in the table, which allows for other tails too, is what can be said.",
        "It cannot say: that the tail goes on as fitted (a corpus ends, and copies of a query are no part of a smooth "
        "tail); and the filter's rows are strong by shared words, which need not be the strongest kind there is.",
    ]
