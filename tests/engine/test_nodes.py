"""Several nodes (raylets of their own on this machine): where ranks are placed, groups over nodes, nodes that join."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from infscan.config import Config
from infscan.engine.lease import LEASE
from infscan.engine.worker_group import WorkerGroup
from infscan.errors import ConfigError
from infscan.pipeline import answer
from infscan.results.read import read_summary
from infscan.steps.run import open_run
from infscan.steps.scan import ScanTask
from tests.steps.runs import small_run
from tests.steps.test_end_to_end import rows_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without a core for anybody, as in docker/, and two nodes of two cores; this process is a driver of it."""
    ray.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


def run_of(root: Path, name: str, cluster: Cluster, *overrides: str) -> Config:
    config = small_run(root, f"cluster.address={cluster.address}", f"output={root / name}", *overrides)
    answer(config)
    return config


def nodes_of(config: Config) -> list[list[str]]:
    """By worker and rank, the node that it ran on."""
    return [[rank["node"] for rank in worker] for worker in read_summary(config.output)["workers"]["ranks"]]


@pytest.fixture(scope="module")
def packed(root: Path, cluster: Cluster) -> Config:
    """Two ranks to a worker, on one node: the default."""
    return run_of(root, "packed", cluster, "cluster.ranks_per_worker=2", "cluster.num_workers=2")


def test_a_workers_ranks_share_a_node_unless_told_otherwise(packed: Config) -> None:
    """Two workers fill two nodes to the last core, and the tasks between passes run all the same."""
    first, second = nodes_of(packed)
    assert len(set(first)) == len(set(second)) == 1
    assert first != second


@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_a_worker_over_two_nodes_publishes_the_same_bits(
    packed: Config, root: Path, cluster: Cluster, offload: str
) -> None:
    """ZeRO-3 across nodes, its shards on the device, in memory or in a mapped file."""
    spread = run_of(
        root, f"spread-{offload}", cluster, "cluster.ranks_per_worker=2", "cluster.placement=STRICT_SPREAD",
        f"model.zero.offload={offload}", f"factors.path={packed.factors.path}",
        "+cluster.rank_env.GLOO_SOCKET_IFNAME=lo",
    )  # fmt: skip
    (nodes,) = nodes_of(spread)
    assert len(set(nodes)) == 2
    assert rows_of(spread.output) == rows_of(packed.output)


def test_a_worker_without_room_joins_when_a_node_does(
    packed: Config, root: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cluster.num_workers is a wish: the run begins with what there is, and grows while it runs."""
    submit, handed, joined = WorkerGroup.submit, [], []
    added = threading.Event()

    def watched(self: WorkerGroup, unit: int, function: Callable[..., Any], *arguments: Any, **settings: Any) -> None:
        submit(self, unit, function, *arguments, **settings)
        if isinstance(arguments[0], ScanTask):
            handed.append(self.index)
            if not added.is_set():
                added.set()
                joined.append(cluster.add_node(num_cpus=2))

    monkeypatch.setattr(WorkerGroup, "submit", watched)
    # Each worker takes a whole node, and there are two of them.
    config = run_of(
        root, "joined", cluster, "cluster.cpus_per_rank=2", "cluster.num_workers=3", "scan.shard_sequences=1",
        "model.sharding=zero3", f"factors.path={packed.factors.path}",
    )  # fmt: skip
    cluster.remove_node(joined[0])
    assert set(handed) == {0, 1, 2}
    assert len(nodes_of(config)) == 3


def test_a_folder_that_another_node_does_not_share_is_refused(
    packed: Config, root: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here every raylet shares this machine's disks: the ranks look for the lease where there is none."""
    config = small_run(root, f"cluster.address={cluster.address}", f"output={root / 'apart'}")
    with open_run(config) as run:
        run.folder.lease.store.remove(LEASE)
        with pytest.raises(ConfigError, match=r"is not the same folder on the node .* object storage"):
            _ = run.executor.pool
