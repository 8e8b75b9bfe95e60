"""Whatever dies at whatever moment: the tables are the twin's, nothing finished is redone, no file is torn."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import ray

from infscan.results.read import read_summary
from tests.chaos.harness import (
    DRIVER_KILLED,
    FAULTS,
    NODE_KILLED,
    RANK_KILLED,
    RANK_STOPPED,
    SHARDS,
    STORAGE,
    Harness,
    Result,
    table,
)
from tests.chaos.warm import template

LONG = {RANK_KILLED: 30, RANK_STOPPED: 20, NODE_KILLED: 15, DRIVER_KILLED: 25, STORAGE: 12}


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    ray.shutdown()
    with template(), Harness(tmp_path_factory.mktemp("chaos")) as harness:
        yield harness


def assert_recovered(result: Result) -> None:
    assert result.recovered, result.said
    assert not result.torn
    assert not result.redone


@pytest.mark.parametrize("fault", [RANK_STOPPED, DRIVER_KILLED])
def test_a_fault_costs_time_and_nothing_else(harness: Harness, fault: str) -> None:
    assert_recovered(harness.run(fault, seed=1000))


def test_without_room_for_a_worker_the_end_is_clear(harness: Harness) -> None:
    """No node has three CPUs, and none comes."""
    overrides = ["cluster.cpus_per_rank=3", "cluster.capacity_s=2"]
    assert harness.drive("no-room", overrides=overrides).wait() == 2
    said = harness.said("no-room")
    assert "no worker could be placed for cluster.capacity_s=2 s: one needs 1 x {CPU 3}" in said
    assert "alive have in all {CPU 1; CPU 1; CPU 2}" in said


def test_a_worker_waits_for_room_and_starts_when_a_node_joins(harness: Harness) -> None:
    """The other worker never gets any, which keeps nobody waiting."""
    driver = harness.drive("room", overrides=["cluster.cpus_per_rank=3"])
    while not (harness.root / "room" / "driver.json").exists():
        time.sleep(0.05)
    node = harness.add_node(num_cpus=3)
    assert driver.wait() == 0, harness.said("room")
    harness.cluster.remove_node(node)
    assert read_summary(str(harness.root / "room"))["counts"]["scanned"]["shards"] == SHARDS


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_fault_at_any_moment_changes_the_tables(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    """102 runs; their table is printed."""
    results = [harness.run(fault, seed) for fault in FAULTS for seed in range(LONG[fault])]
    with capsys.disabled():
        print("\n" + table(results, harness.scan_s, harness.fit_s))
    for result in results:
        assert_recovered(result)
    # The other worker went on while one was rebuilt.
    assert any(result.meanwhile for result in results if result.fault == RANK_KILLED)
