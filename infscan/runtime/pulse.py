"""Heartbeats: whether every rank of a group still answers, asked beside its work and never waited for."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray


@dataclass
class _Beat:
    """One rank: the question that is out and when it was asked, when the next is due, whether one was ever answered,
    and what the last answer said of storage."""

    actor: Any
    ref: Any = None
    asked: float = 0.0
    due: float = 0.0
    answered: bool = False
    faults: dict[str, int] = field(default_factory=dict)


class Pulse:
    """The heartbeats of a group's ranks.

    A rank that is stopped, or stuck in C while it holds the interpreter, does not answer; one that computes, or waits
    in a collective, does. A process that still starts has not answered yet: that is for the start's deadline.
    """

    def __init__(self, actors: Sequence[Any], heartbeat_s: float, silence_s: float) -> None:
        self.heartbeat_s, self.silence_s = heartbeat_s, silence_s
        self.beats = [_Beat(actor) for actor in actors]

    @property
    def faults(self) -> Counter[str]:
        """Passing faults of storage that the ranks met so far, by kind, as of their last answers."""
        return sum((Counter(beat.faults) for beat in self.beats), Counter())

    def trouble(self) -> Exception | None:
        """What is wrong with a rank: its death, or a TimeoutError where it is silent; None while all is well."""
        now = time.monotonic()
        for rank, beat in enumerate(self.beats):
            if beat.ref is not None:
                # Answered first, silent second: this process may have slept longer than the rank.
                if ray.wait([beat.ref], timeout=0, fetch_local=False)[0]:
                    ref, beat.ref = beat.ref, None
                    try:
                        beat.faults = ray.get(ref)
                    except ray.exceptions.RayError as error:
                        return error
                    beat.answered, beat.due = True, now + self.heartbeat_s
                elif beat.answered and now - beat.asked > self.silence_s:
                    return TimeoutError(f"rank {rank} has not answered for cluster.silence_s={self.silence_s:g} s")
            if beat.ref is None and now >= beat.due:
                beat.ref, beat.asked = beat.actor.beat.remote(), now
        return None
