"""How many of the strongest rows a search that scores only some rows exactly may have missed: a bound that holds.

A search (a sieve, a compressed scan) leaves candidates, which alone are scored exactly. A uniform sample of all rows,
the audit, is scored exactly too, candidate or not. Both together say how detection goes with the exact score x:

    D(x) = C(x) / (C(x) + M(x)),    C(x): candidates that score x or more, all of them known;
                                    M(x): rows that do and are no candidates, known from the audit

The scores are fixed and the sample is random, so what an audit finds of the M(x) bounds them, whatever the scores are
and however alike rows are. D at the k-th published row is the recall of the published k, but no sample that is cheap
says much of so few rows. So one assumption: **detection gets no harder the further out a row lies** (D does not fall
with x). Then the rate at which rows are missed further in, where there are enough of them, is at least that of the
strongest. The level is chosen before the audit is looked at; the assumption is tested by the same sample, and where the
test fails nothing is claimed. The limit without it is given beside
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
# By how much detection is expected to be worse where as many candidates lie further out as a query and side has of its
# own: between 0.1 and 0.2 in simulated searches (docs/reports/sieve.md). It chooses the level; no limit rests on it.
_HARDER = 0.12
# So many missed rows tell for how many queries and sides one counts.
_ENOUGH = 5
# A limit below this says nothing that one would act on.
_USEFUL = 0.5
_WITHDRAWN_AT = 0.05


@dataclass(frozen=True)
class Audit:
    """A sample drawn of all rows, candidates included, uniformly and without replacement."""

    rows: int
    audited: int


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

    rank: of a query's and side's candidates, the last that scores so much. candidates: C(x), of all queries and sides
    together, as all that follows. missed: audited among M(x). tail_fraction: (C + M) / rows, M estimated, of a query
    and side on average. detected: D, estimated.
    """

    rank: int
    candidates: int
    missed: int
    tail_fraction: float
    detected: float


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


def certify(evidence: Evidence, audit: Audit, top: int, sought: int = 1) -> Certificate:
    """The certificate of one query and side, for its `top` strongest rows; candidates were sought for so many."""
    return certify_together([evidence], audit, top, sought)


def certify_together(evidence: Sequence[Evidence], audit: Audit, top: int, sought: int = 0) -> Certificate:
    """The certificate of several queries and sides: for the `top` strongest of each, together.

    All are scored on one sample. An audited row that is missed for several queries and sides counts for each; that it
    does so at once is what `_most_missed` allows for. sought: queries and sides whose candidates all are; these, where
    it is less.
    """
    columns = [found for found in (one.strongest_first() for one in evidence) if len(found.scores)]
    wanted = sum(min(top, len(one.scores)) for one in columns)
    if not columns or not audit.audited:
        return Certificate(0, audit.audited, None, 0.0, None, (), 1.0, "there is nothing to certify")
    own = len(np.unique(np.concatenate([one.sequence_ids for one in columns]))) / max(sought, len(columns))
    points = [_counted(columns, rank) for rank in _ranks(top, int(own))]
    curve = tuple(_level(point, audit, len(columns)) for point in points)
    best = min(range(len(points)), key=lambda place: _expected(points[place], audit, own))
    recall = wanted / (wanted + _most_missed(points[best], points[-1], audit, wanted))
    # Without an assumption a row may be missed for all of them.
    hidden = hypergeometric_upper(audit.rows, audit.audited, int((points[0].missed_n > 0).sum()), 1 - CONFIDENCE)
    without = max(0.0, 1 - len(columns) * hidden / wanted)
    p, reason = _p_monotone([*points, _counted(columns, max(len(one.scores) for one in columns))]), ""
    if p < _WITHDRAWN_AT:
        reason = "strong rows are missed more often than weaker ones, which the certificate takes to be otherwise"
    elif recall < _USEFUL:
        reason = f"{audit.audited} audited rows of {audit.rows} are too few"
    return Certificate(wanted, audit.audited, None if reason else recall, without, curve[best], curve, p, reason)


@dataclass(frozen=True)
class _Counted:
    """One level. candidates: that lie further out, over queries and sides. missed_n: for how many of these each audited
    row was missed, [n]. multiplicity: for how many a candidate counts, on average."""

    rank: int
    candidates: int
    missed_n: NDArray[np.intp]
    multiplicity: float

    @property
    def missed(self) -> int:
        return int(self.missed_n.sum())


