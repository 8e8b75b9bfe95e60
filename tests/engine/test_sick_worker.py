"""One sick machine among many costs no unit; a late one costs no wait; memory that runs out is learned of once."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.engine import in_process
from infscan.engine.executor import DeviceNeed, Step
from infscan.engine.health import STRIKES, Health
from infscan.engine.in_process import InProcessExecutor
from infscan.engine.schedule import SHRINKS_ALL
from infscan.errors import CorpusError, RunError
from infscan.model.loaded import RankContext
from infscan.model.out_of_memory import RankMemoryError
from infscan.storage.write_behind import WriteBehind
from tests.engine.simulated import Answer, Simulation, run, with_sick

UNITS = 2000
FAULT = RuntimeError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize("fails_after_s", [0.05, 1.0])
def test_a_sick_gpu_loses_no_unit(fails_after_s: float) -> None:
    """With 64 workers, as where its errors were the units': most of them were given up."""
    before = Simulation(64, with_sick([5], fails_after_s), gpus=0.0)
    _, lost = run(before, range(UNITS))
    assert len(lost) > UNITS // 4

    world = Simulation(64, with_sick([5], fails_after_s))
    done, lost = run(world, range(UNITS))
    assert (sorted(done), lost) == (list(range(UNITS)), {})
    assert sum(worker == 5 for worker, *_ in world.handed) == STRIKES
    assert [one["worker"] for one in world.recovery.retired] == [5]
    (said,) = world.warnings
    assert said.startswith("worker 5 on host-5 is retired: it failed 3 times in a row")
    assert "device" in said or "illegal memory access" in said


def test_a_gpu_on_which_no_model_can_be_loaded_is_retired_and_the_job_goes_on() -> None:
    world = Simulation(4, with_sick([], 1.0), broken=frozenset({2}))
    done, lost = run(world, range(200))
    assert (sorted(done), lost) == (list(range(200)), {})
    assert [one["worker"] for one in world.recovery.retired] == [2]
    assert len(world.recovery.failures) == STRIKES
    # On CPUs a start that fails says nothing of the machine: it is tried for as long as others work.
    world = Simulation(4, with_sick([], 1.0), gpus=0.0, broken=frozenset({2}))
    done, lost = run(world, range(200))
    assert (sorted(done), lost, world.recovery.retired) == (list(range(200)), {}, [])


def test_where_no_gpu_can_load_the_model_the_job_ends() -> None:
    world = Simulation(3, with_sick([], 1.0), broken=frozenset(range(3)))
    with pytest.raises(RunError, match=r"no worker group could be started in 9 attempts.*ECC"):
        run(world, range(5))


def test_several_sick_gpus_lose_no_unit_either() -> None:
    world = Simulation(8, with_sick([0, 3, 4], 0.2))
    done, lost = run(world, range(100))
    assert (sorted(done), lost) == (list(range(100)), {})
    assert sorted(one["worker"] for one in world.recovery.retired) == [0, 3, 4]


def test_a_gpu_that_fails_now_and_then_is_kept() -> None:
    """Every third of its units: it is rebuilt, and does the others."""
    seen: Counter[int] = Counter()

    def answer(worker: int, unit: Any, oom_retries: int) -> Answer:
        seen[worker] += 1
        return (1.0, FAULT) if worker == 2 and seen[2] % 3 == 0 else (10.0, unit)

    world = Simulation(4, answer)
    done, lost = run(world, range(200))
    assert (len(done), lost, world.recovery.retired) == (200, {}, [])
    assert len(world.recovery.failures) == seen[2] // 3


@pytest.mark.parametrize("error", [FAULT, CorpusError("a damaged part")], ids=["fault", "person's"])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_unit_that_fails_everywhere_is_given_up_and_no_worker_is_retired(error: Exception, workers: int) -> None:
    def answer(worker: int, unit: Any, oom_retries: int) -> Answer:
        return (5.0, error) if unit == 17 else (10.0, unit)

    world = Simulation(workers, answer)
    done, lost = run(world, range(40))
    assert sorted(done) == [unit for unit in range(40) if unit != 17]
    assert list(lost) == [17]
    assert not world.recovery.retired
    assert 3 <= sum(unit == 17 for _, unit, _ in world.handed) <= 4


