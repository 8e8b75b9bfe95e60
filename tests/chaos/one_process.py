"""The main job without Ray: the driver's own code and the ranks' own code in this process, one after the other.

The pool's loop, its scheduler and every step are the real ones. In the place of Ray stand a worker group that does its
unit when it is asked for the outcome, and a loop over tasks without a model. A rank's model is loaded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from infscan.config import ClusterConfig, Config
from infscan.corpus.read_ahead import ReadAhead, Reads
from infscan.engine import pool as pool_module
from infscan.engine.executor import MadeHere, OnDone, RunRecords, TaskMap, finish_unit
from infscan.engine.metrics import RunMetrics
from infscan.engine.ray_executor import RayExecutor
from infscan.engine.worker_group import Outcome, State
from infscan.model.architecture import describe
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, Unwritten, WorkerSettings
from infscan.steps import run
from infscan.storage.write_behind import WriteBehind
from infscan.telemetry import Telemetry

T = TypeVar("T")
# Of a task between passes, as Ray has it.
_TASK_ATTEMPTS = 4


class RankKilled(BaseException):
    """The process of a rank is gone: no code may take it for an error."""


class _At:
    """Whether a rank's code is at work now, or the driver's."""

    rank = False


def on_rank() -> bool:
    return _At.rank


def _as_rank(work: Callable[[], T]) -> T:
    before, _At.rank = _At.rank, True
    try:
        return work()
    finally:
        _At.rank = before


def _as_task(work: Callable[[], T]) -> T:
    for last in (False,) * (_TASK_ATTEMPTS - 1) + (True,):
        try:
            return _as_rank(work)
        except RankKilled:
            if last:
                raise
    raise AssertionError("the last attempt returns or raises")


class Deferred(Future[Any]):
    """What is written when it is first asked for: after the next unit was handed out, in the same order each time."""

    def __init__(self, write: Callable[[], Any]) -> None:
        super().__init__()
        self._write: Callable[[], Any] | None = write

    def exception(self, timeout: float | None = None) -> BaseException | None:
        write, self._write = self._write, None
        if write is not None:
            try:
                self.set_result(_as_rank(write))
            except BaseException as error:
                self.set_exception(error)
        return super().exception(timeout)

    def result(self, timeout: float | None = None) -> Any:
        self.exception()
        return super().result(timeout)


class HereGroup:
    """A worker group of one rank in this process, with the interface that the pool knows."""

    _ranks: dict[str, ModelWorker] = {}  # noqa: RUF012 - by settings, for all groups

    def __init__(self, index: int, settings: WorkerSettings, cluster: ClusterConfig, gpus: float) -> None:
        self.index, self.settings = index, settings
        self.running: list[object] = []
        self.facts: list[Any] = []
        # Told to those who watch, where another test has left a Ray in this process.
        self.heartbeats = SimpleNamespace(faults=Counter[str](), share=0.0)
        self.start()

    def start(self) -> None:
        self.state, self.unit = State.starting, None
        self.writing: Future[Any] | None = None
        key = repr(self.settings)
        if key not in self._ranks:
            self._ranks[key] = ModelWorker(self.settings, RankContext())
        self.rank = self._ranks[key]
        self.rank.forget()
        # A process that died has taken with it what it had not written.
        self.rank.behind = WriteBehind()

    def is_placed(self) -> bool:
        return True

    def submit(
        self,
        unit: int,
        function: Callable[..., Any],
        *arguments: Any,
        oom_retries: int = 0,
        following: Reads | None,
        behind: bool,
    ) -> None:
        assert self.state is State.idle
        self.state, self.unit, self.step = (
            State.busy,
            unit,
            lambda: self.rank.attempt(function, oom_retries, *arguments, following=following, behind=behind),
        )

    def poll_written(self) -> tuple[Outcome, Any] | None:
        """What was computed is written once the next unit is handed out, or none is."""
        if self.writing is None:
            return None
        written, self.writing = self.writing, None
        try:
            return Outcome.done, written.result()
        except RankKilled:
            return Outcome.lost, ConnectionError("the rank was killed")
        except Exception as error:
            return Outcome.failed, error

    def poll(self) -> tuple[Outcome, Any] | None:
        if self.state is State.idle:
            return None
        if self.state is State.starting:
            self.state = State.idle
            return Outcome.done, None
        try:
            result = _as_rank(self.step)
        except RankKilled:
            return Outcome.lost, ConnectionError("the rank was killed")
        except Exception as error:
            return Outcome.failed, error
        self.state = State.idle
        if isinstance(result, Unwritten):
            self.writing = result.result
            return Outcome.computed, None
        return Outcome.done, result

    def rebuild(self) -> None:
        self.start()

    def forget(self) -> None:
        self.rank.forget()

    def facts_now(self) -> list[Any]:
        return []

    def close(self) -> None:
        return


class HereExecutor(RayExecutor):
    """The executor on Ray, its pool's groups and its tasks in this process."""

    def share(self, value: Any) -> Any:
        return value

    def share_by_node(self, function: Any, arguments: tuple[Any, ...], pieces: int) -> Any:
        return MadeHere(function, arguments)

    def map_tasks(self, tasks: TaskMap[Any], on_done: OnDone | None = None) -> None:
        with self.telemetry.phase(tasks.name, len(tasks.items), tasks.unit_name) as phase:
            for item in tasks.items:
                done = tasks.is_done(item)
                result = None if done else _as_task(lambda i=item: tasks.function(*tasks.arguments(i)))  # type: ignore[misc]
                finish_unit(tasks, phase, on_done, item, result)


class HereBackend:
    gpus = 0.0
    gpu_memory = None

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster

    def executor(self, settings: WorkerSettings, telemetry: Telemetry, records: RunRecords) -> HereExecutor:
        return HereExecutor(self.cluster, self.gpus, settings, telemetry, records)


def load_rank(config: Config) -> None:
    """Have the model loaded that a run of this configuration will use."""
    layers = describe(config.model.path, config.model.tracked).layers
    HereGroup(0, WorkerSettings(config.model, layers, config.sharded), config.cluster, 0.0)


def _wait_here(pool: pool_module.Pool) -> list[Any]:
    pool.check()
    return pool.groups


@contextmanager
def in_turn() -> Iterator[None]:
    """Within it, what is read ahead and written behind is so in this thread: storage is called in one order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReadAhead, "begin", lambda ahead, work: work())
        patch.setattr(WriteBehind, "start", lambda behind, write: Deferred(write))
        yield


@contextmanager
def without_ray() -> Iterator[None]:
    """Within it, infscan.pipeline.answer(config) runs in this process, through the pool."""
    with in_turn(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "connect_backend", lambda cluster: HereBackend(cluster))
        patch.setattr(RunMetrics, "metrics", None)
        patch.setattr(pool_module, "WorkerGroup", HereGroup)
        patch.setattr(HereExecutor, "fill", lambda *given: None)
        patch.setattr(pool_module.Pool, "wait", _wait_here)
        yield
