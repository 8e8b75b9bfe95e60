"""Storage that ends the process, or a rank, at the n-th call: before it, amid it, or after it took effect."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

from infscan.config import Config
from infscan.storage.local import LocalDisk
from infscan.storage.remote import ObjectStore
from infscan.storage.tempnames import temporary_name
from tests.chaos.one_process import RankKilled, on_rank
from tests.steps.runs import small_run, tiny_model, token_corpus, token_queries

OPERATIONS = ("read", "open", "write", "create", "stat", "find", "names", "remove", "sweep", "check_space")
CHANGING = ("write", "create", "remove")
_PID_MAX = 1 << 22


class Crash(BaseException):
    """The process is gone: no code may take it for an error, and from here on it makes no storage call."""


@dataclass(frozen=True)
class Call:
    """operation: of OPERATIONS. rank: whether a rank made it."""

    operation: str
    address: str
    rank: bool


@dataclass
class Tripwire:
    """Counts storage calls and acts at one of them.

    at: the call's number from 0, of all calls, or of the ranks' with `ranks_only`; None never acts. moment: `before`,
    `amid` (a write leaves half of a hidden file, and no name), `after`. end: what then happens.
    """

    end: Callable[[], NoReturn]
    at: int | None = None
    moment: str = "before"
    ranks_only: bool = False
    calls: list[Call] = field(default_factory=list)
    struck: Call | None = None
    dead: bool = False

    def around(self, operation: str, original: Callable[..., Any], store: Any, address: str, *rest: Any) -> Any:
        if self.dead:
            raise Crash
        call = Call(operation, address, on_rank())
        strikes = False
        if call.rank or not self.ranks_only:
            strikes = len(self.calls) == self.at
            self.calls.append(call)
        if strikes:
            self.struck = call
            if self.moment == "amid":
                leave_half(address, rest[0])
            if self.moment != "after":
                self.end()
        answer = original(store, address, *rest)
        if strikes:
            self.end()
        return answer

    def crash(self) -> NoReturn:
        self.dead = True
        raise Crash


def crash_driver(at: int | None, moment: str = "before") -> Tripwire:
    wire = Tripwire(lambda: wire.crash(), at, moment)
    return wire


def kill_rank(at: int | None, moment: str = "before") -> Tripwire:
    def end() -> NoReturn:
        raise RankKilled

    return Tripwire(end, at, moment, ranks_only=True)


def kill_process(at: int, moment: str = "before") -> Tripwire:
    def end() -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")

    return Tripwire(end, at, moment)


def leave_half(address: str, data: bytes) -> None:
    """What a process that died while it wrote leaves: a hidden file of its own with half of the bytes."""
    folder = Path(address).parent
    folder.mkdir(parents=True, exist_ok=True)
    name = temporary_name().replace(f"-{os.getpid()}-", f"-{_PID_MAX + 1}-")
    (folder / name).write_bytes(data[: len(data) // 2])


@contextmanager
def watched(wire: Tripwire) -> Iterator[Tripwire]:
    """Every storage call of this process goes over the wire."""
    with pytest.MonkeyPatch.context() as patch:
        for backend in (LocalDisk, ObjectStore):
            for operation in OPERATIONS:
                if (original := getattr(backend, operation, None)) is not None:
                    patch.setattr(backend, operation, _over(wire, operation, original))
        yield wire


def _over(wire: Tripwire, operation: str, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(store: Any, address: str, *rest: Any) -> Any:
        return wire.around(operation, original, store, address, *rest)

    return call


def tiny_inputs(root: Path) -> None:
    """A model of one layer, 16 documents in two files, two queries."""
    tiny_model(root / "model", layers=1, width=16)
    for number in range(2):
        token_corpus(root / "corpus" / f"{number}.jsonl", 8, T=16, seed=number)
    token_queries(root / "queries.jsonl", 2)


def tiny_run(root: Path, output: str | Path) -> Config:
    """The smallest run that does everything: prepare, fit, compress, check, scan in shards, refine, publish."""
    return small_run(
        root,
        f"corpus.path={root / 'corpus'}",
        "scan.scores=all",
        "scan.top_k=2",
        "scan.shard_sequences=4",
        "scan.rank=4",
        "scan.check_sequences=4",
        # Renewed by the clock, the lease would make storage calls at any place between the run's own.
        "cluster.lease_s=3600",
        f"output={output}",
    )


def main(root: str, output: str, at: str, moment: str) -> None:
    """A process of its own that is killed at its n-th storage call."""
    from infscan.pipeline import answer
    from tests.chaos.one_process import load_rank, without_ray

    config = tiny_run(Path(root), output)
    load_rank(config)
    with without_ray(), watched(kill_process(int(at), moment)):
        answer(config)


if __name__ == "__main__":
    import sys

    main(*sys.argv[1:])
