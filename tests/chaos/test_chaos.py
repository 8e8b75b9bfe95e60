"""Whatever dies at whatever moment: the tables are the twin's, nothing finished is redone, no file is torn."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import ray

from infscan.engine.pool import Pool
from infscan.engine.recovery import RecoveryLog
from infscan.engine.worker_group import State, WorkerGroup
from infscan.model.architecture import describe
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.results.read import read_summary
from tests.chaos.costs import Result, cost_table, recovered_table
from tests.chaos.harness import (
    DISK_FULL,
    DRIVER_KILLED,
    FAULTS,
    NODE_KILLED,
    RANK_KILLED,
    RANK_STOPPED,
    SHARDS,
    STORAGE,
    Harness,
)
from tests.steps.runs import compose

LONG = {RANK_KILLED: 30, RANK_STOPPED: 20, NODE_KILLED: 15, DRIVER_KILLED: 25, STORAGE: 12, DISK_FULL: 12}
# So many of each have an undisturbed twin right before them.
TWINS = 4
# A worker that is lost early should be back before the others have done everything.
PAUSE_S = 1.2


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    ray.shutdown()
    with Harness(tmp_path_factory.mktemp("chaos")) as harness:
        yield harness


def assert_recovered(result: Result) -> None:
    assert result.recovered, result.said
    assert not result.torn
    assert not result.redone
    if result.fault == DRIVER_KILLED:
        assert "process" in result.driver["followed"]
    if result.fault == DISK_FULL:
        assert "the disk is full; free some space" in result.sentence


@pytest.mark.parametrize("fault", [RANK_STOPPED, DRIVER_KILLED])
def test_a_fault_costs_time_and_nothing_else(harness: Harness, fault: str) -> None:
    assert_recovered(harness.run(fault, seed=1000))


def test_without_room_for_a_worker_the_end_is_clear(harness: Harness) -> None:
    """No node has three CPUs, and none comes."""
    overrides = ["cluster.cpus_per_rank=3", "cluster.placement_timeout_s=2"]
    assert harness.drive("no-room", overrides=overrides).wait() == 2
    said = harness.said("no-room")
    assert "no worker could be placed for cluster.placement_timeout_s=2 s: one needs 1 x {CPU 3, memory 1 GiB}" in said
    room = r", memory [\d.]+ GiB"
    assert re.search(rf"alive have in all \{{CPU 1{room}; CPU 1{room}; CPU 2{room}\}}", said)


@pytest.mark.slow
def test_a_worker_waits_for_room_and_starts_when_a_node_joins(harness: Harness) -> None:
    """The other worker never gets any, which keeps nobody waiting."""
    driver = harness.drive("room", overrides=["cluster.cpus_per_rank=3"])
    while not (harness.root / "room" / "driver.json").exists():
        time.sleep(0.05)
    node = harness.add_node(num_cpus=3)
    assert driver.wait() == 0, harness.said("room")
    harness.cluster.remove_node(node)
    assert read_summary(str(harness.root / "room"))["counts"]["scanned"]["shards"] == SHARDS


@pytest.fixture
def pool(harness: Harness) -> Iterator[Pool]:
    """Two workers of one rank each, of this process."""
    ray.init(address=harness.cluster.address, log_to_driver=False, logging_level="ERROR")
    config = compose("scan", *harness.overrides("pool"))
    settings = WorkerSettings(config.model, describe(config.model.path, config.model.tracked).layers, sharded=False)
    pool = Pool(config.cluster, settings, 0.0, RecoveryLog())
    yield pool
    pool.close()
    ray.shutdown()


def test_a_worker_that_is_rebuilt_keeps_nobody_waiting(pool: Pool, tmp_path: Path) -> None:
    """One dies at its unit 0 and may not start again before the other has done everything, unit 0 too."""
    found, all_done = tmp_path / "found", tmp_path / "all-done"
    settings, units = pool.groups[0].settings, 20

    def wait_for(file: Path) -> None:
        while not file.exists():
            time.sleep(0.01)

    def work(rank: ModelWorker, unit: int) -> None:
        if unit == 0 and not found.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        # No other unit is done before the death is found: they all wait then.
        wait_for(found)

    def when_all_is_done(settings: WorkerSettings) -> WorkerSettings:
        wait_for(all_done)
        return settings

    class Held:
        """Settings that nobody can read before all is done."""

        sharded = False

        def __reduce__(self) -> tuple[object, ...]:
            return when_all_is_done, (settings,)

    def rebuilt(group: WorkerGroup, rebuild: Callable[[], None]) -> None:
        group.settings = Held()  # type: ignore[assignment]
        rebuild()
        found.touch()

    for group in pool.groups:
        group.rebuild = partial(rebuilt, group, group.rebuild)  # type: ignore[method-assign]
    assert not pool.run(range(units), work, int, lambda unit, result: None)
    [loss] = pool.recovery.failures
    [struck] = [group for group in pool.groups if group.index == loss.worker]
    assert struck.state is State.starting
    # All but the one that the other may have had in hand already.
    assert loss.units_by_others in (units - 1, units)
    assert loss.recovery_s is None

    all_done.touch()

    def meet(rank: ModelWorker, unit: int) -> None:
        (tmp_path / f"{unit}").touch()
        wait_for(tmp_path / f"{1 - unit}")

    # Both units are at work at once: the struck worker is back.
    assert not pool.run(range(2), meet, int, lambda unit, result: None)
    assert [loss] == pool.recovery.failures
    assert loss.recovery_s is not None


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_no_fault_at_any_moment_changes_the_tables(harness: Harness, capsys: pytest.CaptureFixture[str]) -> None:
    """114 runs; their tables are printed."""
    results = [
        harness.run(fault, seed, pause_s=PAUSE_S, twin=seed < TWINS)
        for seed in range(max(LONG.values()))
        for fault in FAULTS
        if seed < LONG[fault]
    ]
    with capsys.disabled():
        print(f"\n{recovered_table(results)}\n\n{cost_table(results)}")
    for result in results:
        assert_recovered(result)
