"""Worker groups: the ranks that hold one copy of the model, as Ray actors in one placement group."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
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
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from infscan.config import ClusterConfig
from infscan.corpus.read_ahead import Reads
from infscan.engine.cluster import bundle_of
from infscan.engine.facts import ProcessBytes, RankFacts, facts_of
from infscan.engine.heartbeat import Beat, Heartbeats
from infscan.engine.lease import LEASE
from infscan.engine.node_share import NodeShare
from infscan.errors import ConfigError
from infscan.model.loaded import RankContext
from infscan.model.out_of_memory import RankMemoryError
from infscan.model.worker import ModelWorker, Span, Unwritten, WorkerSettings
from infscan.storage import Store, storage_faults
from infscan.storage.host import resident_bytes

_LOST = (ActorDiedError, ActorUnavailableError, WorkerCrashedError, OutOfMemoryError)
# A rank whose neighbour died fails in its collective at once; the death itself shows later (a node's: 15 s and more).
_GRACE_S = 30.0
# How long ranks may take to say how they are.
_ANSWER_S = 10.0
# Between two questions whether a waiting group has got its place.
_PLACE_S = 1.0


class RankActor:
    """One rank, to be run as a Ray actor."""

    def __init__(self) -> None:
        self._worker: ModelWorker | None = None
        self._before, self._loaded_bytes = ProcessBytes(), 0
        # Of units that were computed: what `written` answers, in their order.
        self._unwritten: deque[Future[Any]] = deque()

    def address(self) -> str:
        """host:port at which the group's ranks will meet; asked of rank 0 only."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{host}:{probe.getsockname()[1]}"

    def start(self, settings: WorkerSettings, context: RankContext, env: Mapping[str, str]) -> RankFacts:
        os.environ.update(env)
        _check_shared(settings.output)
        if context.device == "cuda":
            index = gpu_index(ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES"))
            context = replace(context, device=f"cuda:{index}")
        self._before = ProcessBytes.now(context.device)
        self._worker = ModelWorker(settings, context)
        self._loaded_bytes = resident_bytes()
        return self.facts()

    def facts(self) -> RankFacts:
        assert self._worker is not None
        host, node = ray.util.get_node_ip_address(), ray.get_runtime_context().get_node_id()
        return facts_of(self._worker.model, host, node, self._before, self._loaded_bytes)

    def run(
        self,
        function: Callable[..., Any],
        oom_retries: int,
        *arguments: Any,
        following: Reads | None = None,
        behind: bool = False,
    ) -> Any:
        """function(worker, *arguments): one of a step's tasks, with micro-batches halved so many times, while what
        follows is read. `Outcome.computed` where the result is to be had from `written`."""
        assert self._worker is not None
        result = self._worker.attempt(function, oom_retries, *arguments, following=following, behind=behind)
        if not isinstance(result, Unwritten):
            return result
        self._unwritten.append(result.result)
        return Outcome.computed

    @ray.method(concurrency_group="writing")
    def written(self) -> Any:
        """The result of the earliest unit that was computed and not asked for yet, once its output is in storage."""
        return self._unwritten.popleft().result()

    @ray.method(concurrency_group="heartbeat")
    def ping(self) -> Beat:
        """Answers beside the work, on a thread of its own."""
        return Beat(storage_faults(), self._worker.share if self._worker else 0.0)

    def forget(self) -> None:
        if self._worker is not None:
            self._worker.forget()

    def trace(self, on: bool) -> list[Span]:
        """What the rank did since it was last asked; from now on it keeps that, or keeps nothing."""
        assert self._worker is not None
        spans, self._worker.spans = self._worker.spans or [], [] if on else None
        return spans


def _check_shared(output: Store | None) -> None:
    """Refuse a local folder that is another one on this node than where the driver runs.

    Raises:
        ConfigError: where the driver's lease is not there.
    """
    if output is not None and output.local_path() is not None and not output.exists(LEASE):
        raise ConfigError(
            f"output={output.uri} is not the same folder on the node {ray.util.get_node_ip_address()}, where a rank "
            "runs; give an address on object storage (s3://...), or a folder on a disk that all nodes share."
        )


def gpu_index(mine: Sequence[int | str], visible: str | None) -> int:
    """CUDA's number of the GPU that Ray gave this process.

    Ray shows a process its own GPUs only, and the first is the rank's; told not to (RAY_EXPERIMENTAL_NOSET_
    CUDA_VISIBLE_DEVICES), it leaves all of them visible, and the rank's is found among them. mine: `ray.get_gpu_ids()`;
    visible: CUDA_VISIBLE_DEVICES, None where it is not set.
    """
    ids = [str(gpu) for gpu in mine]
    shown = [gpu.strip() for gpu in visible.split(",")] if visible else None
    if shown is None:
        return int(ids[0]) if ids and ids[0].isdecimal() else 0
    return shown.index(ids[0]) if ids and ids[0] in shown else 0


# Never restarted by Ray itself: the driver counts attempts and rebuilds the whole group.
_ACTOR: Any = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"heartbeat": 1, "writing": 1})(
    RankActor
)


