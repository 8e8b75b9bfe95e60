"""Steps in this process, one unit after the other: for tests, studies and notebooks, and one machine without Ray."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from threading import Event
from typing import Any

import torch

from infscan.config import ClusterConfig, ModelConfig
from infscan.engine.attempts import LONGEST_BACK_OFF_S, give_up, is_transient, judge, reason_of, shrunk
from infscan.engine.executor import (
    DeviceNeed,
    MadeHere,
    OnDone,
    OnGivenUp,
    RankMemory,
    RunRecords,
    Step,
    TaskMap,
    finish_unit,
    left_of,
)
from infscan.engine.facts import ProcessBytes, RankFacts, facts_of
from infscan.engine.health import is_fault
from infscan.engine.schedule import Schedule
from infscan.errors import ConfigError, RunError
from infscan.model.loaded import RankContext
from infscan.model.out_of_memory import has_died
from infscan.model.worker import ModelWorker, Unwritten, WorkerSettings
from infscan.storage.host import resident_bytes, this_host
from infscan.telemetry import PhaseView, Telemetry

log = logging.getLogger("infscan")


class InProcessBackend:
    """One worker of one rank: this process, on its first GPU where it has one."""

    def __init__(self, cluster: ClusterConfig) -> None:
        if cluster.ranks_per_worker != 1:
            raise ConfigError(
                f"cluster.ranks_per_worker={cluster.ranks_per_worker}: one process holds one rank; use "
                "cluster.backend=ray, or cluster.ranks_per_worker=1."
            )
        self.cluster = cluster
        self.gpus = 1.0 if torch.cuda.is_available() and cluster.gpus_per_rank != 0 else 0.0
        self.gpu_memory = _gpu_memory() if self.gpus else None

    def executor(self, settings: WorkerSettings, telemetry: Telemetry, records: RunRecords) -> InProcessExecutor:
        device = "cuda:0" if self.gpus else "cpu"
        context = RankContext(device=device, threads=self.cluster.cpus_per_rank)
        return InProcessExecutor(settings, context, telemetry, records, max_attempts=self.cluster.max_attempts)


class ResidentBackend(InProcessBackend):
    """One worker whose model stays loaded from run to run; a run of another model loads its own."""

    _held: tuple[tuple[Any, ...], ModelWorker] | None = None

    def __init__(self, cluster: ClusterConfig) -> None:
        super().__init__(cluster)
        # Set where the process is to end now: whatever runs ends with its unit.
        self.ended = Event()

    def executor(self, settings: WorkerSettings, telemetry: Telemetry, records: RunRecords) -> InProcessExecutor:
        def check() -> None:
            if self.ended.is_set():
                raise RunError("this process was ended before the run was finished; run the same again.")
            records.check()

        made = super().executor(settings, telemetry, replace(records, check=check))
        key = (settings.model, settings.layers, settings.sharded, settings.identity)
        if self._held is None or self._held[0] != key:
            self._held = key, made.worker
        made._worker = self._held[1]
        return made


def _gpu_memory() -> RankMemory:
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return RankMemory(torch.cuda.get_device_properties(0).total_memory, host)


class InProcessExecutor:
    """An executor (`infscan.engine.executor.Executor`) whose only worker is this process."""

    def __init__(
        self,
        settings: WorkerSettings | None = None,
        context: RankContext | None = None,
        telemetry: Telemetry | None = None,
        records: RunRecords | None = None,
        *,
        max_attempts: int = 3,
    ) -> None:
        self._settings, self.context = settings, context or RankContext()
        self.telemetry, self.records = telemetry or Telemetry(), records or RunRecords()
        self.max_attempts = max_attempts
        self.oom_retries = 0
        self._worker: ModelWorker | None = None
        self._before, self._loaded_bytes = ProcessBytes(), 0
        self._ended: list[list[RankFacts]] = []
        # By a step's function: how often its micro-batches are halved for every unit.
        self._halvings: dict[Callable[..., Any], int] = {}
        self._needs: Mapping[str, DeviceNeed] = {}

    @classmethod
    def on(cls, worker: ModelWorker) -> InProcessExecutor:
        """An executor whose model is loaded already."""
        made = cls(context=worker.context)
        made._worker = worker
        return made

    @property
    def num_workers(self) -> int:
        return 1

    @property
    def settings(self) -> WorkerSettings:
        assert self._settings is not None, "this executor was made without a model"
        return self._settings

    @property
    def worker(self) -> ModelWorker:
        """The loaded model; loaded when it is first asked for."""
        if self._worker is None:
            with self.telemetry.phase("workers", 1, "workers") as phase:
                self._before = ProcessBytes.now(self.context.device)
                self._worker = ModelWorker(self.settings, self.context)
                self._loaded_bytes = resident_bytes()
                phase.advance()
            self.records.recovery.worker_started(0)
            if self.records.metrics.traced:
                self._worker.spans = []
        return self._worker

    def run(
        self,
        step: Step[Any],
        on_done: OnDone | None = None,
        on_given_up: OnGivenUp | None = None,
        shared: Sequence[Any] = (),
    ) -> Mapping[Any, str]:
        left = left_of(step)
        if not left:
            return {}
        self.records.metrics.done_before = len(step.units) - len(left)
        halvings = max(self._halvings.get(step.function, 0), self._forecast(step.name))
        schedule = Schedule(left, self.max_attempts, halvings)
        with self.telemetry.phase(step.name, len(left), step.unit_name) as phase:
            self.records.recovery.start_step()
            # The unit that is computed, and what it will have returned once it is written.
            computed: tuple[Any, Future[Any]] | None = None
            try:
                while (unit := schedule.take()) is not None or computed is not None:
                    self.records.check()
                    before = computed
                    computed = None
                    if unit is not None:
                        computed = self._attempt(step, schedule, unit, phase, on_done, on_given_up, shared)
                    if before is not None:
                        self._settle(step, schedule, *before, phase, on_done, on_given_up)
            finally:
                self.worker.behind.wait()
        self._halvings[step.function] = schedule.halvings
        return schedule.given_up

    def _forecast(self, name: str) -> int:
        """How often the step's micro-batches are to be halved for what its GPU has free."""
        need = self._needs.get(name)
        free = self._before.device_free if need and self.worker else None
        if need is None or free is None or not (halvings := need.halvings(free)):
            return 0
        self.telemetry.warn(need.said(name, free, "this process's GPU"))
        return halvings

    def _attempt(
        self,
        step: Step[Any],
        schedule: Schedule,
        unit: Any,
        phase: PhaseView,
        on_done: OnDone | None,
        on_given_up: OnGivenUp | None,
        shared: Sequence[Any],
    ) -> tuple[Any, Future[Any]] | None:
        """Returns the unit where its output is still to be written, and the result to come."""
        worker, recovery, metrics = self.worker, self.records.recovery, self.records.metrics
        retries, task = schedule.oom_retries.get(unit, 0), step.task(unit)
        recovery.unit_started(0, unit)
        metrics.unit_started(0, unit, schedule.attempt(unit))
        try:
            following = schedule.promise(0)
            reads = None if following is None else step.reads(following)
            worker.tell = phase.at_work
            behind = schedule.writes_behind(unit)
            result = worker.attempt(step.function, retries, task, *shared, following=reads, behind=behind)
        except Exception as error:
            self._failed(schedule, unit, error, on_given_up)
            return None
        if isinstance(result, Unwritten):
            metrics.unit_computed(0, unit)
            return unit, result.result
        self._succeed(step, schedule, unit, result, phase, on_done)
        return None

    def _settle(
        self,
        step: Step[Any],
        schedule: Schedule,
        unit: Any,
        written: Future[Any],
        phase: PhaseView,
        on_done: OnDone | None,
        on_given_up: OnGivenUp | None,
    ) -> None:
        """The end of a unit that was computed: once its output is in storage, or was not to be written."""
        try:
            result = written.result()
        except Exception as error:
            self._failed(schedule, unit, error, on_given_up)
            return
        self._succeed(step, schedule, unit, result, phase, on_done)

    def _succeed(
        self, step: Step[Any], schedule: Schedule, unit: Any, result: Any, phase: PhaseView, on_done: OnDone | None
    ) -> None:
        self._storage_failures = 0
        self.records.recovery.unit_finished(0, unit)
        self.records.metrics.unit_finished(0, unit, "done")
        schedule.succeed(unit)
        finish_unit(step, phase, on_done, unit, result)

    _storage_failures = 0

    def _failed(self, schedule: Schedule, unit: Any, error: Exception, on_given_up: OnGivenUp | None) -> None:
        reason, size = reason_of(error), schedule.halvings
        if is_fault(error) and has_died(self.worker.device):
            raise RunError(
                f"the GPU failed ({reason}), and this process can do nothing more on it. Run the same command again: "
                "it goes on from here; where that fails too, look at the GPU (nvidia-smi, Xid in the kernel's log)."
            ) from error
        verdict = judge(schedule, unit, error, reason)
        if schedule.halvings > size:
            self.telemetry.warn(shrunk(schedule.halvings))
        self.oom_retries += verdict.cause == "memory" and not verdict.given_up
        log.warning("unit %s: %s; %s", unit, reason, "given up" if verdict.given_up else "tried again")
        self.records.recovery.unit_failed(0, unit)
        self.records.metrics.unit_finished(0, unit, verdict.cause)
        if verdict.given_up:
            give_up(unit, error, reason, self.max_attempts, on_given_up)
        elif is_transient(error):
            pause = min(LONGEST_BACK_OFF_S, 2.0**self._storage_failures)
            self._storage_failures += 1
            log.warning("storage has trouble; nothing is done for %g s", pause)
            time.sleep(pause)

    def map_tasks(self, tasks: TaskMap[Any], on_done: OnDone | None = None) -> None:
        with self.telemetry.phase(tasks.name, len(tasks.items), tasks.unit_name) as phase:
            for item in tasks.items:
                self.records.check()
                result = None if tasks.is_done(item) else tasks.function(*tasks.arguments(item))
                finish_unit(tasks, phase, on_done, item, result)

    def share(self, value: Any) -> Any:
        return value

    def share_by_node(self, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], pieces: int) -> Any:
        return MadeHere(function, arguments)

    def reserve(self, host_bytes: int) -> None:
        """This process has what it has."""

    def fill(self, rank_bytes: int, share: int = 1) -> None:
        """This process is its only worker."""

    def expect(self, needs: Mapping[str, DeviceNeed]) -> None:
        self._needs = needs

    def change_model(self, model: ModelConfig) -> None:
        self._ended += self.facts()
        self.close()
        self._settings = replace(self.settings, model=model)

    def forget(self) -> None:
        if self._worker is not None:
            self._worker.forget()

    def facts(self) -> list[list[RankFacts]]:
        if self._worker is None:
            return list(self._ended)
        mine = facts_of(self._worker.model, this_host().name, str(os.getpid()), self._before, self._loaded_bytes)
        return [*self._ended, [mine]]

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            metrics = self.records.metrics
            if metrics.traced and self.settings.output is not None:
                metrics.write_trace(self.settings.output, [worker.spans or []])
            self.records.recovery.workers_closed()
