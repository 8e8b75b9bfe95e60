"""Work without a model: as much at once as a cluster holds, and a process that dies ends in a sentence."""

from __future__ import annotations

import os

import pytest

from infscan.config import ClusterConfig, ModelConfig
from infscan.engine.executor import Load, RunRecords, TaskMap, fits
from infscan.engine.ray_executor import RayBackend
from infscan.errors import RunError
from infscan.model.worker import WorkerSettings
from infscan.telemetry import Telemetry

WHOLE = Load(cores=8, bytes=100)


def test_items_run_beside_each_other_as_far_as_cores_and_memory_go() -> None:
    assert fits([Load(1, 40)], Load(1, 60), WHOLE)
    assert not fits([Load(1, 40)], Load(1, 61), WHOLE)
    assert fits([Load(4, 0)], Load(4, 0), WHOLE)
    assert not fits([Load(4, 0), Load(1, 0)], Load(4, 0), WHOLE)


def test_one_that_nothing_is_enough_for_runs_alone() -> None:
    assert fits([], Load(64, 10**6), WHOLE)
    assert not fits([Load()], Load(64, 10**6), WHOLE)


def die(_item: str) -> None:
    os._exit(9)


def test_a_process_that_dies_ends_in_a_sentence() -> None:
    backend = RayBackend(ClusterConfig(num_workers=1))
    settings = WorkerSettings(ModelConfig("none"), (), sharded=False)
    executor = backend.executor(settings, Telemetry(), RunRecords())
    tasks = TaskMap(
        "eigenbasis", "layers", ["layers.0.mlp"], die, lambda item: (item,), cores=0, load=lambda _: Load(8, 3 << 30)
    )
    with pytest.raises(
        RunError, match=r"^eigenbasis of layers\.0\.mlp: its process died, 4 times; .*3\.0 GiB; factors\.blocks=2"
    ):
        executor.map_tasks(tasks)
    executor.close()
