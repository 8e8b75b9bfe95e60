"""Steps on a Ray cluster: units on worker groups that outlive a step, work without a model in processes beside them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray

from infscan.config import ClusterConfig, ModelConfig
from infscan.engine.cluster import check_capacity, connect, gpu_memory, gpus_per_rank, workers_here
from infscan.engine.executor import (
    DeviceNeed,
    Load,
    OnDone,
    OnGivenUp,
    RunRecords,
    Step,
    TaskMap,
    finish_unit,
    fits,
    left_of,
)
from infscan.engine.facts import RankFacts
from infscan.engine.node_share import NodeShare
from infscan.engine.pool import Pool
from infscan.errors import RunError
from infscan.model.worker import WorkerSettings
from infscan.telemetry import Telemetry

log = logging.getLogger("infscan")

# A process that dies under a task is replaced so often.
_TASK_RETRIES = 3


class RayBackend:
    """A connected cluster that can hold a worker, or may grow until it can."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        connect(cluster)
        self.gpus = gpus_per_rank(cluster)
        self.gpu_memory = gpu_memory([node["Resources"] for node in ray.nodes() if node["Alive"]], self.gpus)
        check_capacity(cluster, self.gpus)

    def executor(self, settings: WorkerSettings, telemetry: Telemetry, records: RunRecords) -> RayExecutor:
        return RayExecutor(self.cluster, self.gpus, settings, telemetry, records)


class RayExecutor:
    """An executor (`infscan.engine.executor.Executor`) on a Ray cluster."""

    def __init__(
        self,
        cluster: ClusterConfig,
        gpus: float,
        settings: WorkerSettings,
        telemetry: Telemetry,
        records: RunRecords,
    ) -> None:
        self.cluster, self.gpus = cluster, gpus
        self.settings, self.telemetry, self.records = settings, telemetry, records
        self._pool: Pool | None = None
        # Of workers that ended for another model: what they said of themselves, and how often they ran out of memory.
        self._ended: list[list[RankFacts]] = []
        self._ended_oom_retries = 0
        self._needs: Mapping[str, DeviceNeed] = {}

    @property
    def num_workers(self) -> int:
        return self.cluster.num_workers or 1

    @property
    def oom_retries(self) -> int:
        return self._ended_oom_retries + (self._pool.oom_retries if self._pool else 0)

    @property
    def pool(self) -> Pool:
        """The worker groups; started when they are first asked for."""
        if self._pool is None:
            records, count = self.records, self.num_workers
            with self.telemetry.phase("workers", count, "workers") as phase:
                self._pool = Pool(
                    replace(self.cluster, num_workers=count),
                    self.settings,
                    self.gpus,
                    records.recovery,
                    records.check,
                    records.metrics,
                    records.announce,
                    self.telemetry.warn,
                )
                phase.advance(units=self._pool.wait_for_one())
                if records.metrics.traced:
                    self._pool.trace(True)
        return self._pool

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
        with self.telemetry.phase(step.name, len(left), step.unit_name) as phase:
            finished = partial(finish_unit, step, phase, on_done)
            pool, need = self.pool, self._needs.get(step.name)
            if need is not None:
                pool.forecasts[step.function] = (step.name, need)
            return pool.run(
                left, step.function, step.task, finished, *shared,
                on_given_up=on_given_up, reads=step.reads, at_work=phase.at_work,
            )  # fmt: skip

    def map_tasks(self, tasks: TaskMap[Any], on_done: OnDone | None = None) -> None:
        """As many items at once as the cluster's cores and memory are enough for.

        Raises:
            RunError: where an item's process dies or is killed again and again, saying what it took.
        """
        remote: Any = ray.remote(num_cpus=tasks.cores, max_retries=_TASK_RETRIES, scheduling_strategy="SPREAD")
        function = remote(tasks.function)
        there_is = ray.cluster_resources()
        whole = Load(max(1, int(there_is.get("CPU", 1))), int(there_is.get("memory", 0)))
        done = [tasks.is_done(item) for item in tasks.items]
        waiting = [item for item, there in zip(tasks.items, done, strict=True) if not there][::-1]
        running: dict[ray.ObjectRef, Any] = {}
        with self.telemetry.phase(tasks.name, len(tasks.items), tasks.unit_name) as phase:
            finished = partial(finish_unit, tasks, phase, on_done)
            for item, there in zip(tasks.items, done, strict=True):
                if there:
                    finished(item, None)
            while waiting or running:
                self.records.check()
                while waiting and fits(map(tasks.load, running.values()), tasks.load(waiting[-1]), whole):
                    item = waiting.pop()
                    running[function.remote(*tasks.arguments(item))] = item
                for ref in ray.wait(list(running))[0]:
                    item = running.pop(ref)
                    finished(item, _result(ref, tasks, item))

    def share(self, value: Any) -> Any:
        # numpy arrays, not tensors: Ray hands them to every rank of a node without a copy.
        return ray.put(value)

    def share_by_node(self, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...], pieces: int) -> Any:
        return NodeShare(function, arguments, pieces)

    def reserve(self, host_bytes: int) -> None:
        self.settings = replace(self.settings, host_bytes=host_bytes)

    def fill(self, rank_bytes: int, share: int = 1) -> None:
        if self.cluster.num_workers is None:
            count, said = workers_here(self.cluster, self.gpus, rank_bytes, share)
            log.info("workers     %s", said)
            self.cluster = replace(self.cluster, num_workers=count)

    def expect(self, needs: Mapping[str, DeviceNeed]) -> None:
        self._needs = needs

    def change_model(self, model: ModelConfig) -> None:
        self._ended, self._ended_oom_retries = self.facts(), self.oom_retries
        self.close()
        self.settings = replace(self.settings, model=model)

    def forget(self) -> None:
        if self._pool is not None:
            self._pool.forget()

    def facts(self) -> list[list[RankFacts]]:
        return [*self._ended, *(self._pool.facts() if self._pool else [])]

    def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            metrics = self.records.metrics
            if metrics.traced and self.settings.output is not None:
                metrics.write_trace(self.settings.output, pool.trace(False))
            pool.close()


def _result(ref: ray.ObjectRef, tasks: TaskMap[Any], item: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError, ray.exceptions.NodeDiedError) as error:
        needs = tasks.load(item).bytes
        fix = f" (it holds up to {needs / 2**30:.1f} GiB; factors.blocks=2 quarters that)" if needs else ""
        what = "was killed for its memory" if isinstance(error, ray.exceptions.OutOfMemoryError) else "died"
        raise RunError(
            f"{tasks.name} of {getattr(item, 'name', item)}: its process {what}, {_TASK_RETRIES + 1} times; give its "
            f"node more memory{fix}, and run again: what is finished is kept."
        ) from None
