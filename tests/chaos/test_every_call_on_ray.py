"""The same as test_every_call.py on a real Ray, for a few calls: the driver ends, or a rank's process is killed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from infscan.config import ClusterConfig
from infscan.engine.cluster import connect
from infscan.engine.worker_group import WorkerGroup
from infscan.pipeline import answer
from infscan.results.read import read_summary
from infscan.steps.scan import ScanTask
from tests.chaos.every_call import Crash, crash_driver, tiny_inputs, tiny_run, watched
from tests.chaos.test_every_call import SEED, Twin, content, some

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twin]:
    ray.shutdown()
    connect(ClusterConfig())
    root = tmp_path_factory.mktemp("twin")
    tiny_inputs(root)
    config = tiny_run(root, root / "run")
    with watched(crash_driver(None)) as wire:
        answer(config)
    yield Twin(root, config, content(config), read_summary(config.output)["counts"], wire.calls)
    ray.shutdown()


def test_a_driver_that_ends_at_some_of_its_calls_resumes(twin: Twin, tmp_path: Path) -> None:
    """Its ranks are ended with it, where they are at work on something or not."""
    assert not any(call.rank for call in twin.calls)
    for at, moment in some(twin.strikes(), 8):
        config = twin.disturbed(tmp_path / f"{at}-{moment}")
        with watched(crash_driver(at, moment)) as wire, pytest.raises(Crash):
            answer(config)
        answer(config)
        twin.assert_equals(config, (SEED, at, moment, wire.struck))


def deadly(function: Callable[..., Any], at: int, moment: str) -> Callable[..., Any]:
    """`function`, and what writes its output behind it, in a process that is killed at its n-th storage call, if it
    comes to that."""

    def run(rank: Any, *arguments: Any) -> Any:
        from tests.chaos.every_call import kill_process

        wire, start = kill_process(at, moment), rank.behind.start

        def over_the_wire(write: Callable[[], Any]) -> Any:
            def writing() -> Any:
                with watched(wire):
                    return write()

            return start(writing)

        rank.behind.start = over_the_wire
        with watched(wire):
            return function(rank, *arguments)

    return run


# A shard's calls: those that read its sequences, and then: is the file there (stat), write the scores, create the file.
@pytest.mark.parametrize(
    ("at", "moment"), [(0, "before"), (1, "after"), (2, "before"), (3, "amid"), (4, "after"), (5, "amid")]
)
def test_a_rank_killed_at_a_storage_call_of_a_shard_costs_one_attempt(
    twin: Twin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, moment: str
) -> None:
    config = twin.disturbed(tmp_path / "run")
    struck: list[str] = []
    submit = WorkerGroup.submit

    def once(self: WorkerGroup, unit: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if isinstance(arguments[0], ScanTask) and not struck:
            struck.append(arguments[0].shard)
            function = deadly(function, at, moment)
        submit(self, unit, function, *arguments, **options)

    monkeypatch.setattr(WorkerGroup, "submit", once)
    answer(config)
    rebuilds = json.loads((tmp_path / "run" / "summary.json").read_text())["workers"]["rebuilds"]
    assert (len(struck), rebuilds) == (1, 1), (at, moment)
    # What the killed process left is swept by the next one.
    answer(config)
    twin.assert_equals(config, (at, moment))
