"""All worker groups of a run, and the loop that keeps them busy: how every step's units are run on Ray."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import OutOfMemoryError, RayError

from infscan.config import ClusterConfig
from infscan.corpus.read_ahead import Reads
from infscan.engine.attempts import (
    LONGEST_BACK_OFF_S,
    NotMadeError,
    OnGivenUp,
    Verdict,
    give_up,
    is_transient,
    judge,
    reason_of,
    shrunk,
)
from infscan.engine.executor import DeviceNeed
from infscan.engine.facts import RankFacts
from infscan.engine.health import STRIKES, Health, is_fault
from infscan.engine.metrics import RunMetrics
from infscan.engine.node_share import NodeShare
from infscan.engine.placing import Placing
from infscan.engine.recovery import RecoveryLog
from infscan.engine.schedule import Schedule
from infscan.engine.stragglers import UnitTimes
from infscan.engine.worker_group import Outcome, State, WorkerGroup, first_answers
from infscan.errors import InfscanError, RunError
from infscan.model.out_of_memory import RankMemoryError
from infscan.model.worker import Span, WorkerSettings
from infscan.storage import storage_faults
from infscan.storage.retry import RetryPolicy

log = logging.getLogger(__name__)

_TICK_S = 0.5
_RECORD_S = 1.0


@dataclass
class Attempt:
    """A worker's attempt at a unit of the step with this function."""

    unit: Any
    function: Callable[..., Any]
    # When it was handed out, and how often its micro-batches are halved.
    handed_at: float
    halved: int
    # Whether another worker finished the unit first.
    late: bool = False


