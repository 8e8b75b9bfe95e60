"""All worker groups of a run, and the loop that keeps them busy: how every step's units are run on Ray."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ray.exceptions import OutOfMemoryError, RayError

from infscan.config import ClusterConfig
from infscan.engine.attempts import LONGEST_BACK_OFF_S, OnGivenUp, give_up, is_transient, judge, reason_of
from infscan.engine.cluster import missing_capacity
from infscan.engine.facts import RankFacts
from infscan.engine.metrics import RunMetrics
from infscan.engine.recovery import RecoveryLog
from infscan.engine.schedule import Schedule
from infscan.engine.worker_group import Outcome, State, WorkerGroup, first_answers
from infscan.errors import InfscanError, RunError
from infscan.model.worker import Span, WorkerSettings
from infscan.storage import storage_faults
from infscan.storage.retry import RetryPolicy

log = logging.getLogger(__name__)

# Every start waits for its placement for a moment; one that waits longer says so.
_ANNOUNCED_AFTER_S = 5.0
_TICK_S = 0.5
_RECORD_S = 1.0


class Pool:
    """The worker groups, started together; `run` gives them one step's units.

    check: called at every turn of the loop; what it raises ends the step (a driver that lost its lease).

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
    ) -> None:
        self.cluster, self.gpus, self.recovery, self.check = cluster, gpus, recovery, check
        self.announce, self.host_bytes = announce, settings.host_bytes
        self.metrics = metrics or RunMetrics("")
        self.sharded = settings.sharded
        self.groups = [self.new_group(index, settings) for index in range(cluster.num_workers)]
        # When all groups are looked at next.
        self._look_at = 0.0
        self.failed_starts = 0
        self.oom_retries = 0
        # When states are recorded next.
        self._record_at = 0.0
        # Until when nothing is handed out, and how many attempts in a row failed of storage.
        self._back_off_until, self._storage_failures = 0.0, 0
        # Since when no group is placed.
        self._unplaced_since: float | None = None
        # By host: processes that its kernel had killed for memory when last heard of. By group: the unit it died with.
        self._oom_kills: dict[str, int] = {}
        self._died_with: dict[int, Any] = {}

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
    ) -> Mapping[Any, str]:
        """Run function(worker, task(unit), *shared) for every unit; the tasks are made when they are handed out.

        on_done(unit, result of rank 0) and on_given_up(unit, reason) are called in this process as units end.
        Returns the units given up, with reasons.

        Raises:
            RunError: where a unit is given up and no `on_given_up` takes it, where one sequence does not fit a rank's
                memory, or where no group can be started or placed.
            InfscanError: at once, where an error cannot be fixed by another attempt.
        """
        schedule = Schedule(units, self.cluster.max_attempts)

        def hand_out(group: WorkerGroup) -> None:
            if group.state is not State.idle or time.monotonic() < self._back_off_until:
                return
            if (unit := schedule.take()) is not None:
                group.unit_limit_s = self.recovery.limit_s(self.cluster.deadline_s, _shortest_limit_s())
                group.submit(unit, function, task(unit), *shared, oom_retries=schedule.oom_retries.get(unit, 0))
                self.recovery.unit_started(group.index)
                self.metrics.unit_started(group.index, unit, schedule.attempt(unit))

        self._died_with.clear()
        self.recovery.start_step()
        while not schedule.finished:
            for group in self.groups:
                hand_out(group)
            self._record_states(schedule)
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
                    self._storage_failures = 0
                    self.recovery.unit_finished(group.index)
                    self.metrics.unit_finished(group.index, "done")
                    schedule.succeed(unit)
                    on_done(unit, result)
                else:
                    self._attempt_failed(schedule, group, unit, outcome, result, on_given_up)
                # Not when all have been heard: where a thousand answered, the first would wait for them.
                hand_out(group)
        self._record_states(schedule)
        return schedule.given_up

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
        self._check_placement()
        asked = {ref: group for group in self.groups if group.state is not State.idle for ref in group.running}
        answered = self.answers(list(asked), _TICK_S)
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _TICK_S
            return self.groups
        return list({group.index: group for group in map(asked.__getitem__, answered)}.values())

    def _check_placement(self) -> None:
        """Raise where for cluster.placement_timeout_s there was no room for a single group."""
        if any(group.state is not State.starting or group.is_placed() for group in self.groups):
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

    def _started(self, group: WorkerGroup, outcome: Outcome, result: Any, schedule: Schedule | None = None) -> None:
        if outcome is Outcome.done:
            self.failed_starts = 0
            self.recovery.worker_started(group.index)
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
        self._rebuild(group, result)

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
        if killed and schedule is not None and unit is not None:
            log.warning("unit %s: the kernel killed a process of its worker for memory; micro-batches are halved", unit)
            self.oom_retries += schedule.allow_smaller(unit)

    def _attempt_failed(
        self,
        schedule: Schedule,
        group: WorkerGroup,
        unit: Any,
        outcome: Outcome,
        error: Exception,
        on_given_up: OnGivenUp | None,
    ) -> None:
        reason, lost = _reason(error), outcome is Outcome.lost
        killed = isinstance(error, OutOfMemoryError)
        verdict = judge(schedule, unit, error, reason, lost=lost, killed=killed, worker=group.index)
        self.oom_retries += verdict.cause == "memory" and not verdict.given_up
        facts = self.metrics.facts(group.index, unit, schedule.attempt(unit) - 1)
        what = "given up" if verdict.given_up else "tried again"
        log.warning("unit %s on worker %d: %s; %s", unit, group.index, reason, what, extra=facts)
        self.metrics.unit_finished(group.index, verdict.cause)
        if not lost and is_transient(error):
            self._back_off()
        # The other ranks of a group whose one rank failed wait in a collective: they cannot be used again. Nor can a
        # sharded model whose parameters were gathered when it stopped.
        if lost or self.sharded:
            self._died_with[group.index] = unit
            self._rebuild(group, error)
        else:
            self.recovery.unit_failed(group.index)
            group.state = State.idle
        if verdict.given_up:
            give_up(unit, error, reason, self.cluster.max_attempts, on_given_up)

    def _back_off(self) -> None:
        """Back off exponentially on transient storage errors; they are not charged to the unit."""
        if time.monotonic() < self._back_off_until:
            return
        pause = min(LONGEST_BACK_OFF_S, 2.0**self._storage_failures)
        self._storage_failures += 1
        self._back_off_until = time.monotonic() + pause
        log.warning("storage has trouble; nothing is handed out for %g s", pause)

    def _rebuild(self, group: WorkerGroup, error: Exception) -> None:
        log.warning("worker %d is rebuilt: %s", group.index, _reason(error))
        self.recovery.worker_lost(group.index, _reason(error))
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
        self.recovery.workers_closed()


def _shortest_limit_s() -> float:
    """What a unit may always take: storage that is out of reach is waited for, and says nothing of the unit."""
    policy = RetryPolicy.from_environment()
    return 60.0 + 2 * (policy.retry_s + policy.attempt_s())


def _reason(error: BaseException) -> str:
    reason = reason_of(error)
    # What follows is a list of causes that there might be.
    return reason.partition(" Some common causes")[0] if isinstance(error, RayError) else reason
