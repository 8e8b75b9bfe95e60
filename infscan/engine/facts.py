"""What a rank reports of itself, for summary.json and for the driver's decisions about memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from infscan.model.out_of_memory import free_bytes
from infscan.storage import storage_faults
from infscan.storage.host import oom_kills, resident_bytes

if TYPE_CHECKING:
    from infscan.model.loaded import LoadedModel


@dataclass(frozen=True)
class ProcessBytes:
    """A rank's process before its model is loaded: what is resident, and what is free of its GPU."""

    resident: int = 0
    device_free: int | None = None

    @staticmethod
    def now(device: str) -> ProcessBytes:
        """device: `cpu`, or a GPU of this process."""
        return ProcessBytes(resident_bytes(), free_bytes(device))


@dataclass(frozen=True)
class RankFacts:
    """One rank, so far."""

    # Its node's address, and the node's id.
    host: str
    node: str
    parameters: int
    shard_parameters: int
    # Its largest resident memory so far; what was resident before its model was loaded, and after.
    peak_bytes: int
    process_bytes: int
    loaded_bytes: int
    # Processes that the host's kernel had killed for their memory by then.
    oom_kills: int
    # Transient faults of storage that the rank met, by kind.
    storage_faults: dict[str, int]
    # What was free of its GPU before its model was loaded; None on a CPU.
    device_free_bytes: int | None = None


def facts_of(model: LoadedModel, host: str, node: str, before: ProcessBytes, loaded_bytes: int) -> RankFacts:
    """The facts of the rank that this process is."""
    import resource

    return RankFacts(
        host=host,
        node=node,
        parameters=model.parameters,
        shard_parameters=model.shard_parameters,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        process_bytes=before.resident,
        loaded_bytes=loaded_bytes,
        oom_kills=oom_kills(),
        storage_faults=storage_faults(),
        device_free_bytes=before.device_free,
    )
