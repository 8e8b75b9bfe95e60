"""A run whose ranks read ahead and write behind leaves what one leaves whose ranks do not, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from infscan.corpus.read_ahead import ReadAhead
from infscan.model.worker import ModelWorker
from infscan.storage import Store
from tests.steps.runs import answer_here, small_run

# Paths, seconds, and digests of both.
_APART = ("config.yaml", "summary.json", "_SUCCESS", "report.html")


def content(output: Path) -> dict[str, bytes]:
    store = Store(str(output))
    return {entry.name: store.read(entry.name) for entry in store.list() if entry.name not in _APART}


def test_what_is_written_does_not_depend_on_when_it_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers: set[ReadAhead] = set()
    read = ReadAhead.read

    def noted(ahead: ReadAhead, *arguments: object) -> object:
        readers.add(ahead)
        return read(ahead, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ReadAhead, "read", noted)
    answer_here(small_run(tmp_path, "scan.scores=all", f"output={tmp_path / 'ahead'}"))
    # Of two slices, twice, one each; of five shards four.
    assert sum(ahead.found for ahead in readers) == 1 + 1 + 4
    readers.clear()
    monkeypatch.setattr(ReadAhead, "begin", lambda ahead, work: None)
    answer_here(small_run(tmp_path, "scan.scores=all", f"output={tmp_path / 'in turn'}"))
    assert sum(ahead.found for ahead in readers) == 0
    ahead, in_turn = content(tmp_path / "ahead"), content(tmp_path / "in turn")
    assert ahead.keys() == in_turn.keys()
    assert [name for name in ahead if ahead[name] != in_turn[name]] == []

    # A shard's file has the rows above the thresholds that were known when it was handed out: one shard earlier.
    monkeypatch.setattr(ModelWorker, "later", lambda worker, write: write())
    answer_here(small_run(tmp_path, "scan.scores=all", f"output={tmp_path / 'at once'}"))
    at_once = content(tmp_path / "at once")
    assert at_once.keys() == ahead.keys()
    differing = [name for name in ahead if ahead[name] != at_once[name]]
    assert all(name.startswith("shards/") for name in differing)
