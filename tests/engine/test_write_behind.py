"""The last unit is written while the next one is computed: each counts once, and what befalls it is its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from threading import Event
from typing import Any

import pytest

from infscan.corpus.read_ahead import ReadAhead
from infscan.engine.executor import Step
from infscan.engine.in_process import InProcessExecutor
from infscan.engine.schedule import GUILTY_TRIES
from infscan.errors import ConfigError, CorpusError
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker
from infscan.storage.write_behind import WriteBehind
from tests.engine.simulated import Answer, Simulation, run

# A test that would wait so long has failed.
LONG_S = 60.0


# --- one process ---------------------------------------------------------------------------------------------------


def run_here(
    units: int, compute: Callable[[int], None], write: Callable[[int], None]
) -> tuple[list[int], dict[int, str]]:
    """Units of this process: computed, then written. Those done, in order, and those given up."""
    worker = ModelWorker.__new__(ModelWorker)
    worker.context, worker.ahead, worker.behind, worker._writes_later = RankContext(), ReadAhead(), WriteBehind(), False

    def function(worker: ModelWorker, unit: int) -> Any:
        def put() -> int:
            write(unit)
            return unit

        compute(unit)
        return worker.later(put)

    done: list[int] = []
    given_up: dict[int, str] = {}

    def on_done(unit: int, result: int) -> None:
        assert unit == result
        done.append(unit)

    step = Step("scan", "shards", range(units), function, lambda unit: unit)
    InProcessExecutor.on(worker).run(step, on_done, given_up.__setitem__)
    return done, given_up


def test_a_unit_is_written_while_the_next_is_computed_and_one_waits_at_most() -> None:
    """Had writing to end first, the next unit would never begin; and nothing is left when the step ends."""
    units = 5
    begun, written = [Event() for _ in range(units + 1)], [Event() for _ in range(units)]

    def compute(unit: int) -> None:
        begun[unit].set()
        assert all(one.is_set() for one in written[: max(0, unit - 1)])

    def write(unit: int) -> None:
        if unit + 1 < units:
            assert begun[unit + 1].wait(LONG_S)
        assert not begun[unit + 2 if unit + 2 < units else -1].is_set()
        written[unit].set()

    assert run_here(units, compute, write) == ([0, 1, 2, 3, 4], {})
    assert all(one.is_set() for one in written)


def test_a_write_that_fails_is_that_units_failure_and_no_others() -> None:
    def write(unit: int) -> None:
        if unit == 2:
            raise CorpusError("its output is refused")

    attempts: Counter[int] = Counter()
    done, given_up = run_here(4, lambda unit: attempts.update([unit]), write)
    assert (done, given_up) == ([0, 1, 3], {2: "CorpusError: its output is refused"})
    assert attempts == {0: 1, 1: 1, 2: 3, 3: 1}


def test_what_was_computed_is_written_where_the_next_unit_ends_the_step() -> None:
    written: list[int] = []

    def compute(unit: int) -> None:
        if unit == 2:
            raise ConfigError("no attempt can mend it")

    with pytest.raises(ConfigError):
        run_here(4, compute, written.append)
    assert written == [0, 1]


# --- many workers, in simulated time -------------------------------------------------------------------------------


def of_1_s(worker: int, unit: Any, oom_retries: int) -> Answer:
    return 1.0, unit


@pytest.mark.parametrize(("write_s", "takes"), [(0.5, 16.5), (1.0, 17.0), (2.0, 1 + 16 * 2.0)])
def test_units_take_the_longer_of_computing_and_writing(write_s: float, takes: float) -> None:
    world = Simulation(1, of_1_s, gpus=0.0, start_s=0.0, write_s=write_s)
    assert run(world, range(16)) == (list(range(16)), {})
    assert world.now == pytest.approx(takes)


def test_a_failed_write_is_charged_to_its_unit_while_the_worker_goes_on() -> None:
    """On a GPU too: no card takes part in writing."""

    def written(worker: int, unit: Any) -> Any:
        return OSError("no such bucket") if unit == 3 else unit

    world = Simulation(2, of_1_s, write_s=1.0, written=written)
    done, lost = run(world, range(12))
    assert (sorted(done), list(lost)) == ([unit for unit in range(12) if unit != 3], [3])
    assert Counter(unit for _, unit, _ in world.handed) == Counter(range(12)) + Counter({3: 2})
    assert world.recovery.failures == []


def test_a_lost_worker_loses_both_of_its_units_and_each_is_done_once() -> None:
    """It dies amid its third unit, whose predecessor it has not written."""

    def answer(worker: int, unit: Any, oom_retries: int) -> Answer:
        dies = worker == 1 and sum(who == 1 for who, *_ in world.handed) == 3
        return (0.5, ConnectionError("gone")) if dies else (1.0, unit)

    world = Simulation(2, answer, gpus=0.0, start_s=0.0, write_s=0.9)
    done, lost = run(world, range(10))
    assert (sorted(done), lost) == (list(range(10)), {})
    both = [unit for who, unit, _ in world.handed if who == 1][1:3]
    assert Counter(unit for _, unit, _ in world.handed) == Counter(range(10)) + Counter(both)
    (failure,) = world.recovery.failures
    assert failure.lost_work_s == pytest.approx(1.5)


@pytest.mark.parametrize("workers", [2, 5])
def test_a_unit_that_kills_workers_takes_no_other_with_it(workers: int) -> None:
    """What was being written as it killed is not taken for the reason, however often they meet."""

    def answer(worker: int, unit: Any, oom_retries: int) -> Answer:
        return (0.1, ConnectionError("gone")) if unit == 7 else (1.0, unit)

    world = Simulation(workers, answer, gpus=0.0, start_s=0.0, write_s=0.9)
    done, lost = run(world, range(12))
    assert (sorted(done), list(lost)) == ([unit for unit in range(12) if unit != 7], [7])
    assert sum(unit == 7 for _, unit, _ in world.handed) == GUILTY_TRIES
    # After its first loss it has its worker for itself.
    assert sum(unit != 7 for _, unit, _ in world.handed) <= 11 + 1