def test_where_every_gpu_is_sick_the_step_ends_and_nothing_is_given_up() -> None:
    given_up: dict[Any, str] = {}
    world = Simulation(2, with_sick([0, 1], 1.0))
    with world.pool() as pool, pytest.raises(RunError, match=r"no worker is left: worker 1 on host-1 .* goes on"):
        pool.run(range(50), print, str, lambda *_: None, on_given_up=given_up.__setitem__)
    assert not given_up


def test_a_gpu_that_a_stranger_fills_is_retired_and_the_job_goes_on() -> None:
    """Not one sequence fits there: that ends the job only where the GPU is the rank's alone."""

    def answer(worker: int, unit: Any, oom_retries: int) -> Answer:
        rows = 1 if oom_retries else 8
        error = RankMemoryError("CUDA out of memory", rows, 512 * rows, 70 << 30)
        return (1.0, error) if worker == 1 else (100.0, unit)

    world = Simulation(4, answer)
    done, lost = run(world, range(80))
    assert (sorted(done), lost) == (list(range(80)), {})
    assert [one["worker"] for one in world.recovery.retired] == [1]
    (said,) = world.warnings
    assert "other processes hold 70.0 GiB of the GPU" in said
    # Its own micro-batches are halved first, and no other worker's.
    assert {worker for worker, _, oom_retries in world.handed if oom_retries} == {1}
    assert sum(worker == 1 for worker, *_ in world.handed) == 1 + STRIKES

    alone = RankMemoryError("CUDA out of memory", 1, 512)
    with pytest.raises(RunError, match="one sequence alone"):
        run(Simulation(4, lambda worker, unit, oom_retries: (1.0, alone)), range(8))


