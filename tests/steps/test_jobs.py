"""Jobs as people run them: in processes of their own, killed and run again, swept."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from infscan.results.read import read_summary
from tests.steps.runs import tiny_model, token_corpus, token_queries
from tests.steps.test_end_to_end import rows_of

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


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


def finish(process: subprocess.Popen[str]) -> str:
    status, output = end(process)
    assert status == 0, output
    return output


def doc_block(name: str) -> str:
    """The code block of docs/reading.md that begins with `# reading: <name>`."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "reading.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"# reading: {name}\n")]
    return found


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
def test_a_sweep_of_models_and_queries_is_resumed_and_compared_with_one_query(
    inputs: list[str], tmp_path: Path
) -> None:
    """A folder per cell; a cell that fails keeps no other from its work; run again, only that one is done."""
    root = Path(inputs[0].removeprefix("model.path=")).parent
    tiny_model(root / "second", seed=1)
    kept = [value for value in inputs if not value.startswith(("queries.path=", "model.path="))]
    command = [
        "-m", *kept, f"output={tmp_path}", f"model.path={root / 'model'},{root / 'second'},{root / 'third'}",
        f"queries.path={root / 'queries.jsonl'},{root / 'others.jsonl'}",
        f"factors.path={tmp_path}/factors/${{model.path}}",
    ]  # fmt: skip
    status, said = end(start(*command))
    assert status == 2
    assert "2 of 6 cells failed; the same command runs them again" in said
    assert said.count("third") >= 2
    cells = sorted(path.parent for path in tmp_path.glob("*/_SUCCESS"))
    assert len(cells) == 4
    assert said.count("covariance") == 2, "queries of one model share its factors"
    done = {path: os.stat(path).st_mtime_ns for path in tmp_path.glob("*/shards/*.parquet")}

    tiny_model(root / "third", seed=2)
    status, said = end(start(*command))
    assert status == 0, said
    assert len(list(tmp_path.glob("*/_SUCCESS"))) == 6
    assert {path: os.stat(path).st_mtime_ns for path in done} == done

    answer = doc_block("duckdb sweep").replace("runs/sweep", str(tmp_path))
    names: dict[str, Any] = {}
    exec(compile(answer, "<docs/reading.md>", "exec"), names)
    rows = names["answer"].fetchall()
    compared = {(query, Path(model).name) for query, model, _ in rows}
    assert {model for _, model in compared} == {"model", "second", "third"}
    assert len(rows) == 3 * 3, "q0, q1, q2 of others.jsonl and q0, q1 of queries.jsonl have the same ids"


@pytest.mark.slow
def test_hydras_ray_launcher_runs_cells_at_once_on_one_ray(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An extra (`pip install hydra-ray-launcher`), as docs/cluster.md has it; installed here for this test alone."""
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={packages}"]
    subprocess.run([*install, "hydra-ray-launcher==1.2.2", "cloudpickle<3"], check=True)
    monkeypatch.setenv("PYTHONPATH", f"{packages}:{ROOT}")
    others = inputs[4].replace("queries.jsonl", "others.jsonl").removeprefix("queries.path=")
    swept = [value for value in inputs if not value.startswith("queries.path=")]
    finish(start(
        "-m", *swept, f"{inputs[4]},{others}", f"output={tmp_path / 'sweep'}", "hydra/launcher=ray",
        "+hydra.launcher.ray.remote.num_cpus=0", "+hydra.launcher.ray.init.num_cpus=4",
    ))  # fmt: skip
    assert len(list(tmp_path.glob("sweep/*/_SUCCESS"))) == 2


def test_the_configuration_of_a_job_can_be_printed(inputs: list[str]) -> None:
    output = finish(start(*inputs, "--cfg", "job"))
    assert "top_k: 5" in output