def _ranks(top: int, most: int) -> list[int]:
    """The curve's levels, the furthest out first: top, twice that, ... up to a query's and side's share of what was
    found."""
    return [top << step for step in range(max(1, (most // max(1, top)).bit_length()))]


def _counted(columns: Sequence[Evidence], rank: int) -> _Counted:
    ranks = [min(rank, len(one.scores)) for one in columns]
    pairs = list(zip(columns, ranks, strict=True))
    missed_n = np.stack([one.missed(mine) for one, mine in pairs]).sum(axis=0)
    distinct = len(np.unique(np.concatenate([one.sequence_ids[:mine] for one, mine in pairs])))
    return _Counted(rank, sum(ranks), missed_n, sum(ranks) / distinct)


def _level(point: _Counted, audit: Audit, columns: int) -> Level:
    C, M = point.candidates, point.missed * audit.rows / audit.audited
    return Level(point.rank, C, point.missed, (C + M) / audit.rows / columns, C / (C + M))


def _expected(point: _Counted, audit: Audit, own: float) -> float:
    """What the limit is expected to leave open at a level, by which one is chosen.

    Three missed rows are not excluded where none was seen, of as many as the audit has there (none, where it has all);
    and detection is worse further in, by _HARDER where rank is `own`, a query's and side's share of what was found. Of
    candidates alone, so that the choice knows nothing of which rows the audit drew, and the limit holds whatever is
    chosen.
    """
    share = audit.audited / audit.rows
    return 3 * point.multiplicity * (1 - share) / share / point.candidates + _HARDER * point.rank / own


def _most_missed(point: _Counted, further_in: _Counted, audit: Audit, wanted: int) -> float:
    """Of the strongest rows, how many were missed at most: a prediction at CONFIDENCE.

    The audit missed x = sum y at this level, a row counting y. With w for a row that it did not see, the expected
    number in so large a sample has the gamma distribution with mean x + w and variance sum y^2 + w^2 (Fay and Feuer,
    Statistics in Medicine 16, 1997: for w = y = 1 its quantile is the exact limit of a Poisson mean). What a further
    sample misses, w at a time, is then negative binomial; without rows that count for several this is Nelson's exact
    prediction. At the level of the strongest rows themselves that sample is all rows not audited; further in, as many
    as the strongest are, at the rate found there. w: what a missed row counts for at the curve's last level, where
    there are more of them and each counts for more, size-biased (sum y^2 / sum y); what candidates count for, where
    fewer than _ENOUGH were seen.
    """
    x, squares, rest = point.missed, float((point.missed_n**2).sum()), audit.rows / audit.audited
    w = point.multiplicity
    if int((further_in.missed_n > 0).sum()) >= _ENOUGH:
        w = float((further_in.missed_n**2).sum()) / further_in.missed
    mean, variance = x + w, squares + w * w
    if point.candidates == wanted:
        return x + w * _negative_binomial_upper(mean**2 / variance, mean * (rest - 1) / w, 1 - CONFIDENCE)
    return w * _negative_binomial_upper(mean**2 / variance, mean * rest * wanted / point.candidates / w, 1 - CONFIDENCE)


def _p_monotone(points: Sequence[_Counted]) -> float:
    """Whether rows further out are missed more often than rows further in: small where they are.

    If detection were the same at both of two levels, each row missed at the inner one would be at the outer one, too,
    with chance C_outer / C_inner; where it is better further out, with less. All pairs of levels, Bonferroni's way.
    """
    found = []
    for inner, inside in enumerate(points):
        for outside in points[:inner]:
            x, n = int((outside.missed_n > 0).sum()), int((inside.missed_n > 0).sum())
            found.append(_binomial_at_least(x, n, outside.candidates / inside.candidates))
    return min([1.0, *(p * len(found) for p in found)])


def _negative_binomial_upper(shape: float, mean: float, alpha: float) -> int:
    """The smallest y that a Poisson number whose mean is gamma distributed (shape, mean) exceeds with a chance of at
    most alpha."""
    if mean <= 0:
        return 0
    most = mean + 20 * math.sqrt(mean + mean**2 / shape) + 20
    y = torch.arange(int(most) + 1, dtype=torch.float64)
    ways = torch.lgamma(y + shape) - torch.lgamma(y + 1) - math.lgamma(shape)
    log_p = ways + y * math.log(mean / (mean + shape)) - shape * math.log1p(mean / shape)
    return int((log_p.exp().cumsum(0) < 1 - alpha).sum())


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