def test_a_process_whose_gpu_died_ends_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be rebuilt from within; the command, run again, goes on."""

    def work(task: int) -> None:
        raise FAULT

    rank: Any = SimpleNamespace(
        context=RankContext(),
        device="cpu",
        behind=WriteBehind(),
        attempt=lambda function, oom_retries, *arguments, following, behind: function(*arguments),
    )
    given_up: dict[Any, str] = {}
    step = Step("work", "units", [1, 2], work, lambda unit: unit)
    InProcessExecutor.on(rank).run(step, on_given_up=given_up.__setitem__)
    assert list(given_up) == [1, 2]
    monkeypatch.setattr(in_process, "has_died", lambda device: True)
    with pytest.raises(RunError, match=r"the GPU failed \(RuntimeError: CUDA error: device-side assert.* again"):
        InProcessExecutor.on(rank).run(step, on_given_up=given_up.__setitem__)


def test_a_gpu_whose_node_goes_away_is_not_sick() -> None:
    """Spot machines may go before they have finished a unit, many times in a row."""
    gone = ConnectionError("The actor died because its node has died. Node Id: 7")
    seen: Counter[int] = Counter()

    def answer(worker: int, unit: Any, oom_retries: int) -> Answer:
        seen[worker] += 1
        return (1.0, gone) if worker == 2 and seen[2] <= 6 else (10.0, unit)

    world = Simulation(4, answer)
    done, lost = run(world, range(200))
    assert (len(done), lost, world.recovery.retired) == (200, {}, [])


def test_failures_on_a_node_that_went_away_do_not_count_on_the_next() -> None:
    health = Health()
    for node in ("a", "a", "b"):
        health.started_on(0, node)
        health.strike(0, f"unit on {node}")
    assert health.strikes == {0: ["unit on b"]}
    assert not health.is_sick(0, others=[1])
    for number in range(STRIKES - 1):
        health.strike(0, number)
    assert health.is_sick(0, others=[])


def slow(worker: int, unit: Any, oom_retries: int) -> Answer:
    """Worker 3 is throttled: it takes fifty times as long."""
    return (5000.0 if worker == 3 else 100.0), (worker, unit)


def test_a_late_unit_goes_to_an_idle_worker_and_counts_once() -> None:
    done: list[tuple[Any, Any]] = []
    world = Simulation(4, slow)
    with world.pool() as pool:
        pool.run(range(8), print, str, lambda unit, result: done.append((unit, result)))
        assert world.now < 3.5 * 100.0 + 100.0 + 60.0
        assert world.recovery.reissued == 1
        assert sorted(unit for unit, _ in done) == list(range(8))
        assert all(worker != 3 for _, (worker, _) in done)
        # The next step begins while the late one is still at the old unit; what it says then does not count.
        done.clear()
        pool.run(range(100, 260), len, str, lambda unit, result: done.append((unit, result)))
        assert sorted(unit for unit, _ in done) == list(range(100, 260))
        assert pool.groups[3].forgot == 1  # type: ignore[attr-defined]


def test_nothing_is_tried_twice_where_units_take_their_usual_time() -> None:
    """Not while others wait, not before three medians, and a unit twice as long as the others is none."""

    def answer(worker: int, unit: Any, oom_retries: int) -> Answer:
        return 250.0 if unit == 39 else 100.0, unit

    world = Simulation(4, answer)
    run(world, range(40))
    assert len(world.handed) == 40


def test_a_late_unit_whose_second_attempt_fails_waits_for_the_first() -> None:
    def answer(worker: int, unit: Any, oom_retries: int) -> Answer:
        if unit != 5:
            return 10.0, unit
        return (400.0, unit) if sum(one == 5 for _, one, _ in world.handed) == 1 else (1.0, CorpusError("damaged"))

    world = Simulation(3, answer, gpus=0.0)
    done, lost = run(world, range(9))
    assert sorted(done) == list(range(9))
    assert not lost


def fits_halved(worker: int, unit: Any, oom_retries: int) -> Answer:
    if oom_retries < 2:
        return 1.0, RankMemoryError("CUDA out of memory", 8, 4096)
    return 100.0, unit


def test_memory_that_runs_out_shrinks_all_units_once() -> None:
    """Every worker may run out once at each size; then nothing does, in this step and where it goes on."""
    world = Simulation(8, fits_halved)
    with world.pool() as pool:
        for units in (range(400), range(400, 800)):
            before = pool.oom_retries
            pool.run(units, print, str, lambda *_: None)
            if units.start:
                assert pool.oom_retries == before
        # A worker may be handed its next unit before the second one's answer is heard.
        assert pool.oom_retries <= 2 * (8 + SHRINKS_ALL - 1)
    assert [said.partition(":")[0] for said in world.warnings] == ["several units did not fit a rank's memory"] * 2
    at_first = [oom_retries for _, _, oom_retries in world.handed[400:]]
    assert min(at_first) == 2


def test_one_unit_that_does_not_fit_shrinks_no_other() -> None:
    def answer(worker: int, unit: Any, oom_retries: int) -> Answer:
        return fits_halved(worker, unit, oom_retries) if unit == 3 else (100.0, unit)

    world = Simulation(2, answer)
    done, _ = run(world, range(20))
    assert sorted(done) == list(range(20))
    assert {unit for _, unit, oom_retries in world.handed if oom_retries} == {3}


def test_a_gpu_with_less_room_than_planned_starts_with_smaller_batches() -> None:
    """The others do not, and no memory has to run out for it."""
    world = Simulation(3, lambda worker, unit, oom_retries: (100.0, unit), free={0: 79 << 30, 1: 33 << 30, 2: 79 << 30})
    with world.pool() as pool:
        pool.forecasts[print] = ("scan", DeviceNeed(stays=20 << 30, batch=50 << 30))
        pool.run(range(30), print, str, lambda *_: None)
        pool.run(range(30), len, str, lambda *_: None)
    sizes = {(worker, oom_retries) for worker, _, oom_retries in world.handed[:30]}
    assert sizes == {(0, 0), (1, 2), (2, 0)}
    assert not any(oom_retries for *_, oom_retries in world.handed[30:])
    assert world.warnings == [
        "a GPU of worker 1 has 33.0 GiB free and scan was planned with 70.0 GiB: its micro-batches there have 1/4 of "
        "their size from the start."
    ]


@given(stays=st.integers(0, 100), batch=st.integers(0, 10**6), free=st.integers(1, 200))
def test_a_forecast_is_halved_until_it_fits_and_no_further(stays: int, batch: int, free: int) -> None:
    k = DeviceNeed(stays, batch).halvings(free)
    if stays >= free:
        assert k == 0
    else:
        assert stays + (batch >> k) <= free
        assert k == 0 or stays + (batch >> (k - 1)) > free
