"""Ranks of a worker group without Ray, for tests: `python -m <module> <rank> <world> <port> ...`, one process each."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from infscan.model.loaded import RankContext


def run_ranks(module: str, world: int, *arguments: str, timeout_s: float) -> None:
    """Start `module` once per rank and wait; every rank has to end well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", module]
    ranks = [
        subprocess.Popen([*command, str(rank), str(world), port, *arguments], stdout=subprocess.DEVNULL)
        for rank in range(world)
    ]
    try:
        assert [rank.wait(timeout_s) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()


@contextmanager
def one_rank(rank: int, world: int, port: str) -> Iterator[RankContext]:
    """A rank's place; its process group is left by all ranks together and then taken down.

    A process that ends with threads of its group still running is aborted now and then (SIGABRT).
    """
    yield RankContext(rank, world, address=f"127.0.0.1:{port}", timeout_s=120)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
