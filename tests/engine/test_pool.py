"""The pool's loop over workers that work, fail, die and return as drawn: nobody waits, and recovery are recorded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.config import ClusterConfig
from infscan.engine import pool as module
from infscan.engine.pool import Pool
from infscan.engine.recovery import RecoveryLog
from infscan.engine.schedule import Schedule
from infscan.engine.worker_group import Outcome, State
from infscan.errors import CorpusError

MAX_ATTEMPTS = 2
NEVER = 10**9


class World:
    """A clock that turns once per turn of the loop, and what happens to the workers: drawn when it is needed."""

    def __init__(self, draw: Any, workers: int) -> None:
        self.draw, self.workers = draw, workers
        self.now = 0
        self.groups: list[Group] = []
        self.schedules: list[Schedule] = []
        # (turn, what, worker): `handed`, `computed`, `done`, `failed`, `lost`, `started`.
        self.trace: list[tuple[int, str, int]] = []
        # Of every loss, the turns since the first of the worker's units was handed out.
        self.lost_work: list[int] = []

    def pool(self, patch: pytest.MonkeyPatch, recovery: RecoveryLog) -> Pool:
        patch.setattr(module, "WorkerGroup", lambda index, *_: Group(self, index))
        patch.setattr(module, "Schedule", self.schedule)
        patch.setattr(Pool, "wait", lambda pool: self.turn())
        cluster = ClusterConfig(num_workers=self.workers, max_attempts=MAX_ATTEMPTS)
        return Pool(cluster, SimpleNamespace(sharded=False, host_bytes=None), 0.0, recovery)  # type: ignore[arg-type]

    def schedule(self, *arguments: Any) -> Schedule:
        self.schedules.append(Schedule(*arguments))
        return self.schedules[-1]

    def turn(self) -> list[Group]:
        """The loop is about to wait. Returns the groups to look at: those that have an answer, and others or not."""
        idle = [group.index for group in self.groups if group.state is State.idle]
        waits = bool(self.schedules) and self.schedules[-1].any_waits
        assert not (idle and waits), f"workers {idle} are idle, and units wait"
        self.now += 1
        everyone = self.draw(st.booleans())
        return [group for group in self.groups if everyone or self.now >= group.ends]

    def note(self, what: str, worker: int) -> None:
        self.trace.append((self.now, what, worker))


class Group:
    """A worker group as the pool knows it. writing: a unit that is being written, how and when that ends."""

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index = world, index
        self.facts: list[Any] = []
        self.heartbeats = SimpleNamespace(share=0.5)
        world.groups.append(self)
        self.start()

    def start(self) -> None:
        self.state, self.unit, self.outcome = State.starting, None, Outcome.done
        self.writing: tuple[int, Outcome, int] | None = None
        # By unit: when it was handed out.
        self.began: dict[int, int] = {}
        # Worker 0 always comes back; others may never.
        turns = st.integers(1, 9) if self.index == 0 else st.integers(1, 9) | st.just(NEVER)
        self._ends(self.world.draw(turns))

    def submit(self, unit: int, *arguments: Any, oom_retries: int = 0, following: object, behind: bool) -> None:
        assert self.state is State.idle
        assert behind == (not self.world.schedules[-1].losses.get(unit))
        self.state, self.unit, self.began[unit] = State.busy, unit, self.world.now
        ways = [Outcome.done, Outcome.failed, Outcome.lost, *[Outcome.computed] * 2 * behind]
        self.outcome = self.world.draw(st.sampled_from(ways))
        self._ends(self.world.draw(st.integers(0, 5)))
        self.world.note("handed", self.index)

    def _ends(self, turns: int) -> None:
        self.ends = self.world.now + turns

    def poll_written(self) -> tuple[Outcome, Any] | None:
        if self.writing is None or self.world.now < self.writing[2]:
            return None
        (unit, outcome, _), self.writing = self.writing, None
        if outcome is Outcome.lost:
            return self._is_lost()
        self.world.note("wrote", self.index)
        del self.began[unit]
        return outcome, unit if outcome is Outcome.done else CorpusError("damaged")

    def _is_lost(self) -> tuple[Outcome, Any]:
        self.world.note("lost", self.index)
        self.world.lost_work.append(self.world.now - min(self.began.values(), default=self.world.now))
        return Outcome.lost, ConnectionError("gone")

    def poll(self) -> tuple[Outcome, Any] | None:
        if self.world.now < self.ends:
            return None
        if self.state is State.idle or self.outcome is Outcome.lost:
            return self._is_lost()
        if self.state is State.busy and self.outcome is not Outcome.done and self.writing is not None:
            return None
        self.world.note("started" if self.state is State.starting else self.outcome.name, self.index)
        if self.outcome is Outcome.computed:
            how = self.world.draw(st.sampled_from([Outcome.done, Outcome.done, Outcome.failed, Outcome.lost]))
            self.writing = self.unit or 0, how, self.world.now + self.world.draw(st.integers(0, 7))
        elif self.unit is not None:
            del self.began[self.unit]
        if self.outcome is Outcome.failed:
            return Outcome.failed, CorpusError("damaged")
        self.state = State.idle
        self._ends(self.world.draw(st.integers(1, 3) | st.just(NEVER)))
        return self.outcome, self.unit

    def rebuild(self) -> None:
        self.start()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), workers=st.integers(1, 4), passes=st.lists(st.integers(0, 8), min_size=1, max_size=3))
def test_no_worker_is_idle_while_a_unit_waits_and_every_unit_ends(
    data: st.DataObject, workers: int, passes: list[int]
) -> None:
    """Whatever the others are at: `World.turn` looks whenever the loop goes to sleep. Units are written while the next
    ones are computed, or not; each ends once, and none is on its way when the step is over."""
    world = World(data.draw, workers)
    recovery = RecoveryLog(clock=lambda: float(world.now))
    ended: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        pool = world.pool(patch, recovery)
        for units in passes:
            ended.clear()
            pool.run(range(units), print, str, lambda u, _: ended.append(u), on_given_up=lambda u, _: ended.append(u))
            assert sorted(ended) == list(range(units))
            assert all(group.writing is None for group in world.groups)
    assert_log_is_the_trace(recovery, world)


def assert_log_is_the_trace(recovery: RecoveryLog, world: World) -> None:
    """Every failure that the workers saw is there, with the turns and the units between their events."""
    handed = [at for at, what, _ in world.trace if what == "handed"]
    assert recovery.first_unit_s == (handed[0] if handed else None)
    at_loss = [place for place, (_, what, _) in enumerate(world.trace) if what == "lost"]
    assert [(world.trace[place][2]) for place in at_loss] == [failure.worker for failure in recovery.failures]
    assert world.lost_work == [failure.lost_work_s for failure in recovery.failures]
    for place, failure in zip(at_loss, recovery.failures, strict=True):
        lost_at, _, worker = world.trace[place]
        after = world.trace[place + 1 :]
        ends = [("handed", worker), ("lost", worker)]
        back = next((index for index, event in enumerate(after) if event[1:] in ends), None)
        assert failure.recovery_s == (None if back is None else after[back][0] - lost_at)
        assert failure.units_by_others == sum(what == "handed" for _, what, _ in after[:back])
        started = next((at for at, what, who in after[:back] if (what, who) == ("started", worker)), None)
        assert failure.restart_s == (None if started is None else started - lost_at)


def test_a_driver_that_follows_a_dead_one_says_when_it_is_at_work(caplog: pytest.LogCaptureFixture) -> None:
    now = 10.0
    recovery = RecoveryLog(clock=lambda: now, followed="process 7 on elsewhere")
    now = 14.25
    with caplog.at_level("INFO", logger="infscan"):
        recovery.unit_started(0, 7)
    assert recovery.driver() == {"followed": "process 7 on elsewhere", "first_unit_s": 4.25}
    assert caplog.messages == ["driver      at work 4.2 s after its start, in place of process 7 on elsewhere"]


def test_what_a_unit_may_take_follows_what_the_steps_units_took() -> None:
    now = 0.0
    log = RecoveryLog(clock=lambda: now)
    log.start_step()
    for took in (1.0, 2.0, 9.0, 1.0):
        log.unit_started(0, 7)
        now += took
        log.unit_finished(0, 7)
    assert log.limit_s(3600.0, 100.0) == 3600.0
    log.unit_started(0, 7)
    now += 3.0
    log.unit_finished(0, 7)
    assert log.limit_s(3600.0, 100.0) == 180.0
    assert log.limit_s(3600.0, 400.0) == 400.0
    assert log.limit_s(60.0, 400.0) == 60.0
    log.start_step()
    assert log.limit_s(3600.0, 100.0) == 3600.0


def test_a_loss_says_what_it_cost(caplog: pytest.LogCaptureFixture) -> None:
    """Worker 1 dies 3 s into a unit, is back 5 s later and lost again 2 s after, while worker 0 does a unit of 4 s."""
    now = 0.0
    recovery = RecoveryLog(clock=lambda: now)
    recovery.start_step()
    recovery.unit_started(1, 1)
    recovery.unit_started(0, 0)
    now = 3.0
    recovery.worker_lost(1, "ActorDiedError: gone")
    now = 4.0
    recovery.unit_finished(0, 0)
    recovery.unit_started(0, 0)
    now = 8.0
    with caplog.at_level("INFO", logger="infscan"):
        recovery.worker_started(1)
    now = 10.0
    recovery.worker_lost(1, "ActorDiedError: again")
    first, second = (failure.to_json() for failure in recovery.failures)
    said = {"worker": 1, "reason": "ActorDiedError: gone", "usual_unit_s": 4.0, "meanwhile": 1}
    assert first == said | {"unit_s": 3.0, "start_s": 5.0, "back_s": 7.0}
    said = {"worker": 1, "reason": "ActorDiedError: again", "usual_unit_s": 4.0, "meanwhile": 0}
    assert second == said | {"unit_s": 0.0, "start_s": None, "back_s": None}
    assert caplog.messages == [
        "worker 1 is back after 5.0 s; 3.0 s of work are done again, 1 units went to others meanwhile"
    ]
