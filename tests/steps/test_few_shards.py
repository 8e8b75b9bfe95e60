"""Workers that would wait for one another at a scan's end are told of, and no plan is another because of them."""

from __future__ import annotations

import pytest

from infscan.corpus.plan import Plan, Selection, default_shard_sequences
from infscan.steps.plan import few_shards


@pytest.mark.parametrize(("sequences", "workers", "each"), [(640, 8, None), (640, 64, "5"), (262_144, 1000, "131")])
def test_two_shards_for_each_worker(sequences: int, workers: int, each: str | None) -> None:
    plan = Plan("", sequences, Selection.of(sequences), default_shard_sequences(sequences))
    said = few_shards(plan, workers)
    assert (said is None) == (each is None) == (plan.num_shards >= 2 * workers)
    if said is not None and each is not None:
        assert f"scan.shard_sequences={each} or less" in said
        assert Plan("", sequences, Selection.of(sequences), int(each)).num_shards >= 2 * workers


def test_one_worker_waits_for_nobody() -> None:
    assert few_shards(Plan("", 4, Selection.of(4), 64), 1) is None
