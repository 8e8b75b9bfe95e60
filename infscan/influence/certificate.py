"""How many of the strongest rows a search that scores only some rows exactly may have missed: a bound that holds.

A search (a sieve, a compressed scan) leaves candidates, which alone are scored exactly. A uniform sample of all rows,
the audit, is scored exactly too, candidate or not. Both together say how detection goes with the exact score x:

    D(x) = C(x) / (C(x) + M(x)),    C(x): candidates that score x or more, all of them known;
                                    M(x): rows that do and are no candidates, known from the audit

M(x) has an exact upper limit, since how many of them a uniform sample finds is hypergeometric, whatever the scores are
and however alike rows are. D at the k-th published row is the recall of the published k, but no sample that is cheap
says much of so few rows. So one assumption: **detection gets no harder the further out a row lies** (D does not fall
with x). Then D's lower limit at any x further in, where there are enough rows, is one of the recall. The assumption is
tested by the same sample; where the test fails nothing is claimed. The limit without it is given beside
(docs/method.md#what-a-search-missed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

CONFIDENCE = 0.95
# Detection is looked at where so many shares of the candidates lie further out: the limits share what may go wrong.
_SHARES = (16, 8, 4, 2)
# A limit below this says nothing that one would act on.
_USEFUL = 0.5
_WITHDRAWN_AT = 0.05


@dataclass(frozen=True)
class Audit:
    """A sample drawn of all rows, uniformly within each stratum and without replacement.

    sizes: rows of every stratum, candidates included. stratum_n: int, the stratum of each audited row.
    """

    sizes: tuple[int, ...]
    stratum_n: NDArray[np.intp]

    @staticmethod
    def uniform(rows: int, audited: int) -> Audit:
        """One stratum."""
        return Audit((rows,), np.zeros(audited, np.intp))

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    def counted(self, chosen_n: NDArray[np.bool_]) -> NDArray[np.intp]:
        """How many of some audited rows are in each stratum: [H]."""
        return np.bincount(self.stratum_n[chosen_n], minlength=len(self.sizes))

    def estimate(self, chosen_n: NDArray[np.bool_]) -> float:
        """How many such rows there are, unbiased: every audited one stands for size / sampled of its stratum."""
        sampled = np.maximum(self.counted(np.ones(len(self.stratum_n), np.bool_)), 1)
        return float((self.counted(chosen_n) * np.asarray(self.sizes) / sampled).sum())

    def at_most(self, chosen_n: NDArray[np.bool_], alpha: float) -> int:
        """How many such rows there are at most, at confidence 1 - alpha, which strata share equally."""
        sampled = self.counted(np.ones(len(self.stratum_n), np.bool_))
        each = zip(self.sizes, sampled.tolist(), self.counted(chosen_n).tolist(), strict=True)
        return sum(hypergeometric_upper(size, n, x, alpha / len(self.sizes)) for size, n, x in each)


@dataclass(frozen=True)
class Evidence:
    """What is known of one query and side. Exact scores are turned so that larger is stronger.

    scores, sequence_ids: of all candidates, [c], in any order; those that have not the side's sign are left out.
    audited_n: exact scores of all audited rows, [n]. found_n: which of these are candidates, bool [n].
    """

    scores: NDArray[np.floating]
    sequence_ids: NDArray[np.int64]
    audited_n: NDArray[np.floating]
    found_n: NDArray[np.bool_]

    def strongest_first(self) -> Evidence:
        """The same with its candidates in order, none without the side's sign."""
        order = np.lexsort((self.sequence_ids, -self.scores))
        order = order[self.scores[order] > 0]
        return Evidence(self.scores[order], self.sequence_ids[order], self.audited_n, self.found_n)

    def missed(self, rank: int) -> NDArray[np.bool_]:
        """The audited rows that score at least what the candidate of this rank does and are none: bool [n]."""
        return ~self.found_n & (self.audited_n >= self.scores[rank - 1])


@dataclass(frozen=True)
class Level:
    """The detection curve at one exact score.

    candidates: C(x). missed: audited rows among M(x). tail_fraction: (C + M) / rows, M estimated, of a query and side
    on average. detected: D, estimated. low: its lower limit, at a confidence that leaves room for the other levels.
    """

    candidates: int
    missed: int
    tail_fraction: float
    detected: float
    low: float


@dataclass(frozen=True)
class Certificate:
    """What the published rows are known to hold of the `top` strongest ones.

    recall: lower limit at CONFIDENCE, if detection gets no harder further out; None where it is not known, for
    `reason`. without_assumption: the limit that holds whatever the scores are. level: of the curve, the one that the
    limit rests on. p_monotone: of the test of the assumption, small where it fails.
    """

    top: int
    audited: int
    recall: float | None
    without_assumption: float
    level: Level | None
    curve: tuple[Level, ...]
    p_monotone: float
    reason: str = ""

    @property
    def at_least(self) -> int | None:
        """Of the top rows, how many are published at the least."""
        return None if self.recall is None else math.ceil(self.recall * self.top - 1e-9)


def certify(evidence: Evidence, audit: Audit, top: int) -> Certificate:
    """The certificate of one query and side, for its `top` strongest rows."""
    return certify_together([evidence], audit, top)


