"""The real job under random faults: every run's tables are held against an undisturbed twin's, row for row.

A run is a driver process of its own (`tests.chaos.driver`) on a Ray of several raylets that outlives it; ranks and
drivers are forked from a warm template (`tests.chaos.warm`). A fault strikes at a moment drawn from the run's seed:
when the driver hands out its n-th unit of work. A reader looks at every file of the run all the while.

Every fourth run fits factors of its own; the others take the twin's, as they all take its prepared corpus.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from tests.chaos.proxy import Plan, fault_proxy
from tests.chaos.warm import WORKER, Child
from tests.runtime.builders import small_run, token_corpus
from tests.runtime.test_end_to_end import rows_of
from tests.servers import moto

RANK_KILLED, RANK_STOPPED = "a rank: SIGKILL", "a rank: SIGSTOP"
NODE_KILLED, DRIVER_KILLED = "a raylet: SIGKILL", "the driver: SIGKILL, then the same command"
STORAGE = "storage: 500, 503, 429, slow, cut, lost, reset"
FAULTS = (RANK_KILLED, RANK_STOPPED, NODE_KILLED, DRIVER_KILLED, STORAGE)
SHARDS, PER_SHARD = 12, 6
# Units of work that a run hands out: queries, check, the shards, refine; and 2 x 2 of the factors where it fits them.
UNITS, FIT_UNITS = 1 + 1 + SHARDS + 1, 4
TABLES = ("top", "layers", "tokens")
WORKERS = 2


@dataclass
class Result:
    """What became of one run.

    lost_s: its seconds beyond those of an undisturbed run of its kind. meanwhile: units that the other worker was given
    between the fault and the struck worker's return.
    """

    fault: str
    seed: int
    struck_at: int
    seconds: float
    lost_s: float
    recovered: bool
    torn: list[str]
    redone: list[str]
    said: str = ""
    meanwhile: int = 0


@dataclass
class Reader:
    """Reads every visible file of a run, again and again: what is there must be whole."""

    folder: Path
    torn: list[str] = field(default_factory=list)
    looked: int = 0
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def reading(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            self.look()

    def _run(self) -> None:
        while not self._ended.wait(0.1):
            self.look()

    def look(self) -> None:
        for path in sorted(self.folder.rglob("[!.]*")):
            with suppress(FileNotFoundError):
                status = path.stat()
                known = (status.st_ino, status.st_mtime_ns)
                if path.is_dir() or self._seen.get(str(path)) == known:
                    continue
                data = path.read_bytes()
                self._seen[str(path)] = known
                self.looked += 1
                if not _is_whole(path.suffix, data):
                    self.torn.append(path.relative_to(self.folder).as_posix())


def _is_whole(suffix: str, data: bytes) -> bool:
    try:
        if suffix == ".parquet":
            pq.read_table(pa.BufferReader(data))
        elif suffix == ".json":
            json.loads(data)
        elif suffix == ".safetensors":
            load_tensors(data)
    except (ValueError, OSError, pa.ArrowException, SafetensorError):
        return False
    return True


class Harness:
    """One Ray with a node for the driver's tasks and one node per worker, a twin, and runs beside it.

    Used as a context; `root` takes the runs. Object storage is moto's server behind a proxy that plays faults.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        token_corpus(root / "corpus.jsonl", SHARDS * PER_SHARD)
        small_run(root)
        self._open = ExitStack()

    def __enter__(self) -> Harness:
        server = self._open.enter_context(moto())
        self.proxy = self._open.enter_context(fault_proxy(server, slow_s=0.05))
        server.make_bucket("chaos")
        patch = self._open.enter_context(pytest.MonkeyPatch.context())
        # Before the raylets start, whose environment the ranks have.
        for name, value in self.proxy.server.env.items():
            patch.setenv(name, value)
        patch.setenv("INFSCAN_STORAGE_RETRY_S", "20")
        health = {"period_ms": 1000, "failure_threshold": 4, "timeout_ms": 1000, "initial_delay_ms": 0}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "setup_worker_path": WORKER,
                "include_dashboard": False,
                "_system_config": {f"health_check_{name}": value for name, value in health.items()},
            },
        )
        self._open.callback(self.cluster.shutdown)
        self.nodes = [self._add_node() for _ in range(WORKERS)]
        self.cluster.wait_for_nodes()
        self._undisturbed("twin", "--corpus", "--factors")
        self.scan_s = self._undisturbed("twin-scan")
        self.expected = self._tables("twin")
        assert self._tables("twin-scan") == self.expected
        return self

    @cached_property
    def fit_s(self) -> float:
        """Seconds of an undisturbed run that fits factors of its own; measured when it is first asked for."""
        seconds = self._undisturbed("twin-fit", "--factors")
        assert self._tables("twin-fit") == self.expected
        return seconds

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def _add_node(self) -> Any:
        return self.add_node(num_cpus=1)

    def add_node(self, num_cpus: int) -> Any:
        return self.cluster.add_node(num_cpus=num_cpus, setup_worker_path=WORKER)

    def _output(self, name: str) -> str:
        return f"s3://chaos/{name}" if name.startswith("storage") else str(self.root / name)

    def _overrides(self, name: str, *own: str) -> list[str]:
        """own: `--corpus`, `--factors`: made by this run, else taken from the twin."""
        root, twin = self.root, self.root / "twin"
        corpus = root / "corpus.jsonl" if "--corpus" in own else twin / "corpus"
        settings = [
            f"model.path={root / 'model'}", f"corpus.path={corpus}", "corpus.tokens_field=tokens",
            "corpus.packing=document", f"queries.path={root / 'queries.jsonl'}", "factors.slices=2", "scan.rank=8",
            "scan.top_k=5", f"scan.shard_sequences={PER_SHARD}", "scan.tokens_per_batch=256",
            f"output={self._output(name)}", f"cluster.num_workers={WORKERS}", f"cluster.address={self.cluster.address}",
            "cluster.heartbeat_s=0.5", "cluster.silence_s=4", "cluster.capacity_s=120", "cluster.max_attempts=2",
        ]  # fmt: skip
        return settings if "--factors" in own else [*settings, f"factors.path={twin / 'factors'}"]

    def _tables(self, name: str) -> dict[str, Any]:
        rows = rows_of(self._output(name))
        return {table: rows[table] for table in TABLES}

    def drive(self, name: str, *own: str, kill_at: int = 0, overrides: Sequence[str] = ()) -> Child:
        """A driver of the run `name`, started; it kills itself when it hands out its unit number `kill_at`."""
        order = {
            "address": self.cluster.address,
            "overrides": [*self._overrides(name, *own), *overrides],
            "kill_at": kill_at,
            "report": str(self.root / f"{name}.report.json"),
            "progress": str(self.root / f"{name}.progress"),
        }
        path = self.root / f"{name}.order.json"
        path.write_text(json.dumps(order))
        return Child("tests.chaos.driver", str(path))

    def said(self, name: str) -> str:
        """The error that the run's driver ended with; '' where it ended well."""
        report = self.root / f"{name}.report.json"
        return json.loads(report.read_text()).get("error", "") if report.exists() else "the driver left no report"

    def _undisturbed(self, name: str, *own: str) -> float:
        began = time.monotonic()
        assert self.drive(name, *own).wait() == 0, self.said(name)
        return time.monotonic() - began

    def run(self, fault: str, seed: int) -> Result:
        """One run, struck once (storage: all the while); where the driver was killed, the same command again."""
        draw = random.Random(f"{fault} {seed}")
        own = ["--factors"] if seed % 4 == 3 else []
        at = draw.randint(1, UNITS + FIT_UNITS * len(own))
        name = f"{fault.partition(':')[0].replace(' ', '-')}-{FAULTS.index(fault)}-{seed}"
        folder = self.root / name
        reader = Reader(folder)
        before: dict[str, tuple[int, int, int]] = {}
        meanwhile = 0
        began = time.monotonic()
        with reader.reading():
            if fault == DRIVER_KILLED:
                self.drive(name, *own, kill_at=at).wait()
                before = _shard_files(folder)
                status = self.drive(name, *own).wait()
            elif fault == STORAGE:
                self.proxy.plan = Plan(seed, rate=0.1)
                status = self.drive(name, *own).wait()
                self.proxy.plan = None
            else:
                driver = self.drive(name, *own)
                before, struck = self._strike(name, fault, at, draw)
                status = driver.wait()
                meanwhile = self._meanwhile(name, struck)
        seconds = time.monotonic() - began
        after = _shard_files(folder)
        redone = sorted(shard for shard, facts in before.items() if after.get(shard) != facts)
        recovered = status == 0 and self._tables(name) == self.expected
        lost = seconds - (self.fit_s if own else self.scan_s)
        return Result(fault, seed, at, seconds, lost, recovered, reader.torn, redone, self.said(name), meanwhile)

    def _handed_out(self, name: str) -> list[tuple[float, int, int]]:
        """When, to which worker, and the process id of its rank, for every unit so far."""
        progress = self.root / f"{name}.progress"
        whole = progress.read_text().rpartition("\n")[0] if progress.exists() else ""
        return [(float(when), int(worker), int(pid)) for when, worker, pid in map(str.split, whole.splitlines())]

    def _strike(
        self, name: str, fault: str, at: int, draw: random.Random
    ) -> tuple[dict[str, tuple[int, int, int]], tuple[float, int] | None]:
        """Wait until the driver has handed out `at` units, then do it.

        The shard files that were there; and when which worker was struck, where one was.
        """
        while len(handed_out := self._handed_out(name)) < at:
            if (self.root / f"{name}.report.json").exists():
                return {}, None
            time.sleep(0.01)
        before = _shard_files(self.root / name)
        if fault == NODE_KILLED:
            index = draw.randrange(WORKERS)
            self.cluster.remove_node(self.nodes[index], allow_graceful=False)
            self.nodes[index] = self._add_node()
            return before, None
        _, worker, pid = draw.choice(handed_out)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if fault == RANK_KILLED else signal.SIGSTOP)
        return before, (time.time(), worker)

    def _meanwhile(self, name: str, struck: tuple[float, int] | None) -> int:
        if struck is None:
            return 0
        when, worker = struck
        later = [entry for entry in self._handed_out(name) if entry[0] > when]
        back = min((time for time, who, _ in later if who == worker), default=float("inf"))
        return sum(time < back and who != worker for time, who, _ in later)


def _shard_files(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in (folder / "shards").glob("*.parquet"):
        status = path.stat()
        found[path.name] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found


def table(results: list[Result], scan_s: float, fit_s: float) -> str:
    """fault, runs, recovered, median and worst time lost, as Markdown."""
    lines = [
        f"An undisturbed run took {scan_s:.1f} s, {fit_s:.1f} s with factors of its own.",
        "",
        "| fault | runs | recovered | shards redone | torn files seen | median time lost | most |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault in dict.fromkeys(result.fault for result in results):
        mine = [result for result in results if result.fault == fault]
        lost = [result.lost_s for result in mine]
        lines.append(
            f"| {fault} | {len(mine)} | {sum(result.recovered for result in mine)} | "
            f"{sum(len(result.redone) for result in mine)} | {sum(len(result.torn) for result in mine)} | "
            f"{statistics.median(lost):.1f} s | {max(lost):.1f} s |"
        )
    return "\n".join(lines)
