"""Heartbeats: whether every rank of a group still answers, asked beside its work and never waited for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray


class Beat(NamedTuple):
    """What a rank says of itself beside its work."""

    # Transient storage faults so far, by kind.
    faults: dict[str, int]
    # Of its unit's micro-batches, how many it has done.
    share: float


@dataclass
class _Ping:
    """One rank's pings."""

    actor: Any
    # The ping that is out, and when it was sent.
    ref: Any = None
    asked: float = 0.0
    # When the next is due.
    due: float = 0.0
    # Whether one was ever answered.
    answered: bool = False
    # The last answer.
    beat: Beat = field(default_factory=lambda: Beat({}, 0.0))


class Heartbeats:
    """The heartbeats of a group's ranks.

    A rank that is stopped, or stuck in C while it holds the interpreter, does not answer; one that computes, or waits
    in a collective, does. A process that still starts has not answered yet: that is for the start's deadline.
    """

    def __init__(self, actors: Sequence[Any], heartbeat_s: float, heartbeat_timeout_s: float) -> None:
        self.heartbeat_s, self.heartbeat_timeout_s = heartbeat_s, heartbeat_timeout_s
        self.pings = [_Ping(actor) for actor in actors]

    @property
    def faults(self) -> Counter[str]:
        """Transient faults of storage that the ranks met so far, by kind, as of their last answers."""
        return sum((Counter(ping.beat.faults) for ping in self.pings), Counter())

    @property
    def share(self) -> float:
        """How much of the group's unit was done when its first rank last answered."""
        return self.pings[0].beat.share

    def begin_unit(self) -> None:
        """Nothing is done of what the group begins now."""
        for ping in self.pings:
            ping.beat = ping.beat._replace(share=0.0)

    def trouble(self) -> Exception | None:
        """What is wrong with a rank: its death, or a TimeoutError where it is silent; None while all is well."""
        now = time.monotonic()
        for rank, ping in enumerate(self.pings):
            if ping.ref is not None:
                # Answered first, silent second: this process may have slept longer than the rank.
                if ray.wait([ping.ref], timeout=0, fetch_local=False)[0]:
                    ref, ping.ref = ping.ref, None
                    try:
                        ping.beat = ray.get(ref)
                    except ray.exceptions.RayError as error:
                        return error
                    ping.answered, ping.due = True, now + self.heartbeat_s
                elif ping.answered and now - ping.asked > self.heartbeat_timeout_s:
                    return TimeoutError(
                        f"rank {rank} has not answered for cluster.heartbeat_timeout_s={self.heartbeat_timeout_s:g} s"
                    )
            if ping.ref is None and now >= ping.due:
                ping.ref, ping.asked = ping.actor.ping.remote(), now
        return None
