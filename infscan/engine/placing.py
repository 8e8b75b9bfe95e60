"""Whether the cluster has room for a worker group; where it has none for long, the job ends and says what it lacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from infscan.config import ClusterConfig
from infscan.engine.cluster import missing_capacity
from infscan.engine.worker_group import State, WorkerGroup
from infscan.errors import RunError

# Every start waits for its placement for a moment; one that waits longer says so.
_ANNOUNCED_AFTER_S = 5.0


class Placing:
    """Since when no group is placed. announce: called with what is waited for; with nothing where that is over."""

    def __init__(
        self, cluster: ClusterConfig, gpus: float, host_bytes: int | None, announce: Callable[[str], None]
    ) -> None:
        self.cluster, self.gpus, self.host_bytes, self.announce = cluster, gpus, host_bytes, announce
        self._unplaced_since: float | None = None

    def check(self, groups: Sequence[WorkerGroup]) -> None:
        """Raise RunError where for cluster.placement_timeout_s there was no room for a single group."""
        used = [group for group in groups if group.state is not State.retired]
        if any(group.state is not State.starting or group.is_placed() for group in used):
            if self._unplaced_since is not None:
                self.announce("")
            self._unplaced_since = None
            return
        if self._unplaced_since is None:
            self._unplaced_since = time.monotonic()
        waited = time.monotonic() - self._unplaced_since
        if waited <= _ANNOUNCED_AFTER_S:
            return
        missing = missing_capacity(self.cluster, self.gpus, self.host_bytes)
        if waited <= self.cluster.placement_timeout_s:
            self.announce(f"waiting for capacity: {missing}")
            return
        raise RunError(
            f"no worker could be placed for cluster.placement_timeout_s={self.cluster.placement_timeout_s:g} s: "
            f"{missing}. Add nodes, or free them from other jobs, and run the same command again: it goes on from here."
        )
