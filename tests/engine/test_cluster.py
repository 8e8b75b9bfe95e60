"""Whether a worker fits the cluster is found before the first one starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from infscan.config import ClusterConfig, Placement
from infscan.engine import cluster as module
from infscan.errors import ConfigError
from infscan.storage import host


def nodes(monkeypatch: pytest.MonkeyPatch, *resources: dict[str, float]) -> None:
    ray = SimpleNamespace(
        cluster_resources=lambda: {kind: sum(one.get(kind, 0) for one in resources) for kind in ("CPU", "GPU")},
        nodes=lambda: [{"Alive": True, "Resources": one} for one in resources],
    )
    monkeypatch.setattr(module, "ray", ray)
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
        module.check_capacity(cluster, gpus)
    # A cluster may grow: it is waited for.
    cluster.address = "auto"
    module.check_capacity(cluster, gpus)


def test_room_for_one_worker_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes(monkeypatch, {"CPU": 2.0})
    module.check_capacity(ClusterConfig(num_workers=50, ranks_per_worker=2), 0.0)


def test_a_local_ray_that_does_not_start_in_its_time_ends_the_command_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another error of Ray's keeps its traceback."""
    said = "The current node timed out during startup. This could happen because ..."

    def late(**_: Any) -> None:
        raise Exception(said)

    monkeypatch.setattr(module, "ray", SimpleNamespace(init=late, is_initialized=lambda: False))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=r"a local Ray did not start in .*cluster\.backend=in_process"):
        module.connect(ClusterConfig())
    said = "something else"
    with pytest.raises(Exception, match="something else"):
        module.connect(ClusterConfig())


def test_a_local_ray_listens_where_this_machine_alone_reaches_it_and_asks_for_a_token() -> None:
    """In a process of its own: another test's Ray may run in this one."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run([sys.executable, "-c", _LISTENING], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"mode": "token", "token": 64, "elsewhere": [], "nicer": 0}


_LISTENING = """
import json, os
import psutil, ray
from infscan.config import ClusterConfig
from infscan.engine.cluster import connect
connect(ClusterConfig())
nicer = ray.get(ray.remote(lambda: os.nice(0)).remote()) - os.nice(0)
me = psutil.Process()
found = set()
for process in (me, *me.children(recursive=True)):
    try:
        found |= {one.laddr.ip for one in process.net_connections("inet") if one.status == "LISTEN"}
    except psutil.Error:
        pass
elsewhere = sorted(found - {"127.0.0.1", "::1", "::ffff:127.0.0.1"})
mode, token = os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"])
print(json.dumps({"mode": mode, "token": token, "elsewhere": elsewhere, "nicer": nicer}))
assert found
"""


@pytest.mark.parametrize(
    ("given", "gpus", "have", "cores", "free_gib", "share", "count", "short"),
    [
        ({}, 0.0, {"CPU": 3}, 2, 16, 1, 2, "cores"),
        # Each rank takes 2 GiB of three quarters of what the driver leaves.
        ({}, 0.0, {"CPU": 9}, 8, 9, 1, 3, "memory"),
        ({}, 0.0, {"CPU": 9}, 8, 1, 1, 1, "memory"),
        ({"cpus_per_rank": 2, "ranks_per_worker": 2}, 0.0, {"CPU": 9}, 8, 64, 1, 2, "cores"),
        # With stages, each one's workers have their share.
        ({}, 0.0, {"CPU": 9}, 8, 64, 2, 4, "cores"),
        # A Ray that was there before has fewer.
        ({}, 0.0, {"CPU": 3}, 8, 64, 1, 3, "cores"),
        ({}, 1.0, {"CPU": 17, "GPU": 4}, 16, 64, 1, 4, "GPUs"),
        ({"address": "auto"}, 1.0, {"CPU": 999, "GPU": 99}, 16, 64, 1, 1, ""),
    ],
)
def test_this_machine_is_used_and_what_limits_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    gpus: float,
    have: dict[str, float],
    cores: int,
    free_gib: int,
    share: int,
    count: int,
    short: str,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(module, "ray", SimpleNamespace(cluster_resources=lambda: have))
    monkeypatch.setattr(module, "cores", lambda: cores)
    monkeypatch.setattr(module, "free_host_bytes", lambda: free_gib << 30)
    found, said = module.workers_here(ClusterConfig(**given), gpus, 2 << 30, share)
    assert found == count
    assert said.startswith(f"{count}")
    assert short in said


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000\n", 8), ("150000 100000\n", 1), ("400000 100000\n", 4), ("", 8)]
)
def test_a_containers_cores_are_those_it_may_use(monkeypatch: pytest.MonkeyPatch, quota: str, expected: int) -> None:
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(host, "_text", lambda path: quota)
    assert host.cores() == expected
