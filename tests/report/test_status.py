"""What a terminal says of a run's driver: who, how long silent, what it waits for; and what to do where it is gone."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from infscan.report.status import show_status, show_sweep
from infscan.results.status import Driver, Status

KNOWN = Driver(pid=7511, host="vm", since="2026-11-28T23:06:49+00:00", lease_s=60.0, heartbeat_age_s=3723.5)
ALIVE = Driver(**(vars(KNOWN) | {"alive": True, "heartbeat_age_s": 12.0}))
KILLED = Driver(**(vars(KNOWN) | {"killed": True}))
WAITING = Driver(**(vars(ALIVE) | {"state": "waiting for capacity: one needs 4 x {CPU 1, GPU 1}"}))

WHO = "process 7511 on vm, since 2026-11-28T23:06:49+00:00"
MEND = "the same command goes on from here"


def lines(driver: Driver, phase: str = "queries") -> list[str]:
    out = StringIO()
    show_status(Status("runs/a", phase, driver=driver), Console(file=out, soft_wrap=True, highlight=False))
    return out.getvalue().splitlines()[2:]


@pytest.mark.parametrize(
    ("driver", "said"),
    [
        (ALIVE, [f"driver      {WHO}", "heartbeat   0:00:12 ago"]),
        (KILLED, [f"driver      {WHO}: killed; {MEND}", "heartbeat   1:02:03 ago"]),
        (
            KNOWN,
            [
                f"driver      {WHO}",
                f"heartbeat   1:02:03 ago, more than cluster.lease_s=60 s: taken for dead; {MEND}",
            ],
        ),
        (
            WAITING,
            [
                f"driver      {WHO}",
                "state       waiting for capacity: one needs 4 x {CPU 1, GPU 1}",
                "heartbeat   0:00:12 ago",
            ],
        ),
        (Driver(), [f"driver      none, and the run is not finished; {MEND}"]),
    ],
    ids=["alive", "killed", "silent", "waiting", "nobody"],
)
def test_a_run_under_way_says_who_drives_it_and_whether_it_lives(driver: Driver, said: list[str]) -> None:
    assert lines(driver) == said


@pytest.mark.parametrize("driver", [ALIVE, KILLED, Driver()])
def test_a_finished_run_has_no_driver_to_speak_of(driver: Driver) -> None:
    assert lines(driver, "finished") == []


@pytest.mark.parametrize(("driver", "left"), [(ALIVE, ", 0:00:28 left"), (KILLED, ""), (Driver(), "")])
def test_only_what_somebody_works_on_comes_to_an_end(driver: Driver, left: str) -> None:
    out = StringIO()
    console = Console(file=out, soft_wrap=True, highlight=False)
    show_status(Status("runs/a", "scan", driver=driver, sequences_per_s=42.0, eta_s=28.0), console)
    assert f"rate        42 sequences/s by the last shards{left}\n" in out.getvalue()


def test_a_store_without_times_shows_no_heartbeat() -> None:
    assert lines(Driver(**(vars(ALIVE) | {"heartbeat_age_s": None}))) == [f"driver      {WHO}"]


def test_what_a_driver_says_cannot_control_a_terminal() -> None:
    assert lines(Driver(**(vars(WAITING) | {"state": "\x1b[31m[bold]red\r\n"})))[1] == "state        [31m[bold]red"


def test_a_sweep_marks_the_cell_whose_driver_is_gone() -> None:
    cells = {
        "a": Status("a", "finished", driver=KILLED),
        "b": Status("b", "scan", driver=KILLED),
        "c": Status("c", "scan", driver=KNOWN),
        "d": Status("d", "new"),
    }
    shown = sweep(cells)
    assert shown[0] == "sweep       runs/sweep: 1 of 4 cells finished; nothing works on the others"
    assert [line.split() for line in shown[1:]] == [
        ["finished", "a"],
        ["scan", ",", "killed", "b"],
        ["scan", ",", "driver", "silent", "c"],
        ["new", "d"],
    ]


def test_a_sweep_of_which_one_cell_waits_is_not_idle() -> None:
    shown = sweep({"a": Status("a", "finished"), "b": Status("b", "queries", driver=WAITING)})
    assert shown[0] == "sweep       runs/sweep: 1 of 2 cells finished"
    assert shown[2].endswith("waiting for capacity: one needs 4 x {CPU 1, GPU 1}  b")


def sweep(cells: dict[str, Status]) -> list[str]:
    out = StringIO()
    show_sweep("runs/sweep", cells, Console(file=out, soft_wrap=True, highlight=False))
    return out.getvalue().splitlines()
