"""A Ray cluster of one node as people start one, with a dashboard, and jobs submitted to it from the command line."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.servers import free_ports

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
_DEADLINE_S = 120


@dataclass(frozen=True)
class SubmissionCluster:
    """A head node that takes submissions. env: what a command needs to reach it, its token among it."""

    env: Mapping[str, str]
    log: Path

    def run(self, *words: str, env: Mapping[str, str] | None = None) -> tuple[int, str]:
        """The status of `ray <words>`, run in the repository, and what it prints."""
        done = subprocess.run(
            [str(BIN / "ray"), *words],
            cwd=ROOT,
            env=dict(env or self.env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
        return done.returncode, re.sub(r"\x1b\[\d+m", "", done.stdout)

    def ray(self, *words: str) -> str:
        """What `ray <words>` prints; it must end well."""
        status, said = self.run(*words)
        assert status == 0, said
        return said

    def answers(self) -> bool:
        """Whether it takes submissions."""
        return self.run("job", "list")[0] == 0

    def submit(self, name: str, *words: str, wait: bool = True) -> tuple[int, str]:
        """`ray job submit --working-dir . -- <words>`, as docs/cluster.md has it: its status, and what it prints."""
        mode = [] if wait else ["--no-wait"]
        return self.run("job", "submit", "--submission-id", name, *mode, "--working-dir", ".", "--", *words)

    def job_status(self, name: str) -> str:
        """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
        _, said = self.run("job", "status", name)
        found = re.search(rf"Status for job '{name}': (\w+)|Job '{name}' (?:was )?(\w+)", said)
        assert found is not None, said
        return (found[1] or found[2]).upper()

    def until(self, condition: Callable[[], bool], name: str) -> None:
        """Wait for a condition while the job `name` runs."""
        deadline = time.monotonic() + _DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, self.ray("job", "logs", name)
            time.sleep(0.05)


@contextmanager
def submission_cluster(**env: str) -> Iterator[SubmissionCluster]:
    """`ray start --head` on free ports, token authentication on; its nodes have `env`, as pods have their secrets."""
    client, dashboard, *ports = free_ports(7)
    flags = ["dashboard-agent-listen-port", "dashboard-agent-grpc-port", "ray-client-server-port"]
    flags += ["metrics-export-port", "node-manager-port"]
    outer = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    inner = outer | token | env | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = [
            *(str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--temp-dir={folder}"),
            *(f"--port={client}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--{flag}={port}" for flag, port in zip(flags, ports, strict=True)),
        ]
        log = Path(folder, "start.log")
        with log.open("wb") as output:
            head = subprocess.Popen(command, env=inner, stdout=output, stderr=subprocess.STDOUT)
        try:
            cluster = SubmissionCluster(outer | token | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}, log)
            deadline = time.monotonic() + _DEADLINE_S
            while not cluster.answers():
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(1.0)
            yield cluster
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(60)
