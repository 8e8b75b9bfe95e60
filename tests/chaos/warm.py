"""A warm template of this project's processes: what it forks has torch, transformers and infscan imported already.

Starting a rank costs its imports (7 s of CPU); a hundred runs under faults could not afford them. `template()` starts
the one process that imports; `WORKER` stands where Ray has its script that sets a worker up, and has the template fork
one instead; `Child` is a driver forked likewise. They are Ray's real workers and real drivers: they are killed and
stopped like any other.

    with template():
        cluster = Cluster(initialize_head=True, head_node_args={"setup_worker_path": WORKER, ...})
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ADDRESS = "INFSCAN_TEST_TEMPLATE"
WORKER = __file__


def ask(argv: list[str], module: str | None = None) -> socket.socket:
    """Have the template fork a process; the connection closes when it ends, and first brings its process id."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.environ[ADDRESS])
    request = {"argv": argv, "module": module, "env": dict(os.environ), "cwd": os.getcwd()}
    data = json.dumps(request).encode()
    connection.sendall(len(data).to_bytes(4, "big"))
    socket.send_fds(connection, [b"."], [0, 1, 2])
    connection.sendall(data)
    return connection


def as_worker() -> None:
    """In the place of Ray's setup_worker.py: hand the worker's command line to the template, and live as long as it."""
    argv = [word for word in sys.argv[1:] if not word.startswith(("--language=", "--serialized-runtime-env-context="))]
    connection = ask(argv)
    while connection.recv(4096):
        pass


class Child:
    """A forked process of this project's own: a driver."""

    def __init__(self, module: str, *argv: str) -> None:
        self._connection = ask(list(argv), module)
        self.pid = int.from_bytes(self._receive(4), "big")

    def _receive(self, count: int) -> bytes:
        data = b""
        while len(data) < count and (more := self._connection.recv(count - len(data))):
            data += more
        return data

    def wait(self, timeout_s: float = 600.0) -> int | None:
        """Its exit status; None where it was killed."""
        self._connection.settimeout(timeout_s)
        status = self._receive(1)
        return status[0] if status else None


@contextmanager
def template() -> Iterator[None]:
    """The template, for this process and what it starts; gone at the end."""
    with tempfile.TemporaryDirectory(prefix="infscan-warm-") as folder:
        path = str(Path(folder, "socket"))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.warm", "serve", str(listener.fileno())], pass_fds=[listener.fileno()]
        )
        outer = os.environ.get(ADDRESS)
        os.environ[ADDRESS] = path
        try:
            yield
        finally:
            if outer is None:
                del os.environ[ADDRESS]
            else:
                os.environ[ADDRESS] = outer
            listener.close()
            process.kill()
            process.wait()


def serve(listener: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    import tests.chaos.disks
    import tests.steps.runs  # noqa: F401

    # Ray reads its settings, a worker's job among them, from the environment at its import: each child imports it.
    assert "ray" not in sys.modules

    while True:
        connection, _ = listener.accept()
        size = int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big")
        _, fds, _, _ = socket.recv_fds(connection, 1, 3)
        data = connection.recv(size, socket.MSG_WAITALL)
        if len(data) == size and os.fork() == 0:
            listener.close()
            become(json.loads(data), fds, connection)
        for fd in fds:
            os.close(fd)
        connection.close()


def become(request: dict[str, Any], fds: list[int], connection: socket.socket) -> None:
    """In the forked process: take on the asker's streams, folder and environment, then run what was asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    disks = sys.modules["tests.chaos.disks"]
    if disks.STAND_IN in os.environ:
        disks.heed_ballast()
    sys.argv = list(request["argv"])
    status = 1
    try:
        if request["module"] is None:
            runpy.run_path(sys.argv[0], run_name="__main__")
            status = 0
        else:
            connection.sendall(os.getpid().to_bytes(4, "big"))
            status = importlib.import_module(request["module"]).main(sys.argv)
    except SystemExit as ended:
        status = int(ended.code or 0) if not isinstance(ended.code, str) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        if request["module"] is not None:
            connection.sendall(bytes([status]))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        as_worker()
