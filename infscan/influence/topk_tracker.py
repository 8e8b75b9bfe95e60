"""The best C rows of every query and side while shards come in, and the thresholds they set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from infscan.influence.topk import PROPONENT, SIDES, Threshold

# Up to so many rows in all are sorted whenever some come; of more, a quarter of them is put together first.
_AT_ONCE, _OF_THE_BEST = 1 << 15, 4


@dataclass(frozen=True)
class ScoredRows:
    """Rows (query, side, sequence, scan score), as columns of one length.

    queries: int32, index in the query batch. sides: int8, index in SIDES. sequence_ids: int64. scores: float32.
    """

    queries: NDArray[np.int32]
    sides: NDArray[np.int8]
    sequence_ids: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.queries)

    def rows(self) -> Iterator[tuple[int, int, int, float]]:
        yield from zip(
            self.queries.tolist(), self.sides.tolist(), self.sequence_ids.tolist(), self.scores.tolist(), strict=True
        )

    def take(self, rows: NDArray[np.bool_] | NDArray[np.intp] | slice) -> ScoredRows:
        """Some of the rows, by mask, position or stretch."""
        return ScoredRows(self.queries[rows], self.sides[rows], self.sequence_ids[rows], self.scores[rows])

    def less(self, queries: int) -> ScoredRows:
        """The same rows, their queries numbered from so many on."""
        return replace(self, queries=(self.queries - queries).astype(np.int32))

    @staticmethod
    def concatenate(parts: list[ScoredRows]) -> ScoredRows:
        return ScoredRows(
            queries=np.concatenate([part.queries for part in parts] or [np.empty(0, np.int32)]),
            sides=np.concatenate([part.sides for part in parts] or [np.empty(0, np.int8)]),
            sequence_ids=np.concatenate([part.sequence_ids for part in parts] or [np.empty(0, np.int64)]),
            scores=np.concatenate([part.scores for part in parts] or [np.empty(0, np.float32)]),
        )


@dataclass(frozen=True)
class Thresholds:
    """Of every query and side, the C-th best row so far; they travel with every shard: 24 bytes a query.

    strengths: float32 [Q, sides], the row's score turned so that larger is stronger; 0 until C rows are there, which
    every row of the side is stronger than. sequence_ids: int64 [Q, sides].
    """

    strengths_qs: NDArray[np.float32]
    sequence_ids_qs: NDArray[np.int64]

    @classmethod
    def none(cls, queries: int) -> Thresholds:
        shape = (queries, len(SIDES))
        return cls(np.zeros(shape, np.float32), np.zeros(shape, np.int64))

    def __add__(self, others: Thresholds) -> Thresholds:
        """Those of more queries, after these."""
        return Thresholds(
            np.concatenate([self.strengths_qs, others.strengths_qs]),
            np.concatenate([self.sequence_ids_qs, others.sequence_ids_qs]),
        )

    def after(self, queries: int) -> Thresholds:
        """Those of the queries after the first so many."""
        return Thresholds(self.strengths_qs[queries:], self.sequence_ids_qs[queries:])

    def of(self, query: int, side: str) -> Threshold | None:
        """None until C rows are there."""
        place = query, SIDES.index(side)
        turned = self.strengths_qs[place]
        if not turned:
            return None
        return Threshold(float(turned if side == PROPONENT else -turned), int(self.sequence_ids_qs[place]))

    def passes_threshold(self, hits: ScoredRows) -> NDArray[np.bool_]:
        """Which rows are not strictly weaker than the threshold of their query and side."""
        bars = self.strengths_qs[hits.queries, hits.sides]
        turned = np.where(hits.sides == SIDES.index(PROPONENT), hits.scores, -hits.scores)
        tied = (turned == bars) & (hits.sequence_ids <= self.sequence_ids_qs[hits.queries, hits.sides])
        return (turned > bars) | tied


class TopKTracker:
    """The C best rows of every query and side; adding the same shard twice changes nothing.

    Of many queries, rows that may count are put together before they are sorted in. The thresholds are meanwhile those
    of what was sorted in: of rows that are there, if not of all of them.
    """

    def __init__(self, queries: int, sides: tuple[str, ...], capacity: int) -> None:
        self.capacity = capacity
        self._sides = np.isin(SIDES, sides)
        self._best, self._waiting = ScoredRows.concatenate([]), list[ScoredRows]()
        self._thresholds = Thresholds.none(queries)
        most = queries * len(sides) * capacity
        self._put_together = most // _OF_THE_BEST if most > _AT_ONCE else 1

    def add(self, hits: ScoredRows) -> None:
        """Take in a shard's rows; those of sides that are not kept are left out."""
        # Most rows of a shard that was handed out long ago are beaten by now: one comparison of all of them.
        hits = hits.take(self._thresholds.passes_threshold(hits) & self._sides[hits.sides])
        self._waiting.append(hits)
        if sum(map(len, self._waiting)) >= self._put_together:
            self._sort_in()

    def _sort_in(self) -> None:
        rows = ScoredRows.concatenate([self._best, *self._waiting])
        self._waiting.clear()
        group = rows.queries.astype(np.int64) * len(SIDES) + rows.sides
        # Positive floats are in the order of their bits: a group's rows, the strongest first, then by sequence_id.
        falling = np.abs(rows.scores).view(np.int32).astype(np.int64) ^ 0x7FFFFFFF
        order = _in_order((group << 32) | falling, rows.sequence_ids)
        rows, group = rows.take(order), group[order]
        again = (np.diff(group, prepend=-1) == 0) & (np.diff(rows.sequence_ids, prepend=-1) == 0)
        rows, group = rows.take(~again), group[~again]
        first = np.flatnonzero(np.diff(group, prepend=-1))
        place = np.arange(len(group)) - np.repeat(first, np.diff(first, append=len(group)))
        last = rows.take(place == self.capacity - 1)
        self._best = rows.take(place < self.capacity)
        self._thresholds.strengths_qs[last.queries, last.sides] = np.abs(last.scores)
        self._thresholds.sequence_ids_qs[last.queries, last.sides] = last.sequence_ids

    @property
    def thresholds(self) -> Thresholds:
        """As they are now; what is added later does not change them."""
        now = self._thresholds
        return Thresholds(now.strengths_qs.copy(), now.sequence_ids_qs.copy())

    def best(self) -> ScoredRows:
        """The C best rows of every query and side, by query, side and strength: what is refined."""
        self._sort_in()
        return self._best


def _in_order(keys: NDArray[np.int64], sequence_ids: NDArray[np.int64]) -> NDArray[np.intp]:
    """Positions by key, and then by sequence_id. What comes in is in stretches that are in order by key, which numpy's
    stable sort makes use of; few keys are equal."""
    order = np.argsort(keys, kind="stable")
    equal = np.diff(keys[order]) == 0
    tied = np.flatnonzero(np.append(equal, False) | np.insert(equal, 0, False))
    mine = order[tied]
    order[tied] = mine[np.lexsort((sequence_ids[mine], keys[mine]))]
    return order
