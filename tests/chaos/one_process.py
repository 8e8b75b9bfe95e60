"""The main job without Ray: the driver's own code and the ranks' own code in this process, one after the other.

The pool's loop, its scheduler and every phase are the real ones. In the place of Ray stand a worker group that does its
step when it is asked for the outcome, and loops over the tasks between passes. A rank's model is loaded once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest

from infscan.config import ClusterConfig, Config
from infscan.corpus.pieces import Piece
from infscan.engine import pool as pool_module
from infscan.engine.worker_group import Outcome, State
from infscan.model.architecture import describe
from infscan.model.load import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.steps import factors as fit
from infscan.steps import prepare, run, scan

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
    _At.rank = True
    try:
        return work()
    finally:
        _At.rank = False


def _as_task(work: Callable[[], T]) -> T:
    for last in (False,) * (_TASK_ATTEMPTS - 1) + (True,):
        try:
            return _as_rank(work)
        except RankKilled:
            if last:
                raise
    raise AssertionError("the last attempt returns or raises")


class HereGroup:
    """A worker group of one rank in this process, with the interface that the pool knows."""

    _ranks: dict[str, ModelWorker] = {}  # noqa: RUF012 - by settings, for all groups

    def __init__(self, index: int, settings: WorkerSettings, cluster: ClusterConfig, gpus: float) -> None:
        self.index, self.settings = index, settings
        self.running: list[object] = []
        self.facts: list[Any] = []
        # Told to those who watch, where another test has left a Ray in this process.
        self.pulse = SimpleNamespace(faults=Counter[str]())
        self.start()

    def start(self) -> None:
        self.state, self.unit = State.starting, None
        key = repr(self.settings)
        if key not in self._ranks:
            self._ranks[key] = ModelWorker(self.settings, RankContext())
        self.rank = self._ranks[key]
        self.rank.forget()

    def is_placed(self) -> bool:
        return True

    def submit(self, unit: int, function: Callable[..., Any], *arguments: Any, halvings: int = 0) -> None:
        assert self.state is State.idle
        self.state, self.unit, self.step = State.busy, unit, lambda: self.rank.attempt(function, halvings, *arguments)

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
        return Outcome.done, result

    def rebuild(self) -> None:
        self.start()

    def forget(self) -> None:
        self.rank.forget()

    def facts_now(self) -> list[Any]:
        return []

    def close(self) -> None:
        return


def _layers_here(run: Any, name: str, function: Any, plan: Any) -> None:
    for layer in plan.layers:
        _as_task(lambda layer=layer: function(run.factors_store, plan, layer))  # type: ignore[misc]


def _pieces_here(
    pieces: Sequence[Piece], rows: Sequence[dict[str, Any]], function: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    for index, (piece, row) in enumerate(zip(pieces, rows, strict=True)):
        yield _as_task(lambda given=row | {"index": index, "piece": piece}: function(given))  # type: ignore[misc]


def load_rank(config: Config) -> None:
    """Have the model loaded that a run of this configuration will use."""
    layers = describe(config.model.path, config.model.tracked).layers
    HereGroup(0, WorkerSettings(config.model, layers, config.sharded), config.cluster, 0.0)


def _wait_here(pool: pool_module.Pool) -> list[Any]:
    pool.check()
    return pool.groups


@contextmanager
def without_ray() -> Iterator[None]:
    """Within it, jobs.scan.answer(config) runs in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "connect", lambda cluster: None)
        patch.setattr(run, "gpus_per_rank", lambda cluster: 0.0)
        patch.setattr(run.preflight, "check_capacity", lambda cluster, gpus: None)
        patch.setattr(scan, "ray", SimpleNamespace(put=lambda arrays: arrays))
        patch.setattr(fit, "_on_layers", _layers_here)
        patch.setattr(prepare, "_on_ray", _pieces_here)
        patch.setattr(pool_module, "WorkerGroup", HereGroup)
        patch.setattr(pool_module.Pool, "wait", _wait_here)
        yield
