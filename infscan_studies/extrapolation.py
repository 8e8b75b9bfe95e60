"""How far must an unfiltered scan go to find what the TF-IDF filter's candidates held?

Grosse et al. 2023 (section 5.2.2) scan a sample of the corpus without a filter, fit a power law to the tail of its
scores, and ask after how many sequences the law expects the k-th strongest to be as strong as the filter's:
k / P(score >= s_k).
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
from infscan_studies.sparsity import exponent_of

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
        # Sequences after which its k-th strongest is expected to reach `score`; 95 % over tails drawn anew.
        ("needed", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)


def needed(scores: Floats, wanted: float, k: int, tail: int, resamples: int, seed: int) -> dict[str, Any]:
    """Sequences after which the k-th strongest is expected at `wanted` or above. scores: [N], all of a sample's.

    A power law over the `tail` strongest gives P(score >= wanted); below its threshold the sample's own share does.
    low, high: 95 % percentiles over the tail's scores drawn anew, its threshold held (below it: over how many of so
    many sequences reach `wanted`); they leave out what chance does to the few strongest that are to be matched.

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
        drawn_r = k * len(scores) / np.maximum(rng.binomial(len(scores), count / len(scores), resamples), 1)
    else:

        def at(exponents: Floats) -> Floats:
            return k * len(scores) / (tail * (wanted / threshold) ** (1 - exponents))

        expected = float(at(np.asarray(exponent)))
        # A tail drawn as one value throughout would have no exponent; ten rows and more do not come out so.
        drawn_rn = rng.choice(strongest, (resamples, tail))
        drawn_r = at(1 + tail / np.log(drawn_rn / threshold).sum(axis=1))
    low, high = np.percentile(drawn_r, INTERVAL)
    return {
        "threshold": threshold,
        "tail": tail,
        "exponent": exponent,
        "needed": expected,
        "low": float(low),
        "high": float(high),
    }


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
    return [
        *said,
        "It cannot say: that the tail goes on as fitted (a corpus ends, and copies of a query are no part of a smooth "
        "tail); and the filter's rows are strong by shared words, which need not be the strongest kind there is.",
    ]
