"""What is found before the first worker starts: no room on this machine, no space on the disk, places not writable."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from infscan.runtime import preflight

from infscan.config import ClusterConfig, Placement
from infscan.corpus.plan import Plan, Selection
from infscan.engine import pool
from infscan.errors import ConfigError, StorageError
from infscan.influence.layers import Layer
from infscan.steps.factor_files import FactorsPlan
from infscan.steps.volume import factor_files, scan_bytes
from infscan.storage import Store
from tests.steps.runs import small_run

LAYERS = (Layer("up", 400, 100, False, "up"), Layer("down", 100, 400, False, "down"))


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    ray = SimpleNamespace(
        cluster_resources=lambda: {kind: sum(one.get(kind, 0) for one in resources) for kind in ("CPU", "GPU")},
        nodes=lambda: [{"Alive": True, "Resources": one} for one in resources],
    )
    monkeypatch.setattr(preflight, "ray", ray)
    monkeypatch.setattr(pool, "ray", ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.parametrize(
    ("cluster", "gpus", "said"),
    [
        (ClusterConfig(ranks_per_worker=3), 0.0, r"3 x \{CPU 1\}"),
        (ClusterConfig(cpus_per_rank=3), 0.0, r"1 x \{CPU 3\}"),
        (ClusterConfig(), 1.0, r"1 x \{CPU 1, GPU 1\}.*\{CPU 2, GPU 0\}"),
        (ClusterConfig(ranks_per_worker=2, placement=Placement.STRICT_SPREAD), 0.0, "STRICT_SPREAD"),
    ],
)
def test_a_machine_without_room_for_one_worker_is_refused_at_once(
    cluster: ClusterConfig, gpus: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes(monkeypatch, {"CPU": 2.0})
    with pytest.raises(ConfigError, match=f"this machine has no room for a worker: one needs .*{said}"):
        preflight.check_capacity(cluster, gpus)
    # A cluster may grow: it is waited for.
    cluster.address = "auto"
    preflight.check_capacity(cluster, gpus)


def test_room_for_one_worker_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 2.0})
    preflight.check_capacity(ClusterConfig(num_workers=50, ranks_per_worker=2), 0.0)


@pytest.mark.parametrize("key", ["output", "factors.path"])
def test_the_copy_that_ray_makes_of_a_submitted_folder_takes_no_results(key: str, tmp_path: Path) -> None:
    """`ray job submit --working-dir . -- ... output=runs/mine`: Ray would remove the answer with the copy."""
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    config = small_run(tmp_path, f"{key}={copy / 'runs' / 'mine'}")
    run = Run(config)
    with pytest.raises(ConfigError, match=f"{key}=.*which Ray removes; give an address on object storage"):
        preflight.check_writable(run)
    assert not copy.exists()


def scan_of(tmp_path: Path, *overrides: str) -> Any:
    config = small_run(tmp_path, *overrides)
    architecture = SimpleNamespace(layers=LAYERS)
    return SimpleNamespace(
        config=config, queries=[None] * 10, architecture=architecture, store=Store(config.output),
        factors_store=Store(config.factors.path),
    )  # fmt: skip


PLAN = Plan("corpus", 1_000_000, Selection.of(1_000_000), 1000)
CORPUS: Any = SimpleNamespace(sequence_length=512)


def test_a_disk_that_the_scan_would_fill_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scan_of(tmp_path, "scan.scores=all")
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1 << 20)
    with pytest.raises(StorageError, match=r"output=.*/run: about \d+.*dense scores 38\.1 MiB.* 1 MiB free.*top"):
        preflight.check_disk_for_scan(run, PLAN, CORPUS)
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1 << 40)
    preflight.check_disk_for_scan(run, PLAN, CORPUS)
    # An object store has no bound that could be asked for.
    monkeypatch.setattr(Store, "free_bytes", lambda self: None)
    preflight.check_disk_for_scan(run, PLAN, CORPUS)


def test_what_is_done_already_needs_no_space_again(tmp_path: Path) -> None:
    run = scan_of(tmp_path, "scan.scores=all")
    whole, half = (scan_bytes(run.config, LAYERS, 10, 1_000_000, 512, left) for left in (1.0, 0.5))
    assert half["dense scores"] == whole["dense scores"] / 2
    assert half["candidates"] <= whole["candidates"] / 2 + 1


def test_a_disk_that_the_factors_would_fill_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = scan_of(tmp_path)
    plan = FactorsPlan({}, LAYERS, Selection.of(100), ((0, 50), (50, 100)), (("up", "down"),), 512)
    finished = 4 * 2 * (2 * (400**2 + 100**2) + 100 * 400)
    written = factor_files(run.config, LAYERS, [(50, 256), (50, 256)], 100)
    # The matrices, and beside them labels, eigenvalues and headers.
    assert finished < written.bytes < 1.2 * finished
    needed = plan.partial_bytes() + written.bytes
    monkeypatch.setattr(Store, "free_bytes", lambda self: needed)
    preflight.check_disk_for_factors(run, plan)
    monkeypatch.setattr(Store, "free_bytes", lambda self: needed - 1)
    with pytest.raises(StorageError, match=r"factors\.path=.*partial sums .*free some space"):
        preflight.check_disk_for_factors(run, plan)


def test_free_bytes_are_those_of_the_disk(tmp_path: Path) -> None:
    free = Store(str(tmp_path / "not" / "there" / "yet")).free_bytes()
    assert free is not None
    assert free > 0
    assert Store("memory://anywhere").free_bytes() is None
