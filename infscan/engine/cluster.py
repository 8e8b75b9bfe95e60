"""The Ray cluster that a run's workers are on: joining and leaving it, and whether a worker fits it."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import ray_constants

from infscan.config import ClusterConfig, Placement
from infscan.engine.executor import RankMemory
from infscan.errors import ConfigError
from infscan.storage.host import cores, free_host_bytes

log = logging.getLogger("infscan")


def connect(cluster: ClusterConfig) -> None:
    """Join the Ray cluster of `cluster.address` (or RAY_ADDRESS), or start a local one that fits the worker groups."""
    if ray.is_initialized():
        return
    with _own_signal_handlers():
        _init(cluster)


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Put this process's signal handlers back after Ray, on starting, has set its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, handler)


def _init(cluster: ClusterConfig) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Every error that ends a step is raised here once; what Ray would print of the others is a traceback each.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "ignore_reinit_error": True}
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"cluster.address={address}: no Ray cluster answers there ({reason}); start one, or leave it null for "
                "a local Ray."
            ) from None
        return
    # One CPU more than the ranks need, for the tasks between passes.
    worker = cluster.ranks_per_worker * cluster.cpus_per_rank
    needed = (cluster.num_workers or max(1, cores() // worker)) * worker + 1
    _ask_for_token()
    # Ray gives its workers niceness 15, and on a desk they would wait for whatever else runs there.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        with _loopback_alone():
            ray.init(address="local", num_cpus=max(os.cpu_count() or 1, needed), include_dashboard=False, **common)
    except OSError as error:
        # Its sockets lie in its temporary folder, and a socket's path has at most 107 bytes.
        reason = " ".join(str(error).split())
        fix = "use a short folder: export RAY_TMPDIR=~/r" if "AF_UNIX" in reason else "fix that, or set RAY_TMPDIR"
        raise ConfigError(f"a local Ray cannot start in its temporary folder ({reason[:300]}); {fix}.") from None
    except Exception as error:
        # What Ray raises then has no class of its own; its limits, 15 and 30 seconds, have no setting.
        if "timed out during startup" not in str(error):
            raise
        raise ConfigError(
            "a local Ray did not start in the seconds that it gives itself: this machine is very busy, or Ray's logs "
            "(session_latest/logs, in its temporary folder) say why; run the same command again, or add "
            "cluster.backend=in_process for a run without Ray."
        ) from None


def _ask_for_token() -> None:
    """Have a local Ray ask for a token that this process and its children alone know, not the one that Ray keeps in a
    file; where the environment says RAY_AUTH_MODE, as that says."""
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


@contextmanager
def _loopback_alone() -> Iterator[None]:
    """Have a Ray that starts within listen where this machine alone reaches it, as it does on macOS and Windows.

    Ray has no setting for it: a node's address of 127.0.0.1 is replaced by the machine's own.
    """
    before, variable = ray_constants.ENABLE_RAY_CLUSTER, ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    told = os.environ.get(variable)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[variable] = False, "0"
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        if told is None:
            del os.environ[variable]
        else:
            os.environ[variable] = told


def workers_here(cluster: ClusterConfig, gpus: float, rank_bytes: int, share: int = 1) -> tuple[int, str]:
    """How many workers this machine has room for, and what is said of it; of a cluster elsewhere, one.

    rank_bytes: host memory that a rank takes at most. share: among so many is the machine divided.
    """
    if cluster.address or os.environ.get("RAY_ADDRESS"):
        return 1, "1; cluster.num_workers=... has more of the cluster at work"
    ranks = cluster.ranks_per_worker
    have = ray.cluster_resources()
    room = {"cores": min(cores(), have.get("CPU", 0.0)) / (ranks * cluster.cpus_per_rank)}
    if gpus:
        room["GPUs"] = have.get("GPU", 0.0) / (ranks * gpus)
    free = free_host_bytes()
    room["memory"] = max(0, free - _DRIVER_BYTES) * _USED / (ranks * rank_bytes)
    count = max(1, int(min(room.values()) / share))
    short = min(room, key=lambda kind: room[kind])
    gib = [f"{size / 2**30:.1f} GiB" for size in (free, rank_bytes)]
    return count, (
        f"{count}, for which there are enough {short} here ({cores()} cores, {gib[0]} free, a rank takes {gib[1]}); "
        "cluster.num_workers=... has as many as you like"
    )


# What the driver's process takes, and the share of the rest that ranks may have: other programs want some of it.
_DRIVER_BYTES, _USED = 1 << 30, 0.75


def gpus_per_rank(cluster: ClusterConfig) -> float:
    """What was asked for; else one where the cluster has GPUs, none where it has not."""
    if cluster.gpus_per_rank is not None:
        return cluster.gpus_per_rank
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


# Bytes of the GPUs that Ray names among a cluster's resources; where a name stands for two, of the smaller.
_TYPE = "accelerator_type:"
_GPU_GB = {
    "A100": 40,
    "A100-40G": 40,
    "A100-80G": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
    "L40S": 48,
    "L4": 24,
    "A10G": 24,
    "A40": 48,
    "A6000": 48,
    "V100": 16,
    "T4": 16,
}


def gpu_memory(nodes: Sequence[Mapping[str, float]], gpus: float) -> RankMemory | None:
    """What a rank has on the smallest GPU of the cluster, its share of one where it has less than one, and of the
    smallest host. None without a GPU, or where a node has one that is not known here.

    nodes: each one's resources, as Ray names them.
    """
    found = [node for node in nodes if gpus and node.get("GPU")]
    names = [[name.removeprefix(_TYPE) for name in node if name.startswith(_TYPE)] for node in found]
    if not found or any(len(kinds) != 1 or kinds[0] not in _GPU_GB for kinds in names):
        return None
    hosts = [node["memory"] * gpus / node["GPU"] for node in found if "memory" in node]
    device = min(gpus, 1.0) * min(_GPU_GB[kind] for (kind,) in names) * 10**9
    return RankMemory(int(device), int(min(hosts)) if hosts else None)


def check_capacity(cluster: ClusterConfig, gpus: float) -> None:
    """Refuse what a local Ray can never give; a cluster may grow, and is waited for.

    Raises:
        ConfigError: naming what a worker needs and what this machine has.
    """
    have = ray.cluster_resources()
    ranks = cluster.ranks_per_worker
    needs = {"CPU": float(ranks * cluster.cpus_per_rank), "GPU": ranks * gpus}
    short = any(need > have.get(kind, 0.0) for kind, need in needs.items())
    apart = cluster.placement is Placement.STRICT_SPREAD and ranks > len(ray.nodes())
    if not short and not apart:
        return
    missing = missing_capacity(cluster, gpus)
    if not cluster.address and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"cluster: this machine has no room for a worker: {missing}. Lower cluster.ranks_per_worker, "
            "cluster.cpus_per_rank or cluster.gpus_per_rank, or name a larger cluster with cluster.address=..."
        )
    log.warning(
        "workers     no room yet: %s; waiting up to cluster.placement_timeout_s=%g s",
        missing,
        cluster.placement_timeout_s,
    )


def bundle_of(cluster: ClusterConfig, gpus: float, host_bytes: int | None = None) -> dict[str, float]:
    """What one rank asks Ray for."""
    bundle = {"CPU": float(cluster.cpus_per_rank)}
    if gpus:
        bundle["GPU"] = gpus
    if host_bytes:
        bundle["memory"] = float(host_bytes)
    return bundle


def missing_capacity(cluster: ClusterConfig, gpus: float, host_bytes: int | None = None) -> str:
    """What a worker needs, and what the cluster's living nodes have."""
    rank = bundle_of(cluster, gpus, host_bytes)
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = [{kind: resources.get(kind, 0.0) for kind in rank} for resources in alive]
    nodes = "; ".join(sorted(map(_amounts, have))) or "none"
    return (
        f"one needs {cluster.ranks_per_worker} x {{{_amounts(rank)}}} (cluster.placement={cluster.placement.value}), "
        f"and the nodes that are alive have in all {{{nodes}}}"
    )


def _amounts(resources: Mapping[str, float]) -> str:
    shown = {kind: f"{amount / 2**30:.3g} GiB" for kind, amount in resources.items() if kind == "memory"}
    return ", ".join(f"{kind} {shown.get(kind, f'{amount:g}')}" for kind, amount in resources.items())