@ray.remote(num_cpus=0)
def _with_address(context: RankContext, address: str) -> RankContext:
    """A rank's context, once rank 0 has said where the group meets."""
    return replace(context, address=address)


def first_answers(refs: list[ray.ObjectRef], limit_s: float) -> list[ray.ObjectRef]:
    """Wait for an answer, `limit_s` at most; all those that are there by then."""
    if not refs:
        time.sleep(limit_s)
        return []
    if not ray.wait(refs, num_returns=1, timeout=limit_s, fetch_local=False)[0]:
        return []
    return ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[0]


class State(Enum):
    starting = auto()
    idle = auto()
    busy = auto()
    # Its machine is sick: it has no ranks, and gets none.
    retired = auto()


class Outcome(Enum):
    """What became of a group's step: all ranks answered, the work went wrong, or a machine under it did."""

    done = auto()
    # The ranks are free for another unit, and the first is still writing what this one's task left.
    computed = auto()
    failed = auto()
    lost = auto()


class WorkerGroup:
    """R ranks that start, work and die together; its placement group outlives them."""

    # What the next unit may take; None is cluster.deadline_s.
    unit_limit_s: float | None = None
    # Rank 0's answer to the unit that it is still writing, and until when it may take.
    writing: ray.ObjectRef | None = None
    _written_by = 0.0

    def __init__(self, index: int, settings: WorkerSettings, cluster: ClusterConfig, gpus: float) -> None:
        self.index, self.settings, self.cluster, self.gpus = index, settings, cluster, gpus
        bundle = bundle_of(cluster, gpus, settings.host_bytes)
        self.placement: PlacementGroup = placement_group(
            [dict(bundle) for _ in range(cluster.ranks_per_worker)], strategy=cluster.placement.value
        )
        self.actors: list[Any] = []
        self.refs: list[ray.ObjectRef] = []
        # Those of `refs` that had not answered when last polled.
        self.running: list[ray.ObjectRef] = []
        self.facts: list[RankFacts] = []
        self.unit: Any | None = None
        self.start()

    def start(self) -> None:
        """Make new actors in the same placement group and have them load the model; returns at once."""
        self.writing = None
        world = self.cluster.ranks_per_worker
        self.actors = [
            _ACTOR.options(
                num_cpus=self.cluster.cpus_per_rank,
                num_gpus=self.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=rank),
            ).remote()
            for rank in range(world)
        ]
        contexts: list[Any] = [
            RankContext(
                rank=rank,
                world=world,
                device="cuda" if self.gpus else "cpu",
                threads=self.cluster.cpus_per_rank,
                # Ranks meet while they load. A hang is ended by this process's deadlines, not by the collective's.
                timeout_s=max(self.cluster.deadline_s, self.cluster.startup_timeout_s),
            )
            for rank in range(world)
        ]
        if self.settings.sharded:
            address = self.actors[0].address.remote()
            contexts = [_with_address.remote(context, address) for context in contexts]
        env = self.cluster.rank_env
        self.refs = [
            actor.start.remote(self.settings, context, env)
            for actor, context in zip(self.actors, contexts, strict=True)
        ]
        self.heartbeats = Heartbeats(self.actors, self.cluster.heartbeat_s, self.cluster.heartbeat_timeout_s)
        self._placed, self._ask_place_at = False, 0.0
        self._began(State.starting, None, self.cluster.startup_timeout_s)

    def submit(
        self,
        unit: Any,
        function: Callable[..., Any],
        *arguments: Any,
        oom_retries: int = 0,
        following: Reads | None = None,
        behind: bool = False,
    ) -> None:
        """Have every rank run function(worker, *arguments): object references among the arguments are fetched there,
        and of a `NodeShare` it gets its node's copy.

        following: what the unit after this one will most likely read. behind: whether its output may be written while
        the unit after it is computed.
        """
        assert self.state is State.idle
        self.refs = [
            actor.run.remote(
                function,
                oom_retries,
                *(one.on(rank.node) if isinstance(one, NodeShare) else one for one in arguments),
                following=following,
                behind=behind,
            )
            for actor, rank in zip(self.actors, self.facts, strict=True)
        ]
        self.heartbeats.begin_unit()
        self._began(State.busy, unit, self.unit_limit_s or self.cluster.deadline_s)

    def _began(self, state: State, unit: Any | None, limit_s: float) -> None:
        self.state, self.unit, self.limit_s = state, unit, limit_s
        self.deadline = time.monotonic() + limit_s
        self.running = list(self.refs)
        self.failed_at: float | None = None

    @property
    def pending(self) -> list[ray.ObjectRef]:
        """What the group has yet to answer."""
        running = self.running if self.state in (State.starting, State.busy) else []
        return running if self.writing is None else [*running, self.writing]

    def poll_written(self) -> tuple[Outcome, Any] | None:
        """What became of the unit that was being written, with its result or the exception; None while it is, and
        where there is none. Never waits."""
        if self.writing is None or not ray.wait([self.writing], timeout=0, fetch_local=False)[0]:
            return None
        ref, self.writing = self.writing, None
        try:
            return Outcome.done, ray.get(ref)
        except RayTaskError as error:
            return Outcome.failed, error.cause if isinstance(error.cause, Exception) else error
        except RayError as error:
            return Outcome.lost, error

    def poll(self) -> tuple[Outcome, Any] | None:
        """The step's outcome, with rank 0's result or the exception; None while it runs. Never waits.

        Where a rank failed and others still run, they have `_GRACE_S` to turn out lost: then that is the outcome. An
        idle group has one outcome only: a rank that died or fell silent meanwhile. A unit that failed, or is computed,
        while the one before is written, is told of once that has ended.
        """
        if self.state is State.retired:
            return None
        answer = None if self.state is State.idle else self._answer()
        if self.writing is not None and time.monotonic() > self._written_by:
            return Outcome.lost, TimeoutError(f"its output was not written within {self.limit_s:g} s")
        if answer is not None or self.failed_at is not None:
            return answer
        trouble = self.heartbeats.trouble()
        if trouble is not None:
            return Outcome.lost, trouble
        if self.state is State.starting and not self.is_placed():
            # The start is timed from when there is room for it.
            self.deadline = time.monotonic() + self.limit_s
        if self.state is not State.idle and time.monotonic() > self.deadline:
            limit = "cluster.startup_timeout_s" if self.state is State.starting else "cluster.deadline_s"
            said = f"{limit}={self.limit_s:g} s"
            if self.state is State.busy and self.unit_limit_s == self.limit_s < self.cluster.deadline_s:
                said = f"{self.limit_s:.0f} s, many times what the step's longest unit took"
            return Outcome.lost, TimeoutError(f"no answer within {said}")
        return None

    def _answer(self) -> tuple[Outcome, Any] | None:
        ready, self.running = ray.wait(self.refs, num_returns=len(self.refs), timeout=0, fetch_local=False)
        failure: Exception | None = None
        results = []
        for ref in ready:
            try:
                results.append(ray.get(ref))
            except _LOST as error:
                return Outcome.lost, error
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                if failure is None or isinstance(cause, RankMemoryError):
                    failure = cause
            except RayError as error:
                return Outcome.lost, error
        if failure is not None:
            self.failed_at = self.failed_at or time.monotonic()
            # The others wait for a rank without memory in a collective: it needs no other explanation.
            known = isinstance(failure, RankMemoryError) or not self.running
            if self.writing is not None:
                # What is still being written ends first: the failure may end the ranks.
                return None
            return (Outcome.failed, failure) if known or time.monotonic() >= self.failed_at + _GRACE_S else None
        if self.running:
            return None
        if self.state is State.starting:
            self.facts = results
        if results[0] is not Outcome.computed:
            self.state = State.idle
            return Outcome.done, results[0]
        if self.writing is not None:
            # The unit before is written by now, and its answer on the way: it comes first.
            return None
        self.state, self.writing = State.idle, self.actors[0].written.remote()
        self._written_by = time.monotonic() + self.limit_s
        return Outcome.computed, None

    def is_placed(self) -> bool:
        """Whether the cluster has given the group its room; asked of Ray at most once a second."""
        if not self._placed and time.monotonic() >= self._ask_place_at:
            self._placed = placement_group_table(self.placement).get("state") == "CREATED"
            self._ask_place_at = time.monotonic() + _PLACE_S
        return self._placed

    def facts_now(self) -> list[RankFacts]:
        """What the ranks report; what they reported when they started, where one does not answer any more."""
        try:
            facts: list[RankFacts] = ray.get([actor.facts.remote() for actor in self.actors], timeout=_ANSWER_S)
        except RayError:
            return self.facts
        return facts

    def trace(self, on: bool) -> list[list[Span]]:
        """By rank, what each did since it was last asked; nothing where one does not answer any more."""
        try:
            spans: list[list[Span]] = ray.get([actor.trace.remote(on) for actor in self.actors], timeout=_ANSWER_S)
        except RayError:
            return []
        return spans

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

    def retire(self) -> None:
        """Kill every rank for good; the placement group stays, with what it holds."""
        self.kill()
        self.state, self.unit, self.running, self.writing = State.retired, None, [], None

    def close(self) -> None:
        self.kill()
        remove_placement_group(self.placement)
