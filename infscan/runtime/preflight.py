"""What would stop a run later, found before the first worker starts: refused places, missing room, full disks."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import ray

from infscan.config import ClusterConfig, Placement, Scores
from infscan.errors import ConfigError, StorageError
from infscan.passes.factor_store import COMPLETE, FactorsPlan
from infscan.results.shard_file import finished_shards
from infscan.runtime.pool import missing_room
from infscan.storage import Store

if TYPE_CHECKING:
    from infscan.corpus.addressable import AddressableCorpus
    from infscan.corpus.plan import Plan
    from infscan.runtime.run import Run

log = logging.getLogger("infscan")

# Where Ray unpacks what `ray job submit --working-dir` uploads, below its session's folder.
_SUBMITTED = "runtime_resources/working_dir_files"

# Bytes of a float32, of a token id, and of a row's other columns, before compression.
_FLOAT, _TOKEN, _ROW = 4, 4, 100


def check_writable(run: Run) -> None:
    """The output, and factors.path where factors are to be put there.

    Raises:
        ConfigError: where one is a folder that Ray will remove.
        StorageError: where one cannot be written: permissions, credentials, a full disk, a server that does not answer.
    """
    _refuse_submitted("output", run.store)
    run.store.check_writable()
    if run.factors_apart and not run.factors_store.exists(COMPLETE):
        _refuse_submitted("factors.path", run.factors_store)
        run.factors_store.check_writable()


def _refuse_submitted(key: str, store: Store) -> None:
    folder = store.local_path()
    if folder is not None and _SUBMITTED in folder.as_posix():
        raise ConfigError(
            f"{key}={store.uri} lies in the submitted job's copy of the working folder, which Ray removes; give an "
            "address on object storage (s3://...), or the whole path of a folder that every node has."
        )


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
    missing = missing_room(cluster, gpus)
    if not cluster.address and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"cluster: this machine has no room for a worker: {missing}. Lower cluster.ranks_per_worker, "
            "cluster.cpus_per_rank or cluster.gpus_per_rank, or name a larger cluster with cluster.address=..."
        )
    log.warning("workers     no room yet: %s; waiting up to cluster.capacity_s=%g s", missing, cluster.capacity_s)


def check_disk_for_factors(run: Run, plan: FactorsPlan) -> None:
    """Raises StorageError where the partial sums and the factors will not fit the disk of factors.path."""
    # A and Q_A, S and Q_S, Lambda.
    finished = sum(_FLOAT * (2 * (layer.outputs**2 + layer.inputs**2) + layer.size) for layer in plan.layers)
    parts = {"partial sums": plan.partial_bytes(), "factors": finished}
    _refuse(f"factors.path={run.factors_store.uri}", parts, run.factors_store.free_bytes(), "fewer factors.slices")


def check_disk_for_scan(run: Run, plan: Plan, corpus: AddressableCorpus) -> None:
    """Raises StorageError where what is left of the scan will not fit the disk of `output`."""
    missing = plan.num_shards - len(finished_shards(run.store))
    parts = scan_bytes(run, plan, corpus.sequence_length, left=missing / plan.num_shards)
    mend = "a lower scan.candidates" + (", or scan.scores=top" if run.config.scan.scores is Scores.all else "")
    _refuse(f"output={run.store.uri}", parts, run.store.free_bytes(), mend)


def scan_bytes(run: Run, plan: Plan, T: int, left: float = 1.0) -> dict[str, int]:
    """What a scan writes, by kind, in bytes before compression.

    left: the share of shards that is still to be done. With thresholds, C (1 + ln(N/C)) rows per query and side are
    written on the way to the C best ones (DESIGN: guarantee 3); no sequence is stored twice.
    """
    config, N, C = run.config, plan.selection.size, run.config.candidates
    layers, boards = run.architecture.layers, len(run.queries) * len(run.config.sides)
    kept = boards * min(N, C * (1 + math.log(max(N / C, 1))))
    r = config.most_rank
    entries = sum(
        layer.size if r is None or min(layer.outputs, layer.inputs) <= r else r * (layer.outputs + layer.inputs)
        for layer in layers
    )
    best = boards * min(C, N)
    parts = {
        "query batch": _FLOAT * len(run.queries) * entries,
        "candidates": left * (min(kept, N) * (T * _TOKEN + _ROW) + kept * _ROW),
        "refined rows": best * (_FLOAT * (T + len(layers)) + _ROW),
        "tables": min(best, boards * config.scan.top_k) * (_FLOAT * (2 * T + len(layers)) + _ROW),
    }
    if config.scan.scores is Scores.all:
        parts["dense scores"] = left * _FLOAT * len(run.queries) * N
    return {name: int(size) for name, size in parts.items()}


def _refuse(place: str, parts: Mapping[str, int], free: int | None, mend: str) -> None:
    total = sum(parts.values())
    if free is None or total <= free:
        return
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    said = ", ".join(f"{name} {_size(parts[name])}" for name in largest)
    raise StorageError(
        f"{place}: about {_size(total)} will be written ({said}), and the disk has {_size(free)} free; free some "
        f"space, choose a folder on another disk, or give {mend}."
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
