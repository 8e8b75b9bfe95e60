"""Where a run stands is read from its folder: every phase, whatever is missing, and without changing a byte of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from infscan.cli import main
from infscan.errors import RunError
from infscan.report.status import show_status, show_sweep
from infscan.results.status import NOTHING_ALIVE, Driver, Status, exit_code, read_status, read_sweep
from infscan.storage import Store
from infscan.storage.host import Host, process_began, this_host
from tests.results.builders import QUERIES, published, put_shard


def plan(store: Store, shards: int, shard_sequences: int = 4) -> None:
    size = shards * shard_sequences
    value = {"shards": shards, "shard_sequences": shard_sequences, "selection": {"size": size}}
    store.write_json("plan.json", value)
    store.write("queries/queries.jsonl", "".join(json.dumps({"id": name}) + "\n" for name in QUERIES).encode())
    store.write("queries/batch-0000-layers-00.safetensors", b"")


def at(folder: Path, name: str, moment: float) -> None:
    os.utime(folder / "shards" / f"{name}.parquet", (moment, moment))


def test_a_scan_under_way_says_how_far_how_fast_and_what_is_on_top(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    plan(store, 10)
    put_shard(store, "shard-000000", [0, 1], [("alpha", "proponent", 0, 2.0), ("alpha", "opponent", 1, -3.0)])
    put_shard(store, "shard-000004", [16, 17], [("alpha", "proponent", 17, 5.0), ("beta#0", "proponent", 17, 1.0)])
    put_shard(store, "shard-000007", [30], [("alpha", "proponent", 30, 3.0)])
    for name, moment in (("shard-000000", 1000.0), ("shard-000004", 1004.0), ("shard-000007", 1010.0)):
        at(tmp_path, name, moment)
    store.write_json("quarantine/shard-000002.json", {"reason": "a poison"})
    store.write_json("quarantine/shard-000004.json", {"reason": "its file outranks this"})
    found = read_status(str(tmp_path), rows=2)
    assert (found.phase, found.done, found.shards, found.sequences) == ("scan", 3, 10, 40)
    assert found.quarantined == {"shard-000002": "a poison"}
    # Two more shards in ten seconds, of four sequences each.
    assert found.sequences_per_s == pytest.approx(0.8)
    assert found.eta_s == pytest.approx(35.0)
    assert (found.last, found.read) == (1010.0, 3)
    rows = [(row.query_id, row.side, row.rank, row.sequence_id, row.score) for row in found.top]
    assert rows == [
        ("alpha", "proponent", 1, 17, 5.0),
        ("alpha", "proponent", 2, 30, 3.0),
        ("alpha", "opponent", 1, 1, -3.0),
        ("beta#0", "proponent", 1, 17, 1.0),
    ]
    assert read_status(str(tmp_path), rows=0).top == ()


def test_every_phase_is_told_by_what_is_there(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(RunError, match="no run's folder"):
        read_status(str(tmp_path))
    store.write("config.yaml", b"seed: 0\n")
    assert read_status(str(tmp_path)).phase == "new"
    store.write("corpus/_inputs.parquet", b"")
    store.write("corpus/part-00000.parquet", b"")
    found = read_status(str(tmp_path))
    assert (found.phase, found.made) == ("prepare", {"corpus parts": 1})
    value = {"shards": 2, "shard_sequences": 4, "selection": {"size": 8}}
    store.write_json("plan.json", value)
    assert read_status(str(tmp_path)).phase == "fit"
    plan(store, 2)
    assert read_status(str(tmp_path)).phase == "queries"
    put_shard(store / "sieve", "shard-000000", [0], [])
    found = read_status(str(tmp_path))
    assert (found.phase, found.done, found.shards, found.top) == ("sieve", 1, 2, ())
    store.write_json("sieve/candidates.json", {"shards": 2, "sequences": 5})
    found = read_status(str(tmp_path))
    assert (found.phase, found.done, found.sequences) == ("queries", 0, 5)
    put_shard(store, "shard-000000", [0], [])
    assert read_status(str(tmp_path)).phase == "scan"
    put_shard(store, "shard-000001", [4], [])
    found = read_status(str(tmp_path))
    assert (found.phase, found.eta_s) == ("refine", 0.0 if found.sequences_per_s else None)


def test_an_index_is_under_way_until_its_list_of_files_is_there(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_json("plan.json", {"shards": 2, "shard_sequences": 4, "selection": {"size": 8}})
    store.write("codes/shard-000000.arrow", b"")
    found = read_status(str(tmp_path))
    assert (found.phase, found.done, found.shards, found.top) == ("index", 1, 2, ())
    assert exit_code(found) == NOTHING_ALIVE
    store.write("codes/shard-000001.arrow", b"")
    store.write_json("index.json", {})
    found = read_status(str(tmp_path))
    assert (found.phase, found.done, found.top) == ("finished", 2, ())
    assert exit_code(found) == 0
    # Beside a scan, the scan's shards and its publication say how far it is.
    plan(store, 2)
    assert read_status(str(tmp_path)).phase == "queries"


def test_a_folder_of_factors_is_no_run(tmp_path: Path) -> None:
    Store(str(tmp_path)).write_json("plan.json", {"fields": {"fitting": 2}})
    with pytest.raises(RunError, match=r"factors' plan\.json"):
        read_status(str(tmp_path))


def test_a_published_run_shows_its_published_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(tmp_path))
    plan(store, 2)
    published(store)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = read_status(str(tmp_path), rows=1)
    assert (found.phase, found.done, found.eta_s, found.read) == ("finished", 2, None, None)
    best = [(row.query_id, row.side, row.sequence_id) for row in found.top]
    assert best == [("alpha", "opponent", 11), ("alpha", "proponent", 1), ("beta#1", "proponent", 1)]
    main(None, ["status", str(tmp_path), "--top", "1"])
    shown = capsys.readouterr().out
    assert "shards      2 of 2 done" in shown
    assert "proponent   1  sequence            1  +5" in shown
    main(None, ["status", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["phase"] == "finished"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_fit_says_what_it_has_left_though_the_scan_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path))
    store.write_json("plan.json", {"shards": 2, "shard_sequences": 4, "selection": {"size": 8}})
    for slice_index in range(3):
        store.write(f"factors/covariance/group-000-slice-{slice_index:04d}.safetensors", b"")
    show_status(read_status(str(tmp_path)))
    shown = capsys.readouterr().out
    assert "phase       fit" in shown
    assert "made        3 covariance sums" in shown


def test_a_sweep_shows_its_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for cell in ("model=a", "model=b", "model=c"):
        Store(f"{tmp_path}/{cell}").write("config.yaml", b"seed: 0\n")
    plan(Store(f"{tmp_path}/model=a"), 2)
    published(Store(f"{tmp_path}/model=a"))
    plan(Store(f"{tmp_path}/model=b"), 2)
    put_shard(Store(f"{tmp_path}/model=b"), "shard-000000", [0], [])
    cells = read_sweep(str(tmp_path))
    assert exit_code(*cells.values()) == NOTHING_ALIVE
    show_sweep(str(tmp_path), cells)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": 1 of 3 cells finished; nothing works on the others")
    assert [line.split() for line in lines[1:]] == [
        ["finished", "2", "of", "2", "shards", "model=a"],
        ["scan", "1", "of", "2", "shards", "model=b"],
        ["new", "model=c"],
    ]
    phases = {"model=a": "finished", "model=b": "scan", "model=c": "new"}
    assert {cell: status.phase for cell, status in cells.items()} == phases


def test_what_a_run_says_cannot_control_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(tmp_path))
    plan(store, 2)
    store.write_json("quarantine/shard-000001.json", {"reason": "\x1b[31m[bold]red\r\n"})
    show_status(read_status(str(tmp_path)))
    assert "quarantine  shard-000001: [31m[bold]red" in capsys.readouterr().out.replace(" [31m", "[31m")


def test_an_object_store_is_read_the_same_way() -> None:
    store = Store("memory://status-test/run")
    plan(store, 3)
    put_shard(store, "shard-000001", [4, 5], [("alpha", "proponent", 5, 2.0)])
    found = read_status(store.uri)
    assert (found.phase, found.done, [row.sequence_id for row in found.top]) == ("scan", 1, [5])
    assert found.last is not None


ELSEWHERE = Host("node-17", "another-boot", "another-namespace")


def drive(store: Store, *, host: Host | None = None, pid: int, began: int, **more: Any) -> None:
    """driver.json as a driver writes it."""
    value = {"token": "x", "host": asdict(host or this_host()), "pid": pid, "began": began}
    store.write_json("driver.json", value | {"since": "2026-11-28T23:06:49+00:00", "lease_s": 60.0, "beat": 3} | more)


def driver(store: Store) -> Driver:
    return read_status(store.uri).driver


def test_a_driver_of_this_machine_lives_as_long_as_its_process_however_long_it_is_silent(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        drive(store, pid=child.pid, began=process_began(child.pid))
        os.utime(tmp_path / "driver.json", (1000.0, 1000.0))
        found = driver(store)
        assert (found.alive, found.killed, found.pid) == (True, False, child.pid)
    finally:
        child.kill()
        child.wait()
    found = driver(store)
    assert (found.alive, found.killed) == (False, True)
    assert exit_code(read_status(store.uri)) == NOTHING_ALIVE


def test_a_younger_process_of_the_same_number_is_not_the_driver(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    drive(store, pid=os.getpid(), began=process_began(os.getpid()) - 1)
    assert (driver(store).alive, driver(store).killed) == (False, True)


@pytest.mark.parametrize(("age_s", "alive"), [(10.0, True), (50.0, True), (70.0, False), (86400.0, False)])
def test_a_driver_of_another_machine_lives_as_long_as_it_renews_its_lease(
    tmp_path: Path, age_s: float, alive: bool
) -> None:
    store = Store(str(tmp_path))
    drive(store, host=ELSEWHERE, pid=os.getpid(), began=process_began(os.getpid()))
    moment = time.time() - age_s
    os.utime(tmp_path / "driver.json", (moment, moment))
    found = driver(store)
    assert (found.alive, found.killed, found.host) == (alive, False, "node-17")
    assert found.heartbeat_age_s == pytest.approx(age_s, abs=5.0)


def test_a_store_whose_clock_is_ahead_makes_no_age_negative(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    drive(store, host=ELSEWHERE, pid=1, began=1)
    os.utime(tmp_path / "driver.json", (time.time() + 600.0,) * 2)
    assert (driver(store).alive, driver(store).heartbeat_age_s) == (True, 0.0)


def test_an_object_store_tells_the_heartbeat_too() -> None:
    store = Store("memory://status-test/driven")
    drive(store, host=ELSEWHERE, pid=1, began=1)
    found = driver(store)
    assert found.alive
    assert found.heartbeat_age_s is not None
    assert found.heartbeat_age_s < 60.0


def test_what_the_driver_waits_for_is_read_where_it_says_so(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    drive(store, pid=os.getpid(), began=process_began(os.getpid()))
    assert driver(store).state is None
    drive(store, pid=os.getpid(), began=process_began(os.getpid()), state="waiting for capacity: none")
    assert driver(store).state == "waiting for capacity: none"
    drive(store, pid=os.getpid(), began=process_began(os.getpid()), state="")
    assert driver(store).state is None


@pytest.mark.parametrize("value", [[], {}, {"host": "vm"}, {"pid": 7}, {"host": {"name": "vm"}, "lease_s": None}])
def test_a_lease_of_another_version_is_nobodys(tmp_path: Path, value: Any) -> None:
    store = Store(str(tmp_path))
    store.write("config.yaml", b"seed: 0\n")
    store.write_json("driver.json", value)
    assert driver(store) == Driver()


NOBODY, LIVES = Driver(), Driver(alive=True)


@pytest.mark.parametrize(
    ("cells", "code"),
    [
        ([("finished", NOBODY)], 0),
        ([("finished", Driver(killed=True))], 0),
        ([("scan", LIVES)], 0),
        ([("new", NOBODY)], 3),
        ([("scan", NOBODY)], 3),
        ([("refine", Driver(killed=True))], 3),
        ([("finished", NOBODY), ("finished", NOBODY)], 0),
        ([("finished", NOBODY), ("scan", NOBODY)], 3),
        ([("scan", NOBODY), ("scan", LIVES)], 0),
    ],
)
def test_the_status_is_3_where_something_is_unfinished_and_nothing_lives(
    cells: list[tuple[str, Driver]], code: int
) -> None:
    assert exit_code(*(Status("runs/a", phase, driver=driver) for phase, driver in cells)) == code


def test_json_says_whether_the_driver_lives_and_since_when_it_is_silent(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write("config.yaml", b"seed: 0\n")
    told = json.loads(json.dumps(read_status(store.uri).to_json()))
    assert (told["driver"]["alive"], told["driver"]["heartbeat_age_s"]) == (False, None)
    drive(store, pid=os.getpid(), began=process_began(os.getpid()))
    told = json.loads(json.dumps(read_status(store.uri).to_json()))
    assert told["driver"]["alive"]
    assert 0.0 <= told["driver"]["heartbeat_age_s"] < 60.0


def test_the_command_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['infscan', 'status', sys.argv[1]]\n"
        "from infscan.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, {'torch', 'ray', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 set()"
    assert "error: " in done.stderr
