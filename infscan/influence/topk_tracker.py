"""The best C rows of every query and side while shards come in, and the thresholds they set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infscan.influence.topk import PROPONENT, SIDES, Threshold, TopK, best_rows


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
    """TopKs of all queries and sides; adding the same shard twice changes nothing."""

    def __init__(self, queries: int, sides: tuple[str, ...], capacity: int) -> None:
        self.boards = [{side: TopK(side, capacity) for side in sides} for _ in range(queries)]
        self._thresholds = Thresholds.none(queries)

    def add(self, hits: ScoredRows) -> None:
        """Take in a shard's rows; those of sides that are not kept are left out."""
        # Most rows of a shard that was handed out long ago are beaten by now: one comparison of all of them.
        hits = hits.take(self._thresholds.passes_threshold(hits))
        if not len(hits):
            return
        keys = hits.queries.astype(np.int64) * len(SIDES) + hits.sides
        order = np.argsort(keys, kind="stable")
        present, starts = np.unique(keys[order], return_index=True)
        for key, mine in zip(present.tolist(), np.split(order, starts[1:]), strict=True):
            query, side = divmod(key, len(SIDES))
            board = self.boards[query].get(SIDES[side])
            if board is not None:
                board.add(hits.scores[mine], hits.sequence_ids[mine])
                if (last := board.threshold) is not None:
                    self._thresholds.strengths_qs[query, side] = abs(last.score)
                    self._thresholds.sequence_ids_qs[query, side] = last.sequence_id

    @property
    def thresholds(self) -> Thresholds:
        """As they are now; what is added later does not change them."""
        now = self._thresholds
        return Thresholds(now.strengths_qs.copy(), now.sequence_ids_qs.copy())

    def best(self) -> ScoredRows:
        """The C best rows of every query and side, by query, side and strength: what is refined."""
        parts = [
            _hits(query, side, board.sequence_ids, board.scores)
            for query, boards in enumerate(self.boards)
            for side, board in boards.items()
        ]
        return ScoredRows.concatenate(parts)


def shard_rows(
    scores_nq: NDArray[np.float32],
    sequence_ids: NDArray[np.int64],
    sides: tuple[str, ...],
    capacity: int,
    thresholds: Thresholds,
) -> ScoredRows:
    """The rows of one shard that may still be among the C best: at most C per query and side, none below threshold.

    scores_nq: [n, Q]; NaN and infinities never take part.
    """
    parts = []
    for query in range(scores_nq.shape[1]):
        column = scores_nq[:, query]
        for side in sides:
            rows = best_rows(column, sequence_ids, side, capacity, thresholds.of(query, side))
            parts.append(_hits(query, side, sequence_ids[rows], column[rows]))
    return ScoredRows.concatenate(parts)


def _hits(query: int, side: str, sequence_ids: NDArray[np.int64], scores: NDArray[np.float32]) -> ScoredRows:
    count = len(sequence_ids)
    return ScoredRows(
        queries=np.full(count, query, np.int32),
        sides=np.full(count, SIDES.index(side), np.int8),
        sequence_ids=sequence_ids.astype(np.int64),
        scores=scores.astype(np.float32),
    )
