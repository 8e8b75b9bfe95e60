"""Files and habits of people who do this job, through the real command: the right rows, or one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infscan.cli import main
from infscan.results.read import read_sequences, read_summary, read_top
from tests.steps.runs import tiny_model, write_jsonl
from tests.test_queries import spm_tokenizer

HERE = "cluster.backend=in_process"


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """A command's exit status, and what it said on either stream, on one line."""
    capsys.readouterr()
    code = 0
    try:
        main(None, list(words))
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, " ".join(f"{said.out} {said.err}".split())


@pytest.fixture(scope="module")
def spm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("models") / "spm", vocab=16)
    spm_tokenizer(folder)
    return folder


def strongest(run: Path, query: str) -> dict[str, Any]:
    rows = [row for row in read_top(str(run)).to_pylist() if row["query_id"] == query and row["side"] == "proponent"]
    return rows[0]


def test_prompt_and_completion_are_measured_as_a_corpus_has_them(
    tmp_path: Path, spm_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fact = "the island is Velmistok"
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"id": "d0", "text": fact}, {"id": "d1", "text": "the said, yes"}])
    rows = [
        {"id": "first", "prompt": "the island is", "completion": " Velmistok", "measure": "first"},
        {"id": "trailing", "prompt": "the island is ", "completion": "Velmistok"},
        {"id": "rather", "prompt": "the island is", "completion": " Velmistok", "contrast": " yes"},
    ]
    queries = write_jsonl(tmp_path / "queries.jsonl", rows)
    run = tmp_path / "run"
    code, said = command(
        capsys, "scan", f"model.path={spm_model}", f"corpus.path={corpus}", f"queries.path={queries}",
        "corpus.packing=document", "factors.slices=1", HERE, f"output={run}",
    )  # fmt: skip
    assert code == 0
    assert {strongest(run, query)["document_id"] for query in ("first", "trailing", "rather")} == {"d0"}
    assert "measured: ‘ Vel’ +1" in said
    assert "measured: ‘ Vel’‘mistok’ rather than ‘ yes’" in said
    assert "the token ' Vel' spans the prompt's end" in " ".join(read_summary(str(run))["warnings"])
    assert len(read_sequences(str(run))) == 2
    command(capsys, "report", f"run={run}")
    assert "spans the prompt" in (run / "report.html").read_text()
