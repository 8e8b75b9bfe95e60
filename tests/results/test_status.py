"""Where a run stands is read from its folder: every phase, whatever is missing, and without changing a byte of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from infscan.__main__ import main
from infscan.errors import RunError
from infscan.results.status import read_status
from infscan.storage import Store
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
    put_shard(store, "shard-000000", [0], [])
    assert read_status(str(tmp_path)).phase == "scan"
    put_shard(store, "shard-000001", [4], [])
    found = read_status(str(tmp_path))
    assert (found.phase, found.eta_s) == ("refine", 0.0 if found.sequences_per_s else None)


def test_a_published_run_shows_its_published_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(tmp_path))
    plan(store, 2)
    published(store)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found = read_status(str(tmp_path), rows=1)
    assert (found.phase, found.done, found.eta_s, found.read) == ("finished", 2, None, None)
    best = [(row.query_id, row.side, row.sequence_id) for row in found.top]
    assert best == [("alpha", "opponent", 11), ("alpha", "proponent", 1), ("beta#1", "proponent", 1)]
    main(["status", str(tmp_path), "--top", "1"])
    shown = capsys.readouterr().out
    assert "shards      2 of 2 done" in shown
    assert "proponent   1  sequence            1  +5" in shown
    main(["status", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["phase"] == "finished"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_fit_says_what_it_has_left_though_the_scan_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path))
    store.write_json("plan.json", {"shards": 2, "shard_sequences": 4, "selection": {"size": 8}})
    for slice_index in range(3):
        store.write(f"factors/covariance/group-000-slice-{slice_index:04d}.safetensors", b"")
    main(["status", str(tmp_path)])
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
    main(["status", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": 1 of 3 cells finished")
    assert [line.split() for line in lines[1:]] == [
        ["finished", "2", "of", "2", "shards", "model=a"],
        ["scan", "1", "of", "2", "shards", "model=b"],
        ["new", "model=c"],
    ]
    main(["status", str(tmp_path), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {cell: status["phase"] for cell, status in found.items()} == {
        "model=a": "finished",
        "model=b": "scan",
        "model=c": "new",
    }


def test_what_a_run_says_cannot_control_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(tmp_path))
    plan(store, 2)
    store.write_json("quarantine/shard-000001.json", {"reason": "\x1b[31m[bold]red\r\n"})
    main(["status", str(tmp_path)])
    assert "quarantine  shard-000001: [31m[bold]red" in capsys.readouterr().out.replace(" [31m", "[31m")


def test_an_object_store_is_read_the_same_way() -> None:
    store = Store("memory://status-test/run")
    plan(store, 3)
    put_shard(store, "shard-000001", [4, 5], [("alpha", "proponent", 5, 2.0)])
    found = read_status(store.uri)
    assert (found.phase, found.done, [row.sequence_id for row in found.top]) == ("scan", 1, [5])
    assert found.last is not None


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