def certify_together(evidence: Sequence[Evidence], audit: Audit, top: int) -> Certificate:
    """The certificate of several queries and sides: for the `top` strongest of each, together.

    All are scored on one sample, so audited rows that are missed anywhere are counted, each for as many queries and
    sides as a candidate that lies as far out counts for, size-biased: sum y^2 / sum y.
    """
    columns = [found for found in (one.strongest_first() for one in evidence) if len(found.scores)]
    wanted, audited = sum(min(top, len(one.scores)) for one in columns), len(audit.stratum_n)
    if not columns or not audited:
        return Certificate(0, audited, None, 0.0, None, (), 1.0, "there is nothing to certify")
    points = _points(columns, top)
    alpha = 1 - CONFIDENCE
    curve = tuple(_level(point, audit, alpha / len(points), len(columns)) for point in points)
    # Without an assumption a row may be missed for all of them.
    published = _counted(columns, [min(top, len(one.scores)) for one in columns])
    without = max(0.0, 1 - len(columns) * audit.at_most(published.missed_n, alpha) / wanted)
    p = _p_monotone([*points, _counted(columns, [len(one.scores) for one in columns])])
    best = max(curve, key=lambda level: level.low)
    recall, reason = max(best.low, without), ""
    if p < _WITHDRAWN_AT:
        reason = "strong rows are missed more often than weaker ones, which the certificate takes to be otherwise"
    elif recall < _USEFUL:
        reason = f"{audited} audited rows of {audit.rows} are too few"
    return Certificate(wanted, audited, None if reason else recall, without, best, curve, p, reason)


@dataclass(frozen=True)
class _Counted:
    """One level. candidates: that lie further out, over queries and sides. missed_n: bool [n], the audited rows that
    do for any of them and were missed. multiplicity: queries and sides that a row counts for."""

    candidates: int
    missed_n: NDArray[np.bool_]
    multiplicity: float


def _points(columns: Sequence[Evidence], top: int) -> list[_Counted]:
    """The curve's levels, the furthest out first."""
    ranks = [[min(len(one.scores), max(top, len(one.scores) // share)) for one in columns] for share in _SHARES]
    return [_counted(columns, list(some)) for some in sorted(set(map(tuple, ranks)))]


def _counted(columns: Sequence[Evidence], ranks: Sequence[int]) -> _Counted:
    missed_n = np.logical_or.reduce([one.missed(rank) for one, rank in zip(columns, ranks, strict=True)])
    ids = np.concatenate([one.sequence_ids[:rank] for one, rank in zip(columns, ranks, strict=True)])
    _, counts = np.unique(ids, return_counts=True)
    return _Counted(sum(ranks), missed_n, float((counts**2).sum() / counts.sum()))


def _level(point: _Counted, audit: Audit, alpha: float, columns: int) -> Level:
    C = point.candidates
    estimate = audit.estimate(point.missed_n) * point.multiplicity
    most = audit.at_most(point.missed_n, alpha) * point.multiplicity
    return Level(
        C, int(point.missed_n.sum()), (C + estimate) / audit.rows / columns, C / (C + estimate), C / (C + most)
    )


def _p_monotone(points: Sequence[_Counted]) -> float:
    """Whether rows further out are missed more often than rows further in: small where they are.

    If detection were the same at both of two levels, each row missed at the inner one would be at the outer one, too,
    with chance C_outer / C_inner; where it is better further out, with less. All pairs of levels, Bonferroni's way.
    """
    found = []
    for inner, inside in enumerate(points):
        for outside in points[:inner]:
            x, n = int(outside.missed_n.sum()), int(inside.missed_n.sum())
            found.append(_binomial_at_least(x, n, outside.candidates / inside.candidates))
    return min([1.0, *(p * len(found) for p in found)])


def hypergeometric_upper(rows: int, sampled: int, x: int, alpha: float) -> int:
    """The largest number of marked rows with which a sample has x of them or fewer with a chance of alpha or more.

    An exact upper limit at confidence 1 - alpha of what a finite population holds (as Clopper and Pearson's is of a
    share), from a uniform sample without replacement.
    """
    low, high = x, rows - (sampled - x)
    while low < high:
        middle = (low + high + 1) // 2
        if _hypergeometric_at_most(rows, sampled, middle, x) >= alpha:
            low = middle
        else:
            high = middle - 1
    return low


def _hypergeometric_at_most(rows: int, sampled: int, marked: int, x: int) -> float:
    """P(X <= x), X of `marked` rows in a sample."""
    i = torch.arange(max(0, sampled - (rows - marked)), min(x, marked, sampled) + 1, dtype=torch.float64)
    total = _log_choose(
        torch.tensor(float(rows), dtype=torch.float64), torch.tensor(float(sampled), dtype=torch.float64)
    )
    log_p = _log_choose(_like(i, marked), i) + _log_choose(_like(i, rows - marked), sampled - i) - total
    return float(log_p.exp().sum())


def binomial_interval(x: int, n: int, alpha: float = 1 - CONFIDENCE) -> tuple[float, float]:
    """The exact interval of a share of which x of n were seen (Clopper and Pearson, Biometrika 26, 1934).

    At x = n its lower end is (alpha / 2)^(1 / n): 0.025 for one of one.
    """
    return _largest_share(x, n, alpha / 2), 1 - _largest_share(n - x, n, alpha / 2)


def _largest_share(x: int, n: int, alpha: float) -> float:
    """The p with which x or more of n have a chance of alpha; 0 for x = 0."""
    low, high = 0.0, 1.0
    for _ in range(60 if x else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if _binomial_at_least(x, n, middle) >= alpha else (middle, high)
    return low


def _binomial_at_least(x: int, n: int, p: float) -> float:
    """P(X >= x), X of n draws with chance p."""
    if x == 0 or p >= 1:
        return 1.0
    i = torch.arange(x, n + 1, dtype=torch.float64)
    return float((_log_choose(_like(i, n), i) + i * math.log(p) + (n - i) * math.log1p(-p)).exp().sum())


def _like(i: torch.Tensor, value: int) -> torch.Tensor:
    return torch.full_like(i, float(value))


def _log_choose(n: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
