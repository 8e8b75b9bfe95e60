"""The schedule keeps every unit in exactly one place, and ends each of them, whatever becomes of its attempts."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from infscan.engine.schedule import GUILTY_TRIES, LOSSES_PER_ATTEMPT, MOST_OOM_RETRIES, SHRINKS_ALL, Schedule

_UNITS = st.lists(st.integers(0, 99), unique=True, max_size=6)


class AnyTrace(RuleBasedStateMachine):
    """Attempts that succeed, fail, get lost or run out of memory in any order, beside a model of what became of it."""

    @initialize(units=_UNITS, max_attempts=st.integers(1, 3))
    def start(self, units: list[int], max_attempts: int) -> None:
        self.units, self.max_attempts = units, max_attempts
        self.schedule = Schedule(iter(units), max_attempts)
        self.errors, self.losses, self.oom_retries = (dict.fromkeys(units, 0) for _ in range(3))
        self.felled: dict[int, list[int]] = {unit: [] for unit in units}
        self.ended: set[int] = set()
        self.ran_out: set[int] = set()
        self.queue = list(units)
        self.promised: dict[int, int] = {}
        self.copies, self.tries = (dict.fromkeys(units, 0) for _ in range(2))
        self.copied: set[int] = set()
        self.halvings = 0
        self.did_not_fit: dict[int, set[int]] = {}

    @rule(worker=st.integers(0, 2))
    def take(self, worker: int) -> None:
        """What was promised to a worker is its next; nobody is sent away while a unit waits."""
        promised, queue = self.promised, self.queue
        if worker in promised:
            unit = promised.pop(worker)
        else:
            unit = queue.pop(0) if queue else promised.popitem()[1] if promised else None
        assert self._take(worker) == unit

    @rule(worker=st.integers(0, 2))
    def promise(self, worker: int) -> None:
        if worker not in self.promised and self.queue:
            self.promised[worker] = self.queue.pop(0)
        assert self.schedule.promise(worker) == self.promised.get(worker)

    def _take(self, worker: int = -1) -> int | None:
        unit = self.schedule.take(worker)
        if unit is not None:
            self.tries[unit] += 1
            self.oom_retries[unit] = max(self.oom_retries[unit], self.halvings)
        return unit

    @precondition(lambda self: self.schedule.running)
    @rule(data=st.data())
    def take_again(self, data: st.DataObject) -> None:
        """Another worker tries a unit that is late, too."""
        unit = data.draw(st.sampled_from(sorted(self.schedule.running)))
        self.schedule.take_again(unit)
        self.tries[unit] += 1
        self.copies[unit] += 1
        self.copied.add(unit)

    @precondition(lambda self: self.schedule.running)
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        unit = data.draw(st.sampled_from(sorted(self.schedule.running)))
        self.schedule.succeed(unit)
        self.ended.add(unit)

    @precondition(lambda self: self.schedule.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        unit = data.draw(st.sampled_from(sorted(self.schedule.running)))
        self.errors[unit] += 1
        last = self.schedule.fail(unit, f"error {self.errors[unit]}")
        spent = self.errors[unit] >= self.max_attempts or self._is_guilty(unit)
        assert last == (spent and not self.copies[unit])
        self._again(unit, last, f"error {self.errors[unit]}")

    @precondition(lambda self: self.schedule.running)
    @rule(data=st.data(), times=st.sampled_from([1, LOSSES_PER_ATTEMPT - 1]))
    def lose(self, data: st.DataObject, times: int) -> None:
        """One unit's machine goes away, some times in a row (the budget is too large for single steps)."""
        unit = data.draw(st.sampled_from(sorted(self.schedule.running)))
        for _ in range(times):
            self.losses[unit] += 1
            last = self.schedule.lose(unit, f"loss {self.losses[unit]}")
            spent = self.losses[unit] >= self.max_attempts * LOSSES_PER_ATTEMPT or self._is_guilty(unit)
            assert last == (spent and not self.copies[unit])
            if self._again(unit, last, f"loss {self.losses[unit]}"):
                return
            self._take_until(unit)

    @precondition(lambda self: self.schedule.running)
    @rule(data=st.data(), worker=st.integers(0, 2))
    def take_down(self, data: st.DataObject, worker: int) -> None:
        """A worker dies under the unit."""
        unit = data.draw(st.sampled_from(sorted(self.schedule.running)))
        self.losses[unit] += 1
        self.felled[unit].append(worker)
        last = self.schedule.lose(unit, "killed", worker)
        spent = self._is_guilty(unit) or self.losses[unit] >= self.max_attempts * LOSSES_PER_ATTEMPT
        assert last == (spent and not self.copies[unit])
        self._again(unit, last, "killed")

    @precondition(lambda self: self.schedule.running)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        """What the attempt failed of was not the unit's."""
        unit = data.draw(st.sampled_from(sorted(self.schedule.running)))
        self.schedule.put_back(unit)
        self._again(unit, False, "")

    @rule(worker=st.integers(0, 2))
    def acquit(self, worker: int) -> None:
        """The worker is found to be sick: nothing that failed under it counts on a unit that is still to be done."""
        self.schedule.acquit(worker)
        for unit, workers in self.felled.items():
            self.losses[unit] -= workers.count(worker)
            self.felled[unit] = [one for one in workers if one != worker]
        self.copied |= set(self.units)

    def _is_guilty(self, unit: int) -> bool:
        felled = self.felled[unit]
        return len(set(felled)) > 1 and len(felled) + self.errors[unit] >= GUILTY_TRIES

    @precondition(lambda self: self.schedule.running)
    @rule(data=st.data(), times=st.sampled_from([1, MOST_OOM_RETRIES - 1]))
    def retry_smaller(self, data: st.DataObject, times: int) -> None:
        """One unit's memory runs out, some times in a row."""
        unit = data.draw(st.sampled_from(sorted(self.schedule.running)))
        for _ in range(times):
            last = self.schedule.retry_smaller(unit, "memory")
            spent = self.oom_retries[unit] == MOST_OOM_RETRIES
            assert last == (spent and not self.copies[unit])
            if spent:
                self.ran_out.add(unit)
            else:
                self._halved(unit)
            if self._again(unit, last, "memory"):
                return
            self._take_until(unit)

    @precondition(lambda self: self.units)
    @rule(data=st.data())
    def halve(self, data: st.DataObject) -> None:
        """It shows later that it was memory: wherever the unit is, it stays, and what has ended is left alone."""
        unit = data.draw(st.sampled_from(self.units))
        halved = self.schedule.allow_smaller(unit)
        assert halved == (unit not in self.ended and self.oom_retries[unit] < MOST_OOM_RETRIES)
        if halved:
            self._halved(unit)

    def _halved(self, unit: int) -> None:
        """Once several units did not fit at one size, all go out at the next."""
        self.oom_retries[unit] += 1
        size = self.oom_retries[unit]
        self.did_not_fit.setdefault(size, set()).add(unit)
        if len(self.did_not_fit[size]) >= SHRINKS_ALL:
            self.halvings = max(self.halvings, size)

    def _again(self, unit: int, last: bool, reason: str) -> bool:
        """Returns whether the unit has ended; else another is at it still, or it waits."""
        if last:
            self.ended.add(unit)
            assert self.schedule.given_up[unit] == reason
            return True
        if self.copies[unit]:
            self.copies[unit] -= 1
        else:
            self.queue.append(unit)
        return False

    def _take_until(self, unit: int) -> None:
        while unit not in self.schedule.running:
            taken = self._take()
            assert taken == self.queue.pop(0)

    @invariant()
    def every_unit_is_in_exactly_one_place(self) -> None:
        places: list[Iterable[int]] = [self.schedule.waiting, self.schedule.promised.values(), self.schedule.running]
        places += [self.schedule.done, self.schedule.given_up]
        assert sorted(unit for place in places for unit in place) == sorted(self.units)

    @invariant()
    def units_that_wait_go_out_in_turn(self) -> None:
        assert list(self.schedule.waiting) == self.queue

    @invariant()
    def what_ended_has_ended(self) -> None:
        assert self.schedule.done | set(self.schedule.given_up) == self.ended

    @invariant()
    def budgets_are_apart(self) -> None:
        for unit in self.units:
            spent = (
                self.errors[unit] >= self.max_attempts
                or self.losses[unit] >= self.max_attempts * LOSSES_PER_ATTEMPT
                or unit in self.ran_out
                or self._is_guilty(unit)
            )
            # Where two were at it, the one that is left may still succeed.
            if unit not in self.copied:
                assert (unit in self.schedule.given_up) == spent
            assert self.schedule.attempt(unit) == self.tries[unit]
            assert self.schedule.oom_retries.get(unit, 0) == self.oom_retries[unit]

    @invariant()
    def finished_is_when_nothing_waits_or_runs(self) -> None:
        assert self.schedule.finished == (len(self.ended) == len(self.units))

    def teardown(self) -> None:
        """From anywhere, attempts that all fail come to an end, and every unit is done or given up."""
        if not hasattr(self, "schedule"):
            return
        attempts = sum(self.copies.values()) + len(self.units) * self.max_attempts + len(self.schedule.running)
        for _ in range(attempts):
            while self.schedule.take() is not None:
                pass
            for unit in sorted(self.schedule.running):
                self.schedule.fail(unit, "no luck")
        assert self.schedule.finished
        assert self.schedule.done | set(self.schedule.given_up) == set(self.units)
        assert not self.schedule.done & set(self.schedule.given_up)


TestAnyTrace = AnyTrace.TestCase
TestAnyTrace.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_an_error_costs_no_loss_and_a_loss_no_error() -> None:
    schedule = Schedule([7], max_attempts=2)
    for _ in range(2 * LOSSES_PER_ATTEMPT - 1):
        schedule.take()
        assert not schedule.lose(7, "gone")
    schedule.take()
    assert not schedule.fail(7, "wrong")
    schedule.take()
    assert schedule.fail(7, "wrong again")
    assert schedule.given_up == {7: "wrong again"}


def test_no_units_are_finished() -> None:
    assert Schedule([], 1).finished
    assert Schedule([], 1).take() is None


def test_a_unit_that_takes_down_two_workers_has_three_tries_and_one_that_is_unlucky_on_one_worker_has_many() -> None:
    guilty, unlucky = Schedule(["unit"], 3), Schedule(["unit"], 3)
    for schedule, workers in ((guilty, [0, 1, 0]), (unlucky, [0, 0, 0])):
        for worker in workers:
            assert schedule.take() == "unit"
            schedule.lose("unit", "SIGSEGV", worker)
    assert guilty.given_up == {"unit": "SIGSEGV"}
    assert list(unlucky.waiting) == ["unit"]
