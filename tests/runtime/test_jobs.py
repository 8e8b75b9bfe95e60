"""Jobs as people run them: in processes of their own, killed and run again, swept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infscan.results.read import read_summary
from tests.runtime.builders import tiny_model, token_corpus, token_queries
from tests.runtime.test_end_to_end import rows_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a run of some seconds: 50 shards."""
    root = tmp_path_factory.mktemp("jobs")
    tiny_model(root / "model")
    token_corpus(root / "corpus.jsonl", 400)
    token_queries(root / "queries.jsonl", 2)
    token_queries(root / "others.jsonl", 3, seed=5)
    return [
        f"model.path={root / 'model'}",
        f"corpus.path={root / 'corpus.jsonl'}",
        "corpus.tokens_field=tokens",
        "corpus.packing=document",
        f"queries.path={root / 'queries.jsonl'}",
        "scan.shard_sequences=8",
        "scan.top_k=5",
        "factors.num_sequences=64",
    ]


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "scan.py"), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
def test_kill_the_driver_and_run_it_again(inputs: list[str], tmp_path: Path) -> None:
    """kill -9 in the middle of the scan; the same command goes on, and the tables are those of an undisturbed run."""
    finish(start(*inputs, f"output={tmp_path / 'undisturbed'}"))
    killed = start(*inputs, f"output={tmp_path / 'killed'}")
    shards = tmp_path / "killed" / "shards"
    while len(list(shards.glob("*.parquet"))) < 5 and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "killed" / "_SUCCESS").exists(), "the run ended before it could be killed"
    done = {path: os.stat(path).st_mtime_ns for path in shards.glob("*.parquet")}
    assert 5 <= len(done) < 50

    output = finish(start(*inputs, f"output={tmp_path / 'killed'}"))
    assert "reused from" in output
    assert {path: os.stat(path).st_mtime_ns for path in done} == done
    assert rows_of(str(tmp_path / "killed")) == rows_of(str(tmp_path / "undisturbed"))
    assert read_summary(str(tmp_path / "killed"))["phases"]["scan"]["sequences"] <= 8 * (50 - len(done))


@pytest.mark.slow
def test_a_sweep_gives_every_cell_a_folder(inputs: list[str], tmp_path: Path) -> None:
    others = inputs[4].replace("queries.jsonl", "others.jsonl").removeprefix("queries.path=")
    swept = [value for value in inputs if not value.startswith("queries.path=")]
    finish(start("-m", *swept, f"{inputs[4]},{others}", f"output={tmp_path}", f"factors.path={tmp_path / 'shared'}"))
    cells = sorted(path.parent for path in tmp_path.glob("*/_SUCCESS"))
    assert len(cells) == 2
    published = sorted(len({row["query_id"] for row in rows_of(str(cell))["top"]}) for cell in cells)
    assert published == [2, 3]


def test_the_configuration_of_a_job_can_be_printed(inputs: list[str]) -> None:
    output = finish(start(*inputs, "--cfg", "job"))
    assert "top_k: 5" in output
