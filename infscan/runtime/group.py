"""Worker groups: the ranks that hold one copy of the model, as Ray actors in one placement group."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from infscan.config import ClusterConfig
from infscan.model.load import Place
from infscan.passes.rank import Rank, RankSettings

_LOST = (ActorDiedError, ActorUnavailableError, WorkerCrashedError, OutOfMemoryError)
# A rank whose neighbour died fails in its collective at once; the death itself shows later (a node's: 15 s and more).
_GRACE_S = 30.0
# How long ranks may take to say how they are.
_ANSWER_S = 10.0


@dataclass(frozen=True)
class RankFacts:
    """What a rank reports of itself. host: its node's address. peak_bytes: its largest resident memory so far."""

    host: str
    parameters: int
    shard_parameters: int
    peak_bytes: int


class RankActor:
    """One rank, to be run as a Ray actor."""

    def __init__(self) -> None:
        self._rank: Rank | None = None

    def address(self) -> str:
        """host:port at which the group's ranks will meet; asked of rank 0 only."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{host}:{probe.getsockname()[1]}"

    def start(self, settings: RankSettings, place: Place) -> RankFacts:
        self._rank = Rank(settings, place)
        return self.facts()

    def facts(self) -> RankFacts:
        assert self._rank is not None
        import resource

        model = self._rank.model
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return RankFacts(ray.util.get_node_ip_address(), model.parameters, model.shard_parameters, peak)

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(rank, *arguments): one of infscan.passes' tasks."""
        return function(self._rank, *arguments)

    def forget(self) -> None:
        if self._rank is not None:
            self._rank.forget()


# Never restarted by Ray itself: the driver counts attempts and rebuilds the whole group.
_ACTOR: Any = ray.remote(max_restarts=0, max_task_retries=0)(RankActor)


@ray.remote(num_cpus=0)
def _placed(place: Place, address: str) -> Place:
    """A rank's place, once rank 0 has said where the group meets."""
    return Place(**(vars(place) | {"address": address}))


class State(Enum):
    starting = auto()
    idle = auto()
    busy = auto()


class Outcome(Enum):
    """What became of a group's step: all ranks answered, the work went wrong, or a machine under it did."""

    done = auto()
    failed = auto()
    lost = auto()


class WorkerGroup:
    """R ranks that start, work and die together; its placement group outlives them."""

    def __init__(self, index: int, settings: RankSettings, cluster: ClusterConfig, gpus: float) -> None:
        self.index, self.settings, self.cluster, self.gpus = index, settings, cluster, gpus
        bundle = {"CPU": float(cluster.cpus_per_rank)} | ({"GPU": gpus} if gpus else {})
        self.placement: PlacementGroup = placement_group(
            [dict(bundle) for _ in range(cluster.ranks_per_worker)], strategy=cluster.placement.value
        )
        self.actors: list[Any] = []
        self.refs: list[ray.ObjectRef] = []
        # Those of `refs` that had not answered when last polled.
        self.running: list[ray.ObjectRef] = []
        self.facts: list[RankFacts] = []
        self.unit: int | None = None
        self.start()

    def start(self) -> None:
        """Make new actors in the same placement group and have them load the model; returns at once."""
        world = self.cluster.ranks_per_worker
        self.actors = [
            _ACTOR.options(
                num_cpus=self.cluster.cpus_per_rank,
                num_gpus=self.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(world)
        ]
        places: list[Any] = [
            Place(
                rank=rank,
                world=world,
                # Ray shows a rank its own GPUs only, so the first one is the rank's.
                device="cuda:0" if self.gpus else "cpu",
                threads=self.cluster.cpus_per_rank,
                # Ranks meet while they load. A hang is ended by this process's deadlines, not by the collective's.
                timeout_s=max(self.cluster.deadline_s, self.cluster.startup_s),
            )
            for rank in range(world)
        ]
        if self.settings.sharded:
            address = self.actors[0].address.remote()
            places = [_placed.remote(place, address) for place in places]
        self.refs = [actor.start.remote(self.settings, place) for actor, place in zip(self.actors, places, strict=True)]
        self._began(State.starting, None, self.cluster.startup_s)

    def submit(self, unit: int, function: Callable[..., Any], *arguments: Any) -> None:
        """Have every rank run function(rank, *arguments); object references among the arguments are fetched there."""
        assert self.state is State.idle
        self.refs = [actor.run.remote(function, *arguments) for actor in self.actors]
        self._began(State.busy, unit, self.cluster.deadline_s)

    def _began(self, state: State, unit: int | None, limit_s: float) -> None:
        self.state, self.unit = state, unit
        self.deadline = time.monotonic() + limit_s
        self.running = list(self.refs)
        self.failed_at: float | None = None

    def poll(self) -> tuple[Outcome, Any] | None:
        """The step's outcome, with rank 0's result or the exception; None while it runs. Never waits.

        Where a rank failed and others still run, they have `_GRACE_S` to turn out lost: then that is the outcome.
        """
        ready, self.running = ray.wait(self.refs, num_returns=len(self.refs), timeout=0, fetch_local=False)
        failure: Exception | None = None
        for ref in ready:
            try:
                ray.get(ref)
            except _LOST as error:
                return Outcome.lost, error
            except RayTaskError as error:
                failure = failure or (error.cause if isinstance(error.cause, Exception) else error)
            except RayError as error:
                return Outcome.lost, error
        if failure is not None:
            self.failed_at = self.failed_at or time.monotonic()
            waits = self.running and time.monotonic() < self.failed_at + _GRACE_S
            return None if waits else (Outcome.failed, failure)
        if not self.running:
            results = ray.get(ready)
            if self.state is State.starting:
                self.facts = results
            self.state = State.idle
            return Outcome.done, results[0]
        if time.monotonic() > self.deadline:
            limit = "cluster.startup_s" if self.state is State.starting else "cluster.deadline_s"
            return Outcome.lost, TimeoutError(f"no answer within {limit}")
        return None

    def facts_now(self) -> list[RankFacts]:
        """What the ranks say of themselves; what they said when they started, where one does not answer any more."""
        try:
            facts: list[RankFacts] = ray.get([actor.facts.remote() for actor in self.actors], timeout=_ANSWER_S)
        except RayError:
            return self.facts
        return facts

    def forget(self) -> None:
        """Have the ranks drop what a finished phase cached. Not waited for: a dead rank shows up in its next step."""
        for actor in self.actors:
            actor.forget.remote()

    def rebuild(self) -> None:
        """Kill every rank (it works even while one is stuck) and start new ones in the same placement group."""
        self.kill()
        self.start()

    def kill(self) -> None:
        for actor in self.actors:
            ray.kill(actor, no_restart=True)

    def close(self) -> None:
        self.kill()
        remove_placement_group(self.placement)
