"""`ray job submit` as docs/cluster.md has it: a real head node with its dashboard and a token, results on a real S3
server, credentials in the nodes' environment."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infscan.results.read import read_summary
from infscan.storage import Store
from tests.conftest import Bucket
from tests.engine.clusters import SubmissionCluster, submission_cluster
from tests.steps.runs import tiny_model, token_corpus, token_queries
from tests.steps.test_end_to_end import rows_of

pytestmark = pytest.mark.slow
SHARDS, PER_SHARD = 80, 8


@pytest.fixture(scope="module")
def cluster(s3: Bucket) -> Iterator[SubmissionCluster]:
    with submission_cluster(**s3.env) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A job of some seconds."""
    root = tmp_path_factory.mktemp("submission")
    model = tiny_model(root / "model", layers=4, width=64)
    corpus = token_corpus(root / "corpus.jsonl", SHARDS * PER_SHARD)
    queries = token_queries(root / "queries.jsonl", 4)
    return [
        "python", "jobs/scan.py", f"model.path={model}", f"corpus.path={corpus}", "corpus.tokens_field=tokens",
        "corpus.packing=document", f"queries.path={queries}", f"scan.shard_sequences={PER_SHARD}", "scan.top_k=5",
        "factors.num_sequences=64",
    ]  # fmt: skip


def driver_of(output: str) -> psutil.Process:
    """The submitted job's own process: not the shell that started it, not the command that submitted it."""
    return next(
        process
        for process in psutil.process_iter(["cmdline"])
        if (line := process.info["cmdline"]) and line[1:2] == ["jobs/scan.py"] and line[-1] == f"output={output}"
    )


def finished_shards(output: str) -> dict[str, str | None]:
    return {entry.name: entry.etag for entry in Store(output).list("shards", ".parquet")}


def test_a_submitted_job_is_watched_killed_stopped_and_submitted_again(
    cluster: SubmissionCluster, job: list[str], s3: Bucket
) -> None:
    """Its status and logs are there while it runs; killed, then stopped, it goes on, to a twin's tables."""
    status, said = cluster.submit("twin", *job, f"output={s3.uri('submission/twin')}")
    assert status == 0, said
    assert f"{SHARDS * PER_SHARD} sequences, " in said, "the answer is printed where one waits for the job"

    output = s3.uri("submission/run")
    command = [*job, f"output={output}"]
    status, said = cluster.submit("killed", *command, wait=False)
    assert status == 0, said
    cluster.until(lambda: len(finished_shards(output)) >= 3, "killed")
    assert cluster.job_status("killed") == "RUNNING"
    driver_of(output).send_signal(signal.SIGKILL)
    done = finished_shards(output)
    assert 3 <= len(done) < SHARDS
    cluster.until(lambda: cluster.job_status("killed") == "FAILED", "killed")
    assert "factors " in cluster.ray("job", "logs", "killed")

    cluster.submit("stopped", *command, wait=False)
    cluster.until(lambda: len(finished_shards(output)) >= len(done) + 3, "stopped")
    cluster.ray("job", "stop", "stopped")
    assert cluster.job_status("stopped") == "STOPPED"
    assert not Store(output).exists("driver.json"), "a stopped driver gives its lease back"
    more = finished_shards(output)
    assert done.items() <= more.items()
    assert len(more) < SHARDS

    status, said = cluster.submit("again", *command)
    assert status == 0, said
    assert cluster.job_status("again") == "SUCCEEDED"
    assert "reused from" in said
    assert more.items() <= finished_shards(output).items()
    assert rows_of(output) == rows_of(s3.uri("submission/twin"))
    assert read_summary(output)["phases"]["scan"]["sequences"] <= PER_SHARD * (SHARDS - len(more))


def test_a_sentence_comes_back_from_a_job_that_cannot_run(cluster: SubmissionCluster, job: list[str]) -> None:
    """The output would lie in Ray's copy of the folder, which goes with the job."""
    status, said = cluster.submit("relative", *job, "output=runs/mine")
    assert status == 1
    assert "error: output=" in said
    assert "which Ray removes; give an address on object storage" in said
    assert "Traceback" not in said.partition("Job 'relative' failed")[0]


def test_the_submitted_folder_is_what_runs(cluster: SubmissionCluster) -> None:
    """An infscan that is installed on the nodes stands behind it."""
    status, said = cluster.submit("which", "python", "-c", "import infscan; print(infscan.__file__)")
    assert status == 0, said
    assert "working_dir_files/_ray_pkg" in said


def test_nobody_submits_without_the_token(cluster: SubmissionCluster) -> None:
    status, said = cluster.run("job", "list")
    assert status == 0, f"with its token the head answers: {said}"
    stranger = {name: value for name, value in cluster.env.items() if name != "RAY_AUTH_TOKEN"}
    for env in (stranger | {"RAY_AUTH_MODE": "disabled"}, stranger | {"RAY_AUTH_TOKEN": "0" * 64}):
        status, said = cluster.run("job", "submit", "--", "true", env=env)
        assert status != 0, said
        assert "submitted successfully" not in said


def test_what_is_uploaded_holds_no_run_and_no_tests(cluster: SubmissionCluster, tmp_path: Path) -> None:
    status, said = cluster.submit("folder", "ls", "-a", ".", "conf", "jobs")
    assert status == 0, said
    names = set(said.split())
    assert {"infscan", "conf", "jobs", "scan.py", "factors"} <= names
    assert not {"runs", ".venv", ".git", "tests", "benchmarks"} & names