class Pool:
    """The worker groups, started together; `run` gives them one step's units.

    check: called at every turn of the loop; what it raises ends the step (a driver that lost its lease).

    A worker is at two units at most: one that is computed, and the one before, whose output is written meanwhile. Each
    ends by itself; where the worker is lost, both wait again.

    What a finished unit costs this process does not grow with the number of workers: a turn of the loop looks at those
    that answered, and at all of them once in `_TICK_S` for what no answer tells (silence, deadlines).
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        settings: WorkerSettings,
        gpus: float,
        recovery: RecoveryLog,
        check: Callable[[], None] = lambda: None,
        metrics: RunMetrics | None = None,
        announce: Callable[[str], None] = lambda state: None,
        warn: Callable[[str], None] = log.warning,
    ) -> None:
        self.cluster, self.gpus, self.recovery, self.check = cluster, gpus, recovery, check
        self.warn = warn
        self.placing = Placing(cluster, gpus, settings.host_bytes, announce)
        self.metrics = metrics or RunMetrics("")
        self.sharded = settings.sharded
        self.groups = [self.new_group(index, settings) for index in range(cluster.num_workers or 1)]
        # When all groups are looked at next.
        self._look_at = 0.0
        self.failed_starts = 0
        self.oom_retries = 0
        # When states are recorded next.
        self._record_at = 0.0
        # Until when nothing is handed out, and how many attempts in a row failed of storage.
        self._back_off_until, self._storage_failures = 0.0, 0
        # By host: processes that its kernel had killed for memory when last heard of. By group: the unit it died with.
        self._oom_kills: dict[str, int] = {}
        self._died_with: dict[int, Any] = {}
        self.health = Health()
        # By group: what it computes, and what it writes.
        self._computing: dict[int, Attempt] = {}
        self._writing: dict[int, Attempt] = {}
        # How often a group's micro-batches are halved for what others hold of its GPU.
        self._short: dict[int, int] = {}
        # What was said of forecasts: of which group, for which step.
        self._told: set[tuple[int, Callable[..., Any]]] = set()
        # By a step's function: how often its micro-batches are halved for every unit.
        self._halvings: dict[Callable[..., Any], int] = {}
        # By a step's function: its name, and what it is forecast to hold on a GPU.
        self.forecasts: dict[Callable[..., Any], tuple[str, DeviceNeed]] = {}

    def new_group(self, index: int, settings: WorkerSettings) -> WorkerGroup:
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
        units: Iterable[Any],
        function: Callable[..., Any],
        task: Callable[[Any], Any],
        on_done: Callable[[Any, Any], None],
        *shared: Any,
        on_given_up: OnGivenUp | None = None,
        reads: Callable[[Any], Reads | None] = lambda unit: None,
        at_work: Callable[[float], None] | None = None,
    ) -> Mapping[Any, str]:
        """Run function(worker, task(unit), *shared) for every unit; the tasks are made when they are handed out.

        reads: what a unit reads; a worker reads its next one's meanwhile.
        at_work: told how many units' worth is done of those that run, once in `_TICK_S` at most.
        on_done(unit, result of rank 0) and on_given_up(unit, reason) are called in this process as units end.
        Returns the units given up, with reasons.

        Raises:
            RunError: where a unit is given up and no `on_given_up` takes it, where one sequence does not fit a rank's
                memory, or where no group can be started or placed.
            InfscanError: at once, where an error cannot be fixed by another attempt.
        """
        schedule = Schedule(units, self.cluster.max_attempts, self._halvings.get(function, 0))
        times = UnitTimes()

        def submit(group: WorkerGroup, unit: Any) -> None:
            short = max(self._short.get(group.index, 0), self._forecast(group, function))
            halvings = max(schedule.oom_retries.get(unit, 0), short)
            group.unit_limit_s = self.recovery.limit_s(self.cluster.deadline_s, _shortest_limit_s())
            following = schedule.promise(group.index)
            ahead = None if following is None else reads(following)
            behind = schedule.writes_behind(unit)
            group.submit(unit, function, task(unit), *shared, oom_retries=halvings, following=ahead, behind=behind)
            self._computing[group.index] = Attempt(unit, function, time.monotonic(), halvings)
            self.recovery.unit_started(group.index, unit)
            self.metrics.unit_started(group.index, unit, schedule.attempt(unit))

        def hand_out(group: WorkerGroup) -> None:
            if group.state is not State.idle or time.monotonic() < self._back_off_until:
                return
            if (unit := schedule.take(group.index)) is not None:
                submit(group, unit)

        def ended(group: WorkerGroup, outcome: Outcome, result: Any, of: dict[int, Attempt]) -> None:
            """What a group computed, or wrote, came to an end; or the group was lost, whatever it was at."""
            if outcome is Outcome.lost:
                self._lost(schedule, group, result, on_given_up)
                return
            attempt = of.pop(group.index)
            if attempt.late:
                self._came_late(group, attempt, outcome, result, function, written=of is self._writing)
            elif outcome is Outcome.done:
                self._storage_failures = self.failed_starts = 0
                self.health.well(group.index)
                times.add(time.monotonic() - attempt.handed_at)
                self.recovery.unit_finished(group.index, attempt.unit)
                self.metrics.unit_finished(group.index, attempt.unit, "done")
                for other in self._attempts():
                    other.late |= other.unit == attempt.unit
                schedule.succeed(attempt.unit)
                on_done(attempt.unit, result)
            else:
                self._failed(schedule, group, attempt, result, on_given_up, shared, written=of is self._writing)

        self._died_with.clear()
        self.recovery.start_step()
        while not schedule.finished:
            for group in self.groups:
                hand_out(group)
            for group, unit in self._late_units(schedule, times):
                submit(group, unit)
            self._record_states(schedule)
            if at_work is not None and time.monotonic() >= self._look_at:
                at_work(self._share_done())
            for group in self.wait():
                if (answer := group.poll_written()) is not None:
                    ended(group, *answer, of=self._writing)
                was = group.state
                if (answer := group.poll()) is None:
                    continue
                outcome, result = answer
                if was is State.starting:
                    self._started(group, outcome, result, schedule)
                elif outcome is Outcome.computed:
                    self._is_computed(group, function)
                else:
                    ended(group, outcome, result, of=self._computing)
                # Not when all have been heard: where a thousand answered, the first would wait for them.
                hand_out(group)
        self._halvings[function] = schedule.halvings
        self._record_states(schedule)
        return schedule.given_up

    def _forecast(self, group: WorkerGroup, function: Callable[..., Any]) -> int:
        """How often a step's micro-batches are to be halved for what a group's GPUs had free before its model."""
        free = [facts.device_free_bytes for facts in group.facts if facts.device_free_bytes is not None]
        if not free or function not in self.forecasts:
            return 0
        name, need = self.forecasts[function]
        halvings = need.halvings(min(free))
        if halvings and (group.index, function) not in self._told:
            self._told.add((group.index, function))
            self.warn(need.said(name, min(free), f"a GPU of worker {group.index}"))
        return halvings

    def _attempts(self) -> list[Attempt]:
        """What all groups are at: units that they compute, and those that they write."""
        return [*self._computing.values(), *self._writing.values()]

    def _share_done(self) -> float:
        """How many units' worth is done of those of this step that are not done yet."""
        at_work = (self.groups[index] for index, attempt in self._computing.items() if not attempt.late)
        written = sum(not attempt.late for attempt in self._writing.values())
        return written + sum(group.heartbeats.share for group in at_work)

    def _late_units(self, schedule: Schedule, times: UnitTimes) -> list[tuple[WorkerGroup, Any]]:
        """Idle groups, and the units that they try as well: those that are late, the latest first, once each."""
        now, limit_s = time.monotonic(), times.late_after_s
        idle = [group for group in self.groups if group.state is State.idle and group.index not in self._writing]
        if schedule.any_waits or not idle or now < self._back_off_until:
            return []
        alone = [
            (index, attempt)
            for of in (self._computing, self._writing)
            for index, attempt in of.items()
            if not attempt.late and not schedule.copies.get(attempt.unit)
        ]
        late = [(index, attempt) for index, attempt in alone if now - attempt.handed_at > limit_s]
        late.sort(key=lambda found: found[1].handed_at)
        found = []
        for group, (index, slow) in zip(idle, late, strict=False):
            log.warning(
                "unit %s has been with worker %d for %.0f s, and they usually take %.0f s: worker %d tries it too",
                slow.unit, index, now - slow.handed_at, times.usual_s, group.index,
            )  # fmt: skip
            schedule.take_again(slow.unit)
            self.recovery.reissued += 1
            found.append((group, slow.unit))
        return found

    def _is_computed(self, group: WorkerGroup, function: Callable[..., Any]) -> None:
        """A group is free for another unit while what it computed is written. function: the step's."""
        attempt = self._writing[group.index] = self._computing.pop(group.index)
        self.health.well(group.index)
        self.metrics.unit_computed(group.index, attempt.unit)
        if attempt.function is not function:
            # It was at work when the others dropped what that step had cached.
            group.forget()

    def _came_late(
        self,
        group: WorkerGroup,
        attempt: Attempt,
        outcome: Outcome,
        result: Any,
        function: Callable[..., Any],
        *,
        written: bool,
    ) -> None:
        """An attempt at a unit that another group finished first has ended, in this step or a later one."""
        self.metrics.unit_finished(group.index, attempt.unit, "late")
        if outcome is Outcome.failed and not written and (self.sharded or (self.gpus and is_fault(result))):
            self._rebuild(group, result)
            return
        self.recovery.unit_failed(group.index, attempt.unit)
        if written:
            return
        if outcome is Outcome.failed:
            group.state = State.idle
        elif attempt.function is not function:
            # As in `_is_computed`.
            group.forget()

    def _record_states(self, schedule: Schedule) -> None:
        """Record what is in which state, at most once a second and at the step's end."""
        if not self.metrics.metrics or (time.monotonic() < self._record_at and not schedule.finished):
            return
        self._record_at = time.monotonic() + _RECORD_S
        workers = Counter(group.state.name for group in self.groups)
        faults = sum((group.heartbeats.faults for group in self.groups), Counter(storage_faults()))
        self.metrics.record_states(schedule.states, {state.name: workers[state.name] for state in State}, faults)

    def wait(self) -> list[WorkerGroup]:
        """Wait until a rank answers, a tick at most. Returns the groups to look at."""
        self.check()
        self.placing.check(self.groups)
        asked = {ref: group for group in self.groups for ref in group.pending}
        answered = self.answers(list(asked), _TICK_S)
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _TICK_S
            return self.groups
        return list({group.index: group for group in map(asked.__getitem__, answered)}.values())

    def _started(self, group: WorkerGroup, outcome: Outcome, result: Any, schedule: Schedule | None = None) -> None:
        if outcome is Outcome.done:
            self.failed_starts = 0
            self.recovery.worker_started(group.index)
            if group.facts:
                self.health.started_on(group.index, group.facts[0].node)
            self._shrink_after_oom_kill(group, schedule)
            return
        if isinstance(result, InfscanError):
            raise result
        self.failed_starts += 1
        if self.failed_starts >= self.cluster.max_attempts * len(self.groups):
            raise RunError(
                f"no worker group could be started in {self.failed_starts} attempts; the last one said: "
                f"{_reason(result)}. Look at the Ray logs, at cluster.* and at the memory a rank has."
            )
        self._rebuild(group, result, struck=is_fault(result))

    def _shrink_after_oom_kill(self, group: WorkerGroup, schedule: Schedule | None) -> None:
        """Halve the unit that a group died with, if its host's kernel killed for memory meanwhile.

        A killed rank says nothing of the reason; its host's counter does, once the group is there again.
        """
        killed = False
        for facts in group.facts:
            known = self._oom_kills.get(facts.host)
            killed |= known is not None and facts.oom_kills > known
            self._oom_kills[facts.host] = facts.oom_kills
        unit = self._died_with.pop(group.index, None)
        if killed:
            self.health.well(group.index)
        if killed and schedule is not None and unit is not None:
            log.warning("unit %s: the kernel killed a process of its worker for memory; micro-batches are halved", unit)
            self.oom_retries += schedule.allow_smaller(unit)

    def _failed(
        self,
        schedule: Schedule,
        group: WorkerGroup,
        attempt: Attempt,
        error: Exception,
        on_given_up: OnGivenUp | None,
        shared: Sequence[Any],
        *,
        written: bool,
    ) -> None:
        """A unit went wrong as it was computed, or written: then the group goes on with the one that it computes."""
        # A GPU's process is not to be trusted after an error that is neither its memory's nor a person's. Where it is
        # the only one, there is no other to tell the unit's fault from the machine's. No GPU takes part in writing.
        fault = self.gpus > 0 and not written and is_fault(error)
        lost = fault and len(self._used()) > 1
        verdict = self._judge(schedule, group, attempt, error, lost=lost, worker=group.index)
        if isinstance(error, NotMadeError):
            self._make_again(shared, group, error)
        if isinstance(error, RankMemoryError) and error.foreign:
            self._short[group.index] = attempt.halved + 1
        if not lost and is_transient(error):
            self._back_off()
        # The other ranks of a group whose one rank failed wait in a collective: they cannot be used again. Nor can a
        # sharded model whose parameters were gathered when it stopped.
        if not written and (fault or self.sharded):
            self._died_with[group.index] = attempt.unit
            self._rebuild(group, error, attempt.unit, struck=fault, schedule=schedule)
        else:
            self.recovery.unit_failed(group.index, attempt.unit)
            if not written:
                group.state = State.idle
        if verdict.given_up:
            give_up(attempt.unit, error, _reason(error), self.cluster.max_attempts, on_given_up)

    def _lost(self, schedule: Schedule, group: WorkerGroup, error: Exception, on_given_up: OnGivenUp | None) -> None:
        """A group died or fell silent: what it computed waits again, and so does what it had not written yet."""
        killed = isinstance(error, OutOfMemoryError)
        computing, writing = self._computing.pop(group.index, None), self._writing.pop(group.index, None)
        # What was computed is taken for the reason; what was written, where nothing was.
        blamed = computing or writing
        given_up = []
        for attempt in (writing, computing):
            if attempt is None:
                continue
            if attempt.late:
                self.metrics.unit_finished(group.index, attempt.unit, "late")
                continue
            worker = group.index if attempt is blamed else None
            kill = killed and attempt is blamed
            if self._judge(schedule, group, attempt, error, lost=True, killed=kill, worker=worker).given_up:
                given_up.append(attempt.unit)
        at = blamed.unit if blamed and not blamed.late else None
        if at is not None:
            self._died_with[group.index] = at
        struck = computing is not None and not computing.late and self.gpus > 0 and not killed and is_fault(error)
        self._rebuild(group, error, at, struck=struck, schedule=schedule)
        for unit in given_up:
            give_up(unit, error, _reason(error), self.cluster.max_attempts, on_given_up)

    def _judge(
        self,
        schedule: Schedule,
        group: WorkerGroup,
        attempt: Attempt,
        error: Exception,
        *,
        lost: bool,
        killed: bool = False,
        worker: int | None,
    ) -> Verdict:
        """Record what an attempt failed of, and say so."""
        size, unit, reason = schedule.halvings, attempt.unit, _reason(error)
        verdict = judge(schedule, unit, error, reason, lost=lost, killed=killed, worker=worker)
        if schedule.halvings > size:
            self.warn(shrunk(schedule.halvings))
        self.oom_retries += verdict.cause == "memory" and not verdict.given_up
        facts = self.metrics.facts(group.index, unit, schedule.attempt(unit))
        what = "given up" if verdict.given_up else "tried again"
        log.warning("unit %s on worker %d: %s; %s", unit, group.index, reason, what, extra=facts)
        self.metrics.unit_finished(group.index, unit, verdict.cause)
        return verdict

    def _make_again(self, shared: Sequence[Any], group: WorkerGroup, error: NotMadeError) -> None:
        for one in shared:
            if isinstance(one, NodeShare):
                for node in {facts.node for facts in group.facts}:
                    one.failed_on(node, error)

    def _back_off(self) -> None:
        """Back off exponentially on transient storage errors; they are not charged to the unit."""
        if time.monotonic() < self._back_off_until:
            return
        pause = min(LONGEST_BACK_OFF_S, 2.0**self._storage_failures)
        self._storage_failures += 1
        self._back_off_until = time.monotonic() + pause
        log.warning("storage has trouble; nothing is handed out for %g s", pause)

    def _rebuild(
        self,
        group: WorkerGroup,
        error: Exception,
        unit: Any | None = None,
        *,
        struck: bool = False,
        schedule: Schedule | None = None,
    ) -> None:
        """New ranks in the group's place; or none, where a GPU failed too often in a row.

        struck: it failed at its start, or at `unit`, and its machine may be the reason.
        """
        reason = _reason(error)
        self.recovery.worker_lost(group.index, reason)
        if struck and self.gpus:
            self.health.strike(group.index, unit)
            others = [other.index for other in self._used() if other is not group]
            if self.health.is_sick(group.index, others):
                self._retire(group, reason, schedule)
                return
        log.warning("worker %d is rebuilt: %s", group.index, reason)
        group.rebuild()

    def _used(self) -> list[WorkerGroup]:
        return [group for group in self.groups if group.state is not State.retired]

    def _retire(self, group: WorkerGroup, reason: str, schedule: Schedule | None) -> None:
        """Use a group no more. Its place stays taken, so that nothing else is put on its GPU.

        Raises:
            RunError: where it was the last one.
        """
        where = f" on {group.facts[0].host}" if group.facts else ""
        self.recovery.worker_retired(group.index, group.facts[0].host if group.facts else None, reason)
        group.retire()
        if schedule is not None:
            schedule.acquit(group.index)
        said = (
            f"worker {group.index}{where} is retired: it failed {STRIKES} times in a row without finishing a unit, "
            f"though it was rebuilt after each; the last time it said: {reason}. Look at its GPU (nvidia-smi, Xid in "
            "the kernel's log)."
        )
        self.warn(said)
        if not self._used():
            raise RunError(
                f"no worker is left: {said} Run the same command again where the GPUs are well: it goes on from here."
            )

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
        self.recovery.workers_closed()


def _shortest_limit_s() -> float:
    """What a unit may always take: storage that is out of reach is waited for, and says nothing of the unit."""
    policy = RetryPolicy.from_environment()
    return 60.0 + 2 * (policy.retry_s + policy.attempt_s())


def _reason(error: BaseException) -> str:
    reason = reason_of(error)
    # What follows is a list of causes that there might be.
    return reason.partition(" Some common causes")[0] if isinstance(error, RayError) else reason
