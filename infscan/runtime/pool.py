"""All worker groups of a run, and the loop that keeps them busy: the way every distributed phase is driven."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError

from infscan.config import ClusterConfig
from infscan.errors import (
    ConfigError,
    FactorsError,
    InfscanError,
    ModelError,
    QueryError,
    RunError,
    StorageError,
    UnwritableError,
)
from infscan.passes.memory import RankMemoryError
from infscan.passes.rank import RankSettings, Span
from infscan.runtime.group import Outcome, RankFacts, State, WorkerGroup, first_answers
from infscan.runtime.losses import Losses
from infscan.runtime.schedule import Schedule
from infscan.runtime.watch import Watch
from infscan.storage import storage_faults

log = logging.getLogger(__name__)

# Errors that another attempt cannot mend: they end the phase at once.
_FATAL = (ConfigError, FactorsError, ModelError, QueryError, UnwritableError)
_TICK_S = 0.5
_TELL_S = 1.0
_LONGEST_REST_S = 60.0


def connect(cluster: ClusterConfig) -> None:
    """Join the Ray cluster of `cluster.address` (or RAY_ADDRESS), or start a local one that fits the worker groups."""
    if ray.is_initialized():
        return
    # Every error that ends a phase is raised here once; what Ray would print of the others is a traceback each.
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
    needed = cluster.num_workers * cluster.ranks_per_worker * cluster.cpus_per_rank + 1
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, needed), include_dashboard=False, **common)


def gpus_per_rank(cluster: ClusterConfig) -> float:
    """What was asked for; else one where the cluster has GPUs, none where it has not."""
    if cluster.gpus_per_rank is not None:
        return cluster.gpus_per_rank
    return 1.0 if ray.cluster_resources().get("GPU", 0) >= 1 else 0.0


class Pool:
    """The worker groups, started together; `run` gives them one phase's units.

    losses: told of every worker that is lost. check: called at every turn of the loop; what it raises ends the phase (a
    driver that lost its lease). watch: told of every unit that goes out and ends.

    What a finished unit costs this process does not grow with the number of workers: a turn of the loop looks at those
    that answered, and at all of them once in `_TICK_S` for what no answer tells (silence, deadlines).
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        settings: RankSettings,
        gpus: float,
        losses: Losses,
        check: Callable[[], None] = lambda: None,
        watch: Watch | None = None,
    ) -> None:
        self.cluster, self.gpus, self.losses, self.check = cluster, gpus, losses, check
        self.watch = watch or Watch("")
        self.sharded = settings.sharded
        self.groups = [self.new_group(index, settings) for index in range(cluster.num_workers)]
        # When all groups are looked at next.
        self._look_at = 0.0
        self.failed_starts = 0
        self.halvings = 0
        # When those who watch are told next.
        self._tell_at = 0.0
        # Until when storage that had trouble is left alone, and how often in a row it had.
        self._rest_until, self._troubles = 0.0, 0
        # Since when no group has room.
        self._homeless_since: float | None = None
        # By host: processes that its kernel had killed for memory when last heard of. By group: the unit it died with.
        self._oom_kills: dict[str, int] = {}
        self._died_with: dict[int, int] = {}

    def new_group(self, index: int, settings: RankSettings) -> WorkerGroup:
        return WorkerGroup(index, settings, self.cluster, self.gpus)

    def answers(self, refs: list[Any], limit_s: float) -> list[Any]:
        return first_answers(refs, limit_s)

    def wait_for_one(self) -> int:
        """Wait until a group has loaded its model; the others join when they are ready. Returns how many have.

        Raises:
            InfscanError: where the model cannot be loaded, or no group can be started or placed.
        """
        while not any(group.state is State.idle for group in self.groups):
            for group in self.wait():
                if group.state is State.starting and (answer := group.poll()) is not None:
                    self._started(group, *answer)
        return sum(group.state is State.idle for group in self.groups)

    def run(
        self,
        units: Iterable[int],
        function: Callable[..., Any],
        task: Callable[[int], Any],
        on_done: Callable[[int, Any], None],
        *shared: Any,
        on_given_up: Callable[[int, str], None] | None = None,
    ) -> Mapping[int, str]:
        """Run function(rank, task(unit), *shared) for every unit; the tasks are made when they are handed out.

        on_done(unit, result of rank 0) and on_given_up(unit, reason) are called in this process as units end.
        Returns the units given up, with reasons.

        Raises:
            RunError: where a unit is given up and no `on_given_up` takes it, where one sequence does not fit a rank's
                memory, or where no group can be started or placed.
            InfscanError: at once, where an error cannot be mended by another attempt.
        """
        schedule = Schedule(units, self.cluster.max_attempts)

        def hand_out(group: WorkerGroup) -> None:
            if group.state is not State.idle or time.monotonic() < self._rest_until:
                return
            if (unit := schedule.take()) is not None:
                group.submit(unit, function, task(unit), *shared, halvings=schedule.halvings.get(unit, 0))
                self.losses.handed(group.index)
                self.watch.handed(group.index, unit, schedule.attempt(unit))

        self._died_with.clear()
        self.losses.next_pass()
        while not schedule.finished:
            for group in self.groups:
                hand_out(group)
            self._tell(schedule)
            for group in self.wait():
                was, unit = group.state, group.unit
                answer = group.poll()
                if answer is None:
                    continue
                outcome, result = answer
                if was is State.starting:
                    self._started(group, outcome, result, schedule)
                elif was is State.idle:
                    self._rebuild(group, result)
                elif outcome is Outcome.done:
                    assert unit is not None
                    self._troubles = 0
                    self.losses.done(group.index)
                    self.watch.over(group.index, "done")
                    schedule.succeed(unit)
                    on_done(unit, result)
                else:
                    assert unit is not None
                    self._ended_badly(schedule, group, unit, outcome, result, on_given_up)
                # Not when all have been heard: where a thousand answered, the first would wait for them.
                hand_out(group)
        self._tell(schedule)
        return schedule.given_up

    def _tell(self, schedule: Schedule) -> None:
        """What is in which state now, at most once a second and at the pass's end."""
        if not self.watch.metrics or (time.monotonic() < self._tell_at and not schedule.finished):
            return
        self._tell_at = time.monotonic() + _TELL_S
        workers = Counter(group.state.name for group in self.groups)
        faults = sum((group.pulse.faults for group in self.groups), Counter(storage_faults()))
        self.watch.counted(schedule.states, {state.name: workers[state.name] for state in State}, faults)

    def wait(self) -> list[WorkerGroup]:
        """Wait until a rank answers, a tick at most. Returns the groups to look at."""
        self.check()
        self._check_room()
        asked = {ref: group for group in self.groups if group.state is not State.idle for ref in group.running}
        answered = self.answers(list(asked), _TICK_S)
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _TICK_S
            return self.groups
        return list({group.index: group for group in map(asked.__getitem__, answered)}.values())

    def _check_room(self) -> None:
        """Raise where for cluster.capacity_s there was no room for a single group."""
        if any(group.state is not State.starting or group.is_placed() for group in self.groups):
            self._homeless_since = None
            return
        if self._homeless_since is None:
            self._homeless_since = time.monotonic()
        if time.monotonic() - self._homeless_since <= self.cluster.capacity_s:
            return
        raise RunError(
            f"no worker could be placed for cluster.capacity_s={self.cluster.capacity_s:g} s: "
            f"{missing_room(self.cluster, self.gpus)}. Add nodes, or free them from other jobs, and run the same "
            "command again: it goes on from here."
        )

    def _started(self, group: WorkerGroup, outcome: Outcome, result: Any, schedule: Schedule | None = None) -> None:
        if outcome is Outcome.done:
            self.failed_starts = 0
            self.losses.started(group.index)
            self._heed_oom_kills(group, schedule)
            return
        if isinstance(result, InfscanError):
            raise result
        self.failed_starts += 1
        if self.failed_starts >= self.cluster.max_attempts * len(self.groups):
            raise RunError(
                f"no worker group could be started in {self.failed_starts} attempts; the last one said: "
                f"{_reason(result)}. Look at the Ray logs, at cluster.* and at the memory a rank has."
            )
        self._rebuild(group, result)

    def _heed_oom_kills(self, group: WorkerGroup, schedule: Schedule | None) -> None:
        """Halve the unit that a group died with, if its host's kernel killed for memory meanwhile.

        A killed rank says nothing of the reason; its host's counter does, once the group is there again.
        """
        killed = False
        for facts in group.facts:
            known = self._oom_kills.get(facts.host)
            killed |= known is not None and facts.oom_kills > known
            self._oom_kills[facts.host] = facts.oom_kills
        unit = self._died_with.pop(group.index, None)
        if killed and schedule is not None and unit is not None:
            log.warning("unit %d: the kernel killed a process of its worker for memory; micro-batches are halved", unit)
            self.halvings += schedule.halve(unit)

    def _ended_badly(
        self,
        schedule: Schedule,
        group: WorkerGroup,
        unit: int,
        outcome: Outcome,
        error: Exception,
        on_given_up: Callable[[int, str], None] | None,
    ) -> None:
        if isinstance(error, _FATAL):
            raise error
        reason = _reason(error)
        passes = isinstance(error, StorageError) and error.passes
        if isinstance(error, RankMemoryError) and error.rows == 1:
            raise RunError(
                f"one sequence alone ({error.tokens} tokens) does not fit a rank's memory ({error.reason}). Cut the "
                "model over more ranks (cluster.ranks_per_worker), set model.gradient_checkpointing=true or "
                "model.dtype=bfloat16, or prepare the corpus with a shorter corpus.sequence_length."
            )
        if isinstance(error, OutOfMemoryError) or (isinstance(error, RankMemoryError) and error.rows is not None):
            last, cause = schedule.shrink(unit, reason), "memory"
            self.halvings += not last
        elif outcome is Outcome.failed and not passes:
            last, cause = schedule.fail(unit, reason), "error"
        else:
            last, cause = schedule.lose(unit, reason), "storage" if passes else "lost"
        facts = self.watch.facts(group.index, unit, schedule.attempt(unit) - 1)
        what = "given up" if last else "tried again"
        log.warning("unit %d on worker %d: %s; %s", unit, group.index, reason, what, extra=facts)
        self.watch.over(group.index, cause)
        if outcome is Outcome.failed and passes:
            self._rest()
        # The other ranks of a group whose one rank failed wait in a collective: they cannot be used again. Nor can a
        # sharded model whose parameters were gathered when it stopped.
        if outcome is Outcome.lost or self.sharded:
            self._died_with[group.index] = unit
            self._rebuild(group, error)
        else:
            self.losses.failed(group.index)
            group.state = State.idle
        if last:
            if on_given_up is None:
                if isinstance(error, InfscanError):
                    raise error
                raise RunError(f"given up after {self.cluster.max_attempts} attempts: {reason}") from error
            on_given_up(unit, reason)

    def _rest(self) -> None:
        """Storage in trouble is nobody's fault and passes: hand nothing out for a while, twice as long every time."""
        if time.monotonic() < self._rest_until:
            return
        pause = min(_LONGEST_REST_S, 2.0**self._troubles)
        self._troubles += 1
        self._rest_until = time.monotonic() + pause
        log.warning("storage has trouble; nothing is handed out for %g s", pause)

    def _rebuild(self, group: WorkerGroup, error: Exception) -> None:
        log.warning("worker %d is rebuilt: %s", group.index, _reason(error))
        self.losses.lost(group.index, _reason(error))
        group.rebuild()

    def forget(self) -> None:
        """Have idle ranks drop what a finished phase cached."""
        for group in self.groups:
            if group.state is State.idle:
                group.forget()

    def facts(self) -> list[list[RankFacts]]:
        """By worker and rank: parameters held and peak memory so far."""
        return [group.facts_now() for group in self.groups if group.state is State.idle]

    def trace(self, on: bool) -> list[list[Span]]:
        """By rank of worker 0, what it did since it was last asked; from now on it keeps that, or keeps nothing."""
        return self.groups[0].trace(on) if self.groups[0].state is State.idle else []

    def close(self) -> None:
        for group in self.groups:
            group.close()
        self.losses.closed()


def missing_room(cluster: ClusterConfig, gpus: float) -> str:
    """What a worker needs, and what the cluster's living nodes have."""
    rank = {"CPU": float(cluster.cpus_per_rank)} | ({"GPU": gpus} if gpus else {})
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    have = [{kind: resources.get(kind, 0.0) for kind in rank} for resources in alive]
    nodes = "; ".join(sorted(map(_amounts, have))) or "none"
    return (
        f"one needs {cluster.ranks_per_worker} x {{{_amounts(rank)}}} (cluster.placement={cluster.placement.value}), "
        f"and the nodes that are alive have in all {{{nodes}}}"
    )


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {amount:g}" for kind, amount in resources.items())


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    last = text[-1] if text else "no message"
    if isinstance(error, RayError):
        # What follows is a list of causes that there might be.
        last = last.partition(" Some common causes")[0]
    return f"{type(error).__name__}: {last}"
