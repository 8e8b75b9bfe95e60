"""Guarantees 1 to 3 without Ray: whatever becomes of attempts and drivers, the C best rows are the scores' alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.engine.schedule import Schedule
from infscan.influence.shard_rows import shard_rows
from infscan.influence.topk import SIDES, best_rows
from infscan.influence.topk_tracker import ScoredRows, Thresholds, TopKTracker

QUERIES, SHARD, CAPACITY = 2, 4, 3


@dataclass
class World:
    """What outlives every process: the scores there are to find, and the shard files that were created."""

    scores_nq: np.ndarray
    files: dict[int, ScoredRows] = field(default_factory=dict)
    written: int = 0

    @property
    def shards(self) -> int:
        return -(-len(self.scores_nq) // SHARD)

    def attempt(self, shard: int, thresholds: Thresholds) -> ScoredRows:
        """What a rank does: score, drop what is below the thresholds, create the file if it is absent, read it back."""
        ids = np.arange(shard * SHARD, min((shard + 1) * SHARD, len(self.scores_nq)), dtype=np.int64)
        found = shard_rows(torch.from_numpy(self.scores_nq[ids]), ids, SIDES, CAPACITY, thresholds)
        self.written += shard not in self.files
        return self.files.setdefault(shard, found)


EVENTS = ("done", "done", "done", "lost", "lost late", "memory", "driver", "driver late")


def drive(world: World, data: st.DataObject, workers: int, events: tuple[str, ...] = EVENTS) -> TopKTracker | None:
    """One driver's life over what storage holds; None where it is killed, or gives shards up."""
    tracker = TopKTracker(QUERIES, SIDES, CAPACITY)
    for hits in world.files.values():
        tracker.add(hits)
    schedule = Schedule([shard for shard in range(world.shards) if shard not in world.files], max_attempts=3)
    # What every worker was told when it got its shard; thresholds may be old by the time it is done.
    busy: list[tuple[int, Thresholds]] = []
    while not schedule.finished:
        while len(busy) < workers and (shard := schedule.take()) is not None:
            busy.append((shard, tracker.thresholds))
        shard, thresholds = busy.pop(data.draw(st.integers(0, len(busy) - 1)))
        event = data.draw(st.sampled_from(events))
        if event in ("done", "lost late", "driver late"):
            hits = world.attempt(shard, thresholds)
        if event.startswith("driver"):
            return None
        if event == "done":
            schedule.succeed(shard)
            tracker.add(hits)
        elif event == "memory":
            schedule.retry_smaller(shard, event)
        else:
            schedule.lose(shard, event)
    return None if schedule.given_up else tracker


@settings(max_examples=150, deadline=None)
@given(data=st.data(), count=st.integers(1, 24), workers=st.integers(1, 3))
def test_no_trace_of_faults_changes_the_best_rows(data: st.DataObject, count: int, workers: int) -> None:
    """Few distinct scores, so that ties are common; every shard's file is created once, whoever tries again."""
    rows = st.lists(st.integers(-3, 3), min_size=QUERIES, max_size=QUERIES)
    scores_nq = np.asarray(data.draw(st.lists(rows, min_size=count, max_size=count)), np.float32)
    world = World(scores_nq)
    tracker = None
    for _ in range(5):
        tracker = tracker or drive(world, data, workers)
    # The last one is left in peace.
    tracker = tracker or drive(world, data, workers, ("done",))
    assert tracker is not None
    assert world.written == world.shards
    ids = np.arange(count, dtype=np.int64)
    expected = {
        (query, side, int(ids[row]), float(scores_nq[row, query]))
        for query in range(QUERIES)
        for side, name in enumerate(SIDES)
        for row in best_rows(scores_nq[:, query], ids, name, CAPACITY)
    }
    assert set(tracker.best().rows()) == expected
