"""The best rows are those of a plain sort of all, however they arrive (docs/design.md, mechanisms 2 and 3)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from infscan.influence.topk import SIDES, Threshold, TopK, best_rows, strength
from infscan.influence.topk_tracker import ScoredRows, Thresholds, TopKTracker, shard_rows

# Few distinct values, so that ties are common; what is not finite or zero belongs to no side.
SCORES = st.sampled_from([-3.0, -2.0, -1.0, -0.5, 0.0, -0.0, 0.5, 1.0, 2.0, 3.0, np.nan, np.inf, -np.inf])


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

    tracker = TopKTracker(queries, sides, capacity)
    moments = [tracker.thresholds]
    for shard in [*order, *repeated]:
        mine = shard_of == shard
        thresholds = moments[data.draw(st.integers(0, len(moments) - 1))]
        tracker.add(shard_rows(scores_nq[mine], ids[mine], sides, capacity, thresholds))
        moments.append(tracker.thresholds)

    best = tracker.best()
    for query in range(queries):
        for side in sides:
            mine = (best.queries == query) & (best.sides == SIDES.index(side))
            found = list(zip(best.sequence_ids[mine].tolist(), best.scores[mine].tolist(), strict=True))
            assert found == plain_best(scores_nq[:, query], ids, side, capacity)
    assert len(best) == sum(len(board.scores) for boards in tracker.boards for board in boards.values())


def test_a_shard_writes_no_row_below_the_threshold_and_at_most_c() -> None:
    scores = np.asarray([[1.0], [5.0], [5.0], [4.0], [-2.0]], np.float32)
    ids = np.asarray([4, 3, 2, 1, 0], np.int64)
    at_tie = Thresholds(np.asarray([[5.0, 0.0]], np.float32), np.asarray([[2, 0]]))
    assert (at_tie.of(0, "proponent"), at_tie.of(0, "opponent")) == (Threshold(5.0, 2), None)
    hits = shard_rows(scores, ids, SIDES, 10, at_tie)
    assert list(hits.rows()) == [(0, 0, 2, 5.0), (0, 1, 0, -2.0)]
    assert len(shard_rows(scores, ids, ("proponent",), 2, Thresholds.none(1))) == 2


def test_the_threshold_is_the_last_of_c_rows() -> None:
    board = TopK("opponent", 2)
    board.add(np.asarray([-1.0], np.float32), np.asarray([7], np.int64))
    assert board.threshold is None
    board.add(np.asarray([-1.0, -9.0, 3.0], np.float32), np.asarray([5, 6, 8], np.int64))
    assert board.threshold == Threshold(-1.0, 5)
    assert board.sequence_ids.tolist() == [6, 5]


def test_a_row_twice_in_one_call_counts_once() -> None:
    board = TopK("proponent", 3)
    board.add(np.asarray([1.0, 1.0, 2.0], np.float32), np.asarray([5, 5, 6], np.int64))
    assert board.sequence_ids.tolist() == [6, 5]


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
