"""All worker groups of a run, and the loop that keeps them busy: the way every distributed phase is driven."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray

from infscan.config import ClusterConfig
from infscan.errors import ConfigError, FactorsError, InfscanError, ModelError, QueryError, RunError
from infscan.passes.rank import RankSettings
from infscan.runtime.group import Outcome, RankFacts, State, WorkerGroup
from infscan.runtime.schedule import Schedule

log = logging.getLogger(__name__)

# Errors that another attempt cannot mend: they end the phase at once.
_FATAL = (ConfigError, FactorsError, ModelError, QueryError)
_TICK_S = 0.5


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
    """The worker groups, started together; `run` gives them one phase's units."""

    def __init__(self, cluster: ClusterConfig, settings: RankSettings, gpus: float) -> None:
        self.cluster = cluster
        self._check_room(gpus)
        self.groups = [WorkerGroup(index, settings, cluster, gpus) for index in range(cluster.num_workers)]
        self.failed_starts = 0
        self.rebuilds = 0

    def wait_for_one(self) -> int:
        """Wait until a group has loaded its model; the others join when they are ready. Returns how many have.

        Raises:
            InfscanError: where the model cannot be loaded, or no group can be started.
        """
        while not any(group.state is State.idle for group in self.groups):
            self._wait()
            for group in self.groups:
                if group.state is State.starting and (answer := group.poll()) is not None:
                    self._started(group, *answer)
        return sum(group.state is State.idle for group in self.groups)

    def _check_room(self, gpus: float) -> None:
        ranks = self.cluster.ranks_per_worker
        have = ray.cluster_resources()
        for kind, need in (("CPU", float(ranks * self.cluster.cpus_per_rank)), ("GPU", ranks * gpus)):
            if need > have.get(kind, 0.0):
                log.warning(
                    "a worker of %d ranks needs %g %s and the cluster has %g; waiting up to cluster.startup_s=%g s",
                    ranks, need, kind, have.get(kind, 0.0), self.cluster.startup_s,
                )  # fmt: skip

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
            RunError: where a unit is given up and no `on_given_up` takes it, or where no group can be started.
            InfscanError: at once, where an error cannot be mended by another attempt.
        """
        schedule = Schedule(units, self.cluster.max_attempts)
        while not schedule.finished:
            for group in self.groups:
                if group.state is State.idle and (unit := schedule.take()) is not None:
                    group.submit(unit, function, task(unit), *shared)
            self._wait()
            for group in self.groups:
                if group.state is State.idle:
                    continue
                was, unit = group.state, group.unit
                answer = group.poll()
                if answer is None:
                    continue
                outcome, result = answer
                if was is State.starting:
                    self._started(group, outcome, result)
                    continue
                assert unit is not None
                if outcome is Outcome.done:
                    schedule.succeed(unit)
                    on_done(unit, result)
                    continue
                self._ended_badly(schedule, group, unit, outcome, result, on_given_up)
        return schedule.given_up

    def _wait(self) -> None:
        refs = [ref for group in self.groups if group.state is not State.idle for ref in group.running]
        if refs:
            ray.wait(refs, num_returns=1, timeout=_TICK_S, fetch_local=False)

    def _started(self, group: WorkerGroup, outcome: Outcome, result: Any) -> None:
        if outcome is Outcome.done:
            self.failed_starts = 0
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
        last = schedule.fail(unit, reason) if outcome is Outcome.failed else schedule.lose(unit, reason)
        log.warning("unit %d on worker %d: %s; %s", unit, group.index, reason, "given up" if last else "tried again")
        # The other ranks of a group whose one rank failed wait in a collective: they cannot be used again.
        if outcome is Outcome.lost or self.cluster.ranks_per_worker > 1:
            self._rebuild(group, error)
        else:
            group.state = State.idle
        if last:
            if on_given_up is None:
                if isinstance(error, InfscanError):
                    raise error
                raise RunError(f"given up after {self.cluster.max_attempts} attempts: {reason}") from error
            on_given_up(unit, reason)

    def _rebuild(self, group: WorkerGroup, error: Exception) -> None:
        log.warning("worker %d is rebuilt: %s", group.index, _reason(error))
        self.rebuilds += 1
        group.rebuild()

    def forget(self) -> None:
        """Have idle ranks drop what a finished phase cached."""
        for group in self.groups:
            if group.state is State.idle:
                group.forget()

    def facts(self) -> list[list[RankFacts]]:
        """By worker and rank: parameters held and peak memory so far."""
        return [group.facts_now() for group in self.groups if group.state is State.idle]

    def close(self) -> None:
        for group in self.groups:
            group.close()


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[-1] if text else 'no message'}"
