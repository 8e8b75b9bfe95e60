"""The best rows are those of a plain sort of all, however they arrive (docs/design.md, mechanisms 2 and 3)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from infscan.influence import shard_rows as choosing
from infscan.influence import topk_tracker
from infscan.influence.topk import SIDES, Threshold, best_rows, strength
from infscan.influence.topk_tracker import ScoredRows, Thresholds, TopKTracker

# Few distinct values, so that ties are common; what is not finite or zero belongs to no side.
SCORES = st.sampled_from([-3.0, -2.0, -1.0, -0.5, 0.0, -0.0, 0.5, 1.0, 2.0, 3.0, np.nan, np.inf, -np.inf])


def shard_rows(scores_nq: NDArray[np.float32], *rest: object) -> ScoredRows:
    return choosing.shard_rows(torch.from_numpy(scores_nq), *rest)  # type: ignore[arg-type]


def rows(side: int, scores: list[float], ids: list[int]) -> ScoredRows:
    count = len(ids)
    return ScoredRows(
        np.zeros(count, np.int32), np.full(count, side, np.int8), np.asarray(ids), np.asarray(scores, np.float32)
    )


def plain_best(
    scores: NDArray[np.float32], ids: NDArray[np.int64], side: str, capacity: int
) -> list[tuple[int, float]]:
    sign = 1 if side == "proponent" else -1
    rows = [(-sign * score, index, score) for score, index in zip(scores.tolist(), ids.tolist(), strict=True)]
    on_side = sorted(row for row in rows if np.isfinite(row[2]) and sign * row[2] > 0)
    return [(index, score) for _, index, score in on_side[:capacity]]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_arrival_of_shards_gives_the_plain_sort_of_everything(data: st.DataObject) -> None:
    count, queries = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 3))
    capacity = data.draw(st.integers(1, 6))
    sides = data.draw(st.sampled_from([SIDES, SIDES[:1], SIDES[1:]]))
    flat = data.draw(st.lists(SCORES, min_size=count * queries, max_size=count * queries))
    scores_nq = np.asarray(flat, np.float32).reshape(count, queries)
    ids = np.asarray(data.draw(st.permutations(range(1000, 1000 + count))), np.int64)
    shard_of = np.asarray(data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)), np.int64)
    order = data.draw(st.permutations(range(5)))
    repeated = data.draw(st.lists(st.integers(0, 4), max_size=4))
    # Sorted in at once, or when as many as a part of the best are there.
    at_once = data.draw(st.sampled_from([0, 1 << 15]))
    entries = data.draw(st.sampled_from([1, 10, 1 << 22]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk_tracker, "_AT_ONCE", at_once)
        patch.setattr(choosing, "_AT_ONCE", entries)
        tracker = TopKTracker(queries, sides, capacity)
        moments = arrive(tracker, data, scores_nq, ids, shard_of, [*order, *repeated], sides, capacity)
    best = tracker.best()
    assert list(best.rows()) == [
        (query, SIDES.index(side), sequence_id, score)
        for query in range(queries)
        for side in sides
        for sequence_id, score in plain_best(scores_nq[:, query], ids, side, capacity)
    ]
    assert all((moment.strengths_qs <= tracker.thresholds.strengths_qs).all() for moment in moments)
    assert list(tracker.best().rows()) == list(best.rows())


def arrive(
    tracker: TopKTracker,
    data: st.DataObject,
    scores_nq: NDArray[np.float32],
    ids: NDArray[np.int64],
    shard_of: NDArray[np.int64],
    order: list[int],
    sides: tuple[str, ...],
    capacity: int,
) -> list[Thresholds]:
    """Shards in this order, each with thresholds of some moment before it."""
    moments = [tracker.thresholds]
    for shard in order:
        mine = shard_of == shard
        thresholds = moments[data.draw(st.integers(0, len(moments) - 1))]
        found = shard_rows(scores_nq[mine], ids[mine], sides, capacity, thresholds)
        expected = ScoredRows.concatenate([found.take(slice(0, 0)), *_column_by_column(
            scores_nq[mine], ids[mine], sides, capacity, thresholds
        )])  # fmt: skip
        assert list(found.rows()) == list(expected.rows())
        tracker.add(found)
        moments.append(tracker.thresholds)
    return moments


def _column_by_column(
    scores_nq: NDArray[np.float32],
    ids: NDArray[np.int64],
    sides: tuple[str, ...],
    capacity: int,
    thresholds: Thresholds,
) -> list[ScoredRows]:
    parts = []
    for query in range(scores_nq.shape[1]):
        for side in sides:
            best = best_rows(scores_nq[:, query], ids, side, capacity, thresholds.of(query, side))
            part = rows(SIDES.index(side), scores_nq[best, query].tolist(), ids[best].tolist())
            parts.append(ScoredRows(part.queries + np.int32(query), part.sides, part.sequence_ids, part.scores))
    return parts


def test_a_shard_writes_no_row_below_the_threshold_and_at_most_c() -> None:
    scores = np.asarray([[1.0], [5.0], [5.0], [4.0], [-2.0]], np.float32)
    ids = np.asarray([4, 3, 2, 1, 0], np.int64)
    at_tie = Thresholds(np.asarray([[5.0, 0.0]], np.float32), np.asarray([[2, 0]]))
    assert (at_tie.of(0, "proponent"), at_tie.of(0, "opponent")) == (Threshold(5.0, 2), None)
    hits = shard_rows(scores, ids, SIDES, 10, at_tie)
    assert list(hits.rows()) == [(0, 0, 2, 5.0), (0, 1, 0, -2.0)]
    assert len(shard_rows(scores, ids, ("proponent",), 2, Thresholds.none(1))) == 2


def test_the_threshold_is_the_last_of_c_rows() -> None:
    tracker = TopKTracker(1, SIDES, 2)
    tracker.add(rows(1, [-1.0], [7]))
    assert tracker.thresholds.of(0, "opponent") is None
    tracker.add(rows(1, [-1.0, -9.0], [5, 6]))
    tracker.add(rows(0, [3.0], [8]))
    assert (tracker.thresholds.of(0, "opponent"), tracker.thresholds.of(0, "proponent")) == (Threshold(-1.0, 5), None)
    assert list(tracker.best().rows()) == [(0, 0, 8, 3.0), (0, 1, 6, -9.0), (0, 1, 5, -1.0)]


def test_a_row_twice_in_one_call_counts_once() -> None:
    tracker = TopKTracker(1, SIDES, 3)
    tracker.add(rows(0, [1.0, 1.0, 2.0], [5, 5, 6]))
    assert tracker.best().sequence_ids.tolist() == [6, 5]


def test_of_many_queries_rows_are_put_together_before_they_are_sorted_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorting all of the best again for every shard's few rows would hold a thousand workers up."""
    sorted_in: list[int] = []
    own = TopKTracker._sort_in
    monkeypatch.setattr(TopKTracker, "_sort_in", lambda self: (sorted_in.append(len(self._waiting)), own(self)))
    tracker = TopKTracker(100, SIDES, 400)
    scores_nq = np.random.default_rng(0).standard_normal((4096, 100)).astype(np.float32)
    written = []
    for shard in range(16):
        ids = np.arange(shard * 256, (shard + 1) * 256)
        found = shard_rows(scores_nq[ids], ids, SIDES, 400, tracker.thresholds)
        tracker.add(found)
        written.append(len(found))
    assert len(sorted_in) < 16
    # About C (1 + ln(N / C)) rows of a query and side, and what a threshold that is a little old lets through.
    assert sum(written) < 1.3 * 200 * 400 * (1 + np.log(2048 / 400))
    assert len(tracker.best()) == 100 * 2 * 400


@pytest.mark.parametrize("side", SIDES)
def test_equal_scores_go_by_the_smaller_sequence_id(side: str) -> None:
    scores = strength(np.full(4, 2.0, np.float32), side)
    ids = np.asarray([30, 10, 40, 20], np.int64)
    assert ids[best_rows(scores, ids, side, 3)].tolist() == [10, 20, 30]


def test_sides_that_were_not_asked_for_are_left_out() -> None:
    hits = shard_rows(np.asarray([[1.0], [-1.0]], np.float32), np.arange(2), SIDES, 2, Thresholds.none(1))
    tracker = TopKTracker(1, ("opponent",), 2)
    tracker.add(hits)
    assert list(tracker.best().rows()) == [(0, 1, 1, -1.0)]


def test_no_rows_are_no_hits() -> None:
    hits = ScoredRows.concatenate([])
    assert len(hits) == 0
    tracker = TopKTracker(2, SIDES, 3)
    tracker.add(hits)
    assert len(tracker.best()) == 0
    assert hits.sequence_ids.dtype == np.int64
