"""docker/slurm.sh on this machine, with a real Ray; in SLURM's place an `srun` that runs its command here."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infscan.results.read import read_summary
from tests.steps.runs import tiny_model, token_corpus, token_queries

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
SHARDS, PER_SHARD = 60, 4

SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/sh
[ "$1" = show ] && exec hostname
echo "$@" >> "$SCONTROL_LOG"
"""


def sbatch(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The script as SLURM starts it on a single node without GPUs."""
    env = os.environ | {
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(random.SystemRandom().randrange(10**6)),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "SCONTROL_LOG": str(folder / "scontrol.log"),
    }
    command = ["bash", str(ROOT / "docker" / "slurm.sh"), *arguments]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def end_of_job(script: subprocess.Popen[str]) -> str:
    """What it printed; as SLURM does, what the script left running is ended with it."""
    script.wait(300)
    os.killpg(script.pid, signal.SIGTERM)
    return script.communicate(timeout=60)[0]


def test_a_scan_that_reaches_its_time_limit_is_requeued_and_goes_on(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    arguments = [
        f"model.path={tiny_model(tmp_path / 'model')}",
        f"corpus.path={token_corpus(tmp_path / 'corpus.jsonl', SHARDS * PER_SHARD)}", "corpus.tokens_field=tokens",
        "corpus.packing=document", f"queries.path={token_queries(tmp_path / 'queries.jsonl', 2)}", "scan.top_k=5",
        f"scan.shard_sequences={PER_SHARD}", "factors.num_sequences=32", f"output={tmp_path / 'run'}",
        "cluster.gpus_per_rank=0", "cluster.cpus_per_rank=1",
    ]  # fmt: skip
    shards = tmp_path / "run" / "shards"

    script = sbatch(tmp_path, *arguments)
    while len(list(shards.glob("*.parquet"))) < 3 and script.poll() is None:
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    said = end_of_job(script)
    done = {path: os.stat(path).st_mtime_ns for path in shards.glob("*.parquet")}
    assert 3 <= len(done) < SHARDS, said
    assert (tmp_path / "scontrol.log").read_text().startswith("requeue "), said
    assert not (tmp_path / "run" / "driver.json").exists(), "the driver was ended cleanly"

    said = end_of_job(sbatch(tmp_path, *arguments))
    assert (tmp_path / "run" / "_SUCCESS").exists(), said
    assert {path: os.stat(path).st_mtime_ns for path in done} == done
    assert read_summary(str(tmp_path / "run"))["counts"]["scanned"]["shards"] == SHARDS
