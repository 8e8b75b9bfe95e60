"""How few sequences hold the influence: the tail of the scores, and the part that the strongest ones have.

Grosse et al. 2023 (section 5.2.1): over the top 0.01 % of the scores a power law fits better than its rivals, and the
top 1 % of the sequences hold 12 to 52 % of the positive influence. Laws are fitted by maximum likelihood and compared
by Vuong's likelihood ratio (Clauset, Shalizi and Newman 2009, arXiv 0706.1062; the powerlaw package).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infscan.errors import ConfigError
from infscan.results.dense import score_column
from infscan.results.read import read_scores
from infscan_studies.config import SparsityConfig

Floats = NDArray[np.float64]
SIDES = ("proponent", "opponent")
# Of these a truncated power law has the power law as a special case: its ratio is at most 0.
RIVALS = ("lognormal", "exponential", "stretched_exponential", "truncated_power_law")
_SEARCHED = 2000
DECIDED = 0.1

SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("side", pa.string()),
        # Scanned sequences, those on this side, and the influence that they hold together.
        ("sequences", pa.int64()),
        ("on_side", pa.int64()),
        ("total", pa.float64()),
        # The part of the total that the strongest share of all scanned sequences holds.
        ("shares", pa.list_(pa.struct([("share", pa.float64()), ("rows", pa.int64()), ("part", pa.float64())]))),
        # p(x) ~ x^-exponent from `threshold` on, over the `tail` strongest rows; null, with the reason.
        ("threshold", pa.float64()),
        ("tail", pa.int64()),
        ("exponent", pa.float64()),
        ("exponent_error", pa.float64()),
        ("ks", pa.float64()),
        ("fit", pa.float64()),
        # Vuong's normalised log-likelihood ratio of the power law to a rival (positive: the power law fits better), and
        # the probability of one so far from 0 where both fit alike.
        ("rivals", pa.list_(pa.struct([("law", pa.string()), ("ratio", pa.float64()), ("p", pa.float64())]))),
        ("reason", pa.string()),
        # The tail's scores, strongest first: what a figure draws.
        ("scores", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True)
class Tail:
    """p(x) = (exponent - 1) / threshold (x / threshold)^-exponent for x >= threshold, fitted to `scores`, descending.

    error: the exponent's standard error. ks: the largest distance between the two distribution functions. fit: the
    share of synthetic tails of the fitted law that are further from it, threshold and size given; a small one speaks
    against the law. Where the threshold was chosen for its small ks, `fit` is too kind.
    """

    threshold: float
    scores: Floats
    exponent: float
    error: float
    ks: float
    fit: float
    rivals: tuple[tuple[str, float, float], ...]


def sparsity(scores: pa.Table, config: SparsityConfig, seed: int) -> pa.Table:
    """A row per query and side. scores: of `read_scores`; those that are not finite are left out."""
    rows = []
    for column in [name for name in scores.column_names if name.startswith(score_column(""))]:
        values = np.asarray(scores[column].to_numpy(), np.float64)
        values = values[np.isfinite(values)]
        for side, signed in zip(SIDES, (values, -values), strict=True):
            strongest = np.sort(signed[signed > 0])[::-1]
            known = {"query": column.removeprefix(score_column("")), "side": side, "sequences": len(values)}
            total = float(strongest.sum())
            part = [_share(strongest, len(values), share) for share in config.shares]
            rows.append(
                known
                | {"on_side": len(strongest), "total": total, "shares": part}
                | _fitted(strongest, len(values), config, seed)
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _share(strongest: Floats, sequences: int, share: float) -> dict[str, float]:
    rows = max(1, round(share * sequences))
    total = float(strongest.sum())
    return {"share": share, "rows": rows, "part": float(strongest[:rows].sum()) / total if total else 0.0}


def _fitted(strongest: Floats, sequences: int, config: SparsityConfig, seed: int) -> dict[str, Any]:
    wanted = _SEARCHED if config.tail is None else round(config.tail * sequences)
    mine = strongest[:wanted]
    if len(mine) < config.least:
        return {"reason": f"{len(mine)} rows, and study.least={config.least}", "rivals": [], "scores": mine.tolist()}
    tail = fit_tail(mine, config.least if config.tail is None else len(mine), config.resamples, seed)
    return {
        "threshold": tail.threshold,
        "tail": len(tail.scores),
        "exponent": tail.exponent,
        "exponent_error": tail.error,
        "ks": tail.ks,
        "fit": tail.fit,
        "rivals": [{"law": law, "ratio": ratio, "p": p} for law, ratio, p in tail.rivals],
        "reason": None,
        "scores": tail.scores.tolist(),
    }


def fit_tail(scores: Floats, least: int, resamples: int, seed: int) -> Tail:
    """A power law's maximum-likelihood fit to the strongest of `scores` (positive, descending), at least `least`.

    The threshold is the score, of those that leave `least` or more, with the smallest Kolmogorov-Smirnov distance.

    Raises:
        ConfigError: where the powerlaw package is not installed.
    """
    try:
        import powerlaw
    except ImportError:
        raise ConfigError("powerlaw is not installed, and it fits the tail; install infscan[studies].") from None
    threshold = _best_threshold(scores, least)
    mine = scores[scores >= threshold]
    exponent = exponent_of(mine, threshold)
    ks, fit = held_to_law(mine, threshold, exponent, resamples, seed)
    with warnings.catch_warnings():
        # It says of every rival whose best fit is at the edge of what it tries that it does.
        warnings.simplefilter("ignore")
        fitted = powerlaw.Fit(mine / threshold, xmin=1.0, verbose=0)
        found = [(law, *fitted.distribution_compare("power_law", law, normalized_ratio=True)) for law in RIVALS]
    rivals = tuple((law, float(ratio), float(p)) for law, ratio, p in found)
    return Tail(threshold, mine, exponent, (exponent - 1) / np.sqrt(len(mine)), ks, fit, rivals)


def held_to_law(scores: Floats, threshold: float, exponent: float, resamples: int, seed: int) -> tuple[float, float]:
    """A tail's Kolmogorov-Smirnov distance to its power law, and the share of the law's own tails that are further.

    Of tails drawn from the law, each with the exponent fitted to it again (Clauset et al. 2009, section 4.1).
    """
    ks = float(_distance(scores[None, :], np.asarray([exponent]), threshold)[0])
    draws_rn = threshold * (1 - np.random.default_rng(seed).random((resamples, len(scores)))) ** (-1 / (exponent - 1))
    again = 1 + draws_rn.shape[1] / np.log(draws_rn / threshold).sum(axis=1)
    return ks, float((_distance(draws_rn, again, threshold) >= ks).mean())


def exponent_of(scores: Floats, threshold: float) -> float:
    """1 + n / sum log(x / threshold): Clauset et al. 2009, equation 3.1."""
    return float(1 + len(scores) / np.log(scores / threshold).sum())


def _best_threshold(scores: Floats, least: int) -> float:
    """Of the scores that leave at least `least` rows, the one with the smallest KS distance (Clauset et al., 3.3)."""
    candidates = np.unique(scores[least - 1 :])
    # A tail of equal scores has no exponent.
    distances = []
    for threshold in candidates:
        mine = scores[scores >= threshold]
        varies = mine[0] > threshold
        distances.append(
            _distance(mine[None, :], np.asarray([exponent_of(mine, threshold)]), threshold)[0] if varies else np.inf
        )
    return float(candidates[int(np.argmin(distances))])


def _distance(scores_rn: Floats, exponents_r: Floats, threshold: float) -> Floats:
    """Kolmogorov-Smirnov: the largest difference between a tail's and its law's distribution functions, [R]."""
    ordered = np.sort(scores_rn, axis=1)
    law_rn = 1 - (ordered / threshold) ** (1 - exponents_r[:, None])
    n = ordered.shape[1]
    above, below = np.arange(1, n + 1) / n - law_rn, law_rn - np.arange(n) / n
    return np.maximum(above.max(axis=1), below.max(axis=1))


def study(run: str, config: SparsityConfig, seed: int) -> pa.Table:
    """The study of a run with scan.scores=all.

    Raises:
        RunError: where the run is not finished, or kept its top rows' scores alone.
    """
    return sparsity(read_scores(run), config, seed)


def words(table: pa.Table) -> list[str]:
    """What was found, and what that cannot say."""
    rows = [row for row in table.to_pylist() if row["side"] == "proponent"]
    said = []
    for at, first in enumerate(rows[0]["shares"] if rows else []):
        parts = [row["shares"][at]["part"] for row in rows]
        said.append(
            f"The strongest {first['share']:.3g} of the sequences ({first['rows']:,} of {rows[0]['sequences']:,}) hold "
            f"{np.median(parts):.0%} of the positive influence ({min(parts):.0%} to {max(parts):.0%} over {len(rows)} "
            "queries)."
        )
    fitted = [row for row in rows if row["exponent"] is not None]
    if fitted:
        exponents = [row["exponent"] for row in fitted]
        rejected = sum(row["fit"] < DECIDED for row in fitted)
        said.append(
            f"A power law over the {np.median([row['tail'] for row in fitted]):.0f} strongest (median) has exponent "
            f"{np.median(exponents):.2f} ({min(exponents):.2f} to {max(exponents):.2f}); of {len(fitted)} tails, "
            f"{rejected} are no power law (p < {DECIDED})."
        )
        said += [_against(fitted, law) for law in RIVALS]
    unfitted = len(rows) - len(fitted)
    if unfitted:
        said.append(f"{unfitted} queries have too few rows on the side for a fit ({_reason(rows)}).")
    return [*said, *_limits(rows)]


def _against(fitted: Sequence[dict[str, Any]], law: str) -> str:
    found = [one for row in fitted for one in row["rivals"] if one["law"] == law and np.isfinite(one["ratio"])]
    better = sum(one["ratio"] < 0 and one["p"] < DECIDED for one in found)
    worse = sum(one["ratio"] > 0 and one["p"] < DECIDED for one in found)
    name = law.replace("_", " ")
    return f"Against it, {name}: better on {better}, worse on {worse}, undecided on {len(found) - better - worse}."


def _reason(rows: Sequence[dict[str, Any]]) -> str:
    return next(row["reason"] for row in rows if row["reason"])


def _limits(rows: Sequence[dict[str, Any]]) -> list[str]:
    sequences = rows[0]["sequences"] if rows else 0
    return [
        f"It cannot say: how the tail goes on beyond {sequences:,} sequences; whether a law holds where two are "
        "undecided (short tails seldom decide); and scores are the scan's, compressed unless scan.rank=null."
    ]
