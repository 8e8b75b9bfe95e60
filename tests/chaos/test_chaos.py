"""Whatever dies at whatever moment: the tables are the twin's, nothing finished is redone, no file is torn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from tests.chaos.harness import (
    DRIVER_KILLED,
    FAULTS,
    NODE_KILLED,
    RANK_KILLED,
    RANK_STOPPED,
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
