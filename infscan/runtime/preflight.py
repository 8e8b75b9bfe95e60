"""What would stop a run later, found before the first worker starts: refused places, missing room, full disks."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import ray

from infscan.config import ClusterConfig, Placement, Scores
from infscan.errors import ConfigError, ModelError, StorageError
from infscan.steps.factor_files import COMPLETE, FactorsPlan
from infscan.results.shard_file import finished_shards
from infscan.engine.cluster import missing_capacity
from infscan.sizing.memory import PassMemory, memory_line, scan_memory
from infscan.steps.volume import factor_files, scan_bytes, size
from infscan.storage import Store

if TYPE_CHECKING:
    from infscan.corpus.addressable import AddressableCorpus
    from infscan.corpus.plan import Plan
    from infscan.steps.run import Run

log = logging.getLogger("infscan")

# Where Ray unpacks what `ray job submit --working-dir` uploads, below its session's folder.
_SUBMITTED = "runtime_resources/working_dir_files"


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
    missing = missing_capacity(cluster, gpus)
    if not cluster.address and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"cluster: this machine has no room for a worker: {missing}. Lower cluster.ranks_per_worker, "
            "cluster.cpus_per_rank or cluster.gpus_per_rank, or name a larger cluster with cluster.address=..."
        )
    log.warning("workers     no room yet: %s; waiting up to cluster.capacity_s=%g s", missing, cluster.capacity_s)


def check_disk_for_factors(run: Run, plan: FactorsPlan) -> None:
    """Raises StorageError where the partial sums and the factors will not fit the disk of factors.path."""
    # How long sequences and how many tokens there are changes labels and a number in a header: a guess will do.
    slices = [(stop - start, run.config.scan.tokens_per_batch) for start, stop in plan.slices]
    written = factor_files(run.config, plan.layers, slices, plan.selection.size)
    parts = {"partial sums": written.partial_bytes, "factors": written.bytes}
    _refuse(f"factors.path={run.factors_store.uri}", parts, run.factors_store.free_bytes(), "fewer factors.slices")


def check_disk_for_scan(run: Run, plan: Plan, corpus: AddressableCorpus) -> None:
    """Raises StorageError where what is left of the scan will not fit the disk of `output`."""
    missing = plan.num_shards - len(finished_shards(run.store))
    left, config = missing / plan.num_shards, run.config
    N, T = plan.selection.size, corpus.sequence_length
    parts = scan_bytes(config, run.architecture.layers, len(run.queries), N, T, left)
    mend = "a lower scan.candidates" + (", or scan.scores=top" if config.scan.scores is Scores.all else "")
    _refuse(f"output={run.store.uri}", parts, run.store.free_bytes(), mend)


def say_memory(run: Run, T: int) -> PassMemory | None:
    """Say what a rank of the scan will hold at once; returns it, for summary.json. None where that cannot be told."""
    try:
        memory = scan_memory(run.config, run.architecture, len(run.queries), T, run.gpus)
    except ModelError as error:
        log.warning("memory      %s", error)
        return None
    log.info("memory      %s", memory_line(memory))
    return memory


def _refuse(place: str, parts: Mapping[str, int], free: int | None, mend: str) -> None:
    total = sum(parts.values())
    if free is None or total <= free:
        return
    largest = sorted(parts, key=lambda name: -parts[name])[:3]
    said = ", ".join(f"{name} {size(parts[name])}" for name in largest)
    raise StorageError(
        f"{place}: about {size(total)} will be written ({said}), and the disk has {size(free)} free; free some "
        f"space, choose a folder on another disk, or give {mend}."
    )
