"""_SUCCESS is the run's manifest: created last and once, followed by readers, and never by a driver without a lease."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import infscan
from infscan.engine.lease import Lease
from infscan.errors import DamagedError, InfscanError, RunError
from infscan.results.manifest import SUCCESS, Manifest, Part, commit, read_manifest
from infscan.results.read import read_layers, read_queries, read_sequences, read_summary, read_tokens, read_top
from infscan.storage import Store
from tests.steps.runs import answer_here, small_run


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    answer_here(small_run(tmp_path, "scan.scores=all"))
    return tmp_path / "run"


READERS = (read_top, read_sequences, read_layers, read_tokens, read_queries)


def made(token: str, names: tuple[str, ...] = ()) -> Manifest:
    return Manifest(token, {name: Part.of(name.encode()) for name in names}, None, "scan", {}, {})


def holds() -> None:
    """The lease is this driver's."""


def test_the_manifest_lists_every_part_and_what_made_the_run(finished: Path) -> None:
    manifest = read_manifest(Store(str(finished)))
    assert manifest is not None
    for folder in ("top", "layers", "tokens", "sequences"):
        assert manifest.names(folder) == sorted(f"{folder}/{path.name}" for path in (finished / folder).iterdir())
        assert sum(manifest.parts[name].rows or 0 for name in manifest.names(folder)) > 0
    for name, part in manifest.parts.items():
        assert Part.of((finished / name).read_bytes(), part.rows) == part
    assert set(manifest.parts) >= {"summary.json", "run.parquet", "config.yaml", "plan.json", "queries/queries.parquet"}
    assert len(manifest.scores or ()) == 5
    assert manifest.counts == read_summary(str(finished))["counts"]
    plan = json.loads((finished / "plan.json").read_text())
    assert manifest.made_by == plan["made_by"] == read_summary(str(finished))["made_by"]
    assert {"arithmetic", "infscan", "commit", "torch", "transformers", "tokenizers", "numpy", "python", "cpu"} <= set(
        manifest.made_by
    )
    (row,) = pq.read_table(finished / "run.parquet").to_pylist()
    assert {key: row[key] for key in manifest.made_by} == dict(manifest.made_by)
    assert infscan.verify(str(finished)).has_manifest


@pytest.mark.parametrize("reader", READERS)
def test_a_part_that_is_another_whole_file_or_gone_is_refused(finished: Path, reader: object) -> None:
    folder = getattr(reader, "__name__", "").removeprefix("read_")
    part = next((finished / folder).glob("*.parquet"))
    whole = part.read_bytes()
    pq.write_table(pq.read_table(part).slice(1), part)
    with pytest.raises(DamagedError, match=rf"{part.name} is not what _SUCCESS says was published"):
        reader(str(finished))  # type: ignore[operator]
    with pytest.raises(DamagedError, match=part.name):
        infscan.verify(str(finished))
    part.unlink()
    with pytest.raises(InfscanError, match=part.name):
        reader(str(finished))  # type: ignore[operator]
    part.write_bytes(whole)
    infscan.verify(str(finished))


@pytest.mark.parametrize("name", ["summary.json", "scores/shard-000001.parquet", "shards/shard-000001.parquet"])
def test_verify_finds_damage_wherever_it_is(finished: Path, name: str) -> None:
    path = finished / name
    data = bytearray(path.read_bytes())
    # A single bit of Parquet may be one that nobody reads.
    for at in range(len(data) // 3, len(data) // 2, 7):
        data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=path.name):
        infscan.verify(str(finished))


def test_an_earlier_publications_part_is_found_by_verify_and_overlooked_by_readers(finished: Path) -> None:
    top = read_top(str(finished))
    stranger, own = finished / "top" / "part-00007-0123456789ab.parquet", finished / "top" / "notes.parquet"
    for path in (stranger, own):
        path.write_bytes(next((finished / "top").glob("part-*.parquet")).read_bytes())
    assert read_top(str(finished)).equals(top)
    with pytest.raises(DamagedError, match=rf"{stranger.name} is not of this publication"):
        infscan.verify(str(finished))


def test_a_rerun_removes_its_own_stale_parts_and_keeps_what_a_user_put_beside_them(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    answer_here(config)
    top = tmp_path / "run" / "top"
    for name in ("part-00007-0123456789ab.parquet", "part-00007.parquet", "notes.parquet", "thesis.tex"):
        (top / name).write_bytes(b"x")
    before = {path.name for path in top.iterdir()}
    answer_here(config)
    gone = {"part-00007-0123456789ab.parquet", "part-00007.parquet"}
    assert {path.name for path in top.iterdir()} == before - gone


def test_an_empty_success_of_an_earlier_version_is_still_read(finished: Path) -> None:
    tables = [read(str(finished)) for read in READERS]
    (finished / SUCCESS).write_bytes(b"")
    assert [read(str(finished)) for read in READERS] == tables
    assert not infscan.verify(str(finished)).has_manifest


@pytest.mark.parametrize("damage", [b"{}", b"{", b"[" * 100_000, b"\xff", b"null"])
def test_a_damaged_manifest_is_one_sentence(finished: Path, damage: bytes) -> None:
    (finished / SUCCESS).write_bytes(damage)
    with pytest.raises(DamagedError, match="_SUCCESS is damaged"):
        read_top(str(finished))


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path) if request.param == "local" else request.getfixturevalue("moto_s3").uri())


def test_a_commit_is_created_once_and_the_holder_has_the_last_word(store: Store) -> None:
    commit(store, made("first"), holds)
    commit(store, made("first"), holds)
    commit(store, made("second"), holds)
    manifest = read_manifest(store)
    assert manifest is not None
    assert manifest.token == "second"


def test_a_driver_without_the_lease_neither_commits_nor_removes(store: Store) -> None:
    first, second = Lease(store, 60.0), Lease(store, 60.0)
    first.take()
    first.confirm()
    # A second driver took the first one for dead.
    store.write("driver.json", second.mine.to_bytes())
    commit(store, made("second"), second.confirm)
    with pytest.raises(RunError, match="taken over"):
        commit(store, made("first"), first.confirm)
    store.remove("driver.json")
    with pytest.raises(RunError, match=r"driver\.json is gone"):
        second.confirm()
    manifest = read_manifest(store)
    assert manifest is not None
    assert manifest.token == "second"
    first.release()
    second.release()
