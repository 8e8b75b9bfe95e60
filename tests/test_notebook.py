"""docs/ten-questions.ipynb: every cell runs, on a local run and on one in S3, and its own output is there to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pytest

from tests.conftest import Bucket
from tests.report.finished import finish, write_hostile
from tests.test_reading import publish_run

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "ten-questions.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("notebook")
    write_hostile(folder)
    return folder


def answers(run: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What each cell prints, one after the other in one namespace, with RUN set to `run`."""
    assert 'RUN = "runs/demo"' in CODE[0]
    names: dict[str, Any] = {}
    said = []
    for number, code in enumerate(CODE):
        exec(compile(code.replace('RUN = "runs/demo"', f"RUN = {run!r}"), f"<cell {number}>", "exec"), names)
        said.append(capsys.readouterr().out)
    return said


@pytest.mark.slow
def test_ten_questions_are_answered_alike_locally_and_in_s3(
    folder: Path, s3: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    local = finish(folder)
    remote = finish(folder, f"output={s3.uri()}", f"corpus.path={local.output}/corpus")
    here = answers(local.output, capsys)
    with duckdb.connect() as connection:
        # A connection and a file system of this test alone; the notebook's are the process's.
        connection.register_filesystem(fsspec.filesystem("s3", skip_instance_cache=True))
        monkeypatch.setattr(duckdb, "sql", connection.sql)
        monkeypatch.setattr(duckdb, "register_filesystem", lambda filesystem: None)
        there = answers(remote.output, capsys)
    assert all(here)
    assert here == there


def test_there_are_ten_questions_and_every_answer_is_shown() -> None:
    titles = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown"]
    assert [title.split(".")[0] for title in titles[1:]] == [f"## {number}" for number in range(1, 11)]
    for cell in CELLS:
        if cell["cell_type"] == "code":
            (output,) = cell["outputs"]
            assert output["output_type"] == "stream"
            assert "".join(output["text"]).strip()


def test_it_runs_where_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN is relative to the repository's root; the notebook's working folder is docs/."""
    publish_run(str(tmp_path / "runs" / "demo"))
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    names: dict[str, Any] = {}
    exec(compile(CODE[0], "<cell 0>", "exec"), names)
    assert names["RUN"] == str(tmp_path / "runs" / "demo")
    assert names["QUERY"] == "astrobia"


def test_a_folder_that_does_not_exist_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/runs/missing: no such folder, nor in a folder above"):
        exec(compile(CODE[0].replace("runs/demo", "runs/missing"), "<cell 0>", "exec"), {})
