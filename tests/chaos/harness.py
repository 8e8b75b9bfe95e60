"""The real job under random faults: every run's tables are held against an undisturbed twin's, row for row.

A run is a driver process of its own (`tests.chaos.driver`) on a Ray of several raylets that outlives it; drivers are
forked from the warm template that ranks are (`tests.chaos.warm`). A fault strikes at a moment drawn from the seed:
when the driver hands out its n-th unit of work. A reader looks at every file of the run all the while.

Every fourth run fits factors of its own; the others take the twin's, as they all take its prepared corpus.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.cluster_utils import Cluster
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from infscan.results.read import read_summary
from tests.chaos.costs import Event, Result, Span, gaps, in_flight_s, mean_unit_s
from tests.chaos.disks import STAND_IN, FillableDisk, fillable_disk, may_mount
from tests.chaos.proxy import Plan, fault_proxy
from tests.chaos.warm import Child
from tests.servers import moto
from tests.steps.runs import small_run, token_corpus
from tests.steps.test_end_to_end import rows_of

RANK_KILLED, RANK_STOPPED = "a rank: SIGKILL", "a rank: SIGSTOP"
NODE_KILLED, DRIVER_KILLED = "a raylet: SIGKILL", "the driver: SIGKILL, then the same command"
STORAGE = "storage: 500, 503, 429, slow, cut, lost, reset"
DISK_FULL = "a disk: ENOSPC, then room and the same command"
FAULTS = (RANK_KILLED, RANK_STOPPED, NODE_KILLED, DRIVER_KILLED, STORAGE, DISK_FULL)
SHARDS, PER_SHARD = 12, 6
# Units of work that a run hands out: queries, check, the shards, refine; and 2 x 2 of the factors where it fits them.
UNITS, FIT_UNITS = 1 + 1 + SHARDS + 1, 4
TABLES = ("top", "layers", "tokens")
WORKERS = 2


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
        if not may_mount(self.root / "disk"):
            patch.setenv(STAND_IN, "1")
        health = {"period_ms": 1000, "failure_threshold": 4, "timeout_ms": 1000, "initial_delay_ms": 0}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "include_dashboard": False,
                "_system_config": {f"health_check_{name}": value for name, value in health.items()},
            },
        )
        self._open.callback(self.cluster.shutdown)
        self.nodes = [self._add_node() for _ in range(WORKERS)]
        self.cluster.wait_for_nodes()
        self.undisturbed("twin", "--corpus", "--factors")
        self.expected = self._tables("twin")
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def _add_node(self) -> Any:
        return self.add_node(num_cpus=1)

    def add_node(self, num_cpus: int) -> Any:
        return self.cluster.add_node(num_cpus=num_cpus)

    def _folder(self, name: str) -> Path:
        """Of a run on a local disk: of its own, where it will be full."""
        return self.root / name / "run" if name.startswith("a-disk") else self.root / name

    def _output(self, name: str) -> str:
        return f"s3://chaos/{name}" if name.startswith("storage") else str(self._folder(name))

    def overrides(self, name: str, *own: str) -> list[str]:
        """own: `--corpus`, `--factors`: made by this run, else taken from the twin."""
        root, twin = self.root, self.root / "twin"
        corpus = root / "corpus.jsonl" if "--corpus" in own else twin / "corpus"
        settings = [
            f"model.path={root / 'model'}", f"corpus.path={corpus}", "corpus.tokens_field=tokens",
            "corpus.packing=document", f"queries.path={root / 'queries.jsonl'}", "factors.slices=2", "scan.rank=8",
            "scan.top_k=5", f"scan.shard_sequences={PER_SHARD}", "scan.tokens_per_batch=256",
            f"output={self._output(name)}", f"cluster.num_workers={WORKERS}", f"cluster.address={self.cluster.address}",
            "cluster.heartbeat_s=0.5", "cluster.heartbeat_timeout_s=4", "cluster.placement_timeout_s=120",
            "cluster.max_attempts=2",
        ]  # fmt: skip
        return settings if "--factors" in own else [*settings, f"factors.path={twin / 'factors'}"]

    def _tables(self, name: str) -> dict[str, Any]:
        rows = rows_of(self._output(name))
        return {table: rows[table] for table in TABLES}

    def drive(
        self, name: str, *own: str, kill_at: int = 0, pause_s: float = 0.0, overrides: Sequence[str] = ()
    ) -> Child:
        """A driver of the run `name`, started; it kills itself when it hands out its unit number `kill_at`.

        pause_s: so much longer takes every unit.
        """
        order = {
            "address": self.cluster.address,
            "overrides": [*self.overrides(name, *own), *overrides],
            "kill_at": kill_at,
            "pause_s": pause_s,
            "report": str(self.root / f"{name}.report.json"),
            "progress": str(self.root / f"{name}.progress"),
            "spans": str(self.root / f"{name}.spans"),
        }
        path = self.root / f"{name}.order.json"
        path.write_text(json.dumps(order))
        return Child("tests.chaos.driver", str(path))

    def said(self, name: str) -> str:
        """The error that the run's driver ended with; '' where it ended well."""
        report = self.root / f"{name}.report.json"
        return json.loads(report.read_text()).get("error", "") if report.exists() else "the driver left no report"

    def undisturbed(self, name: str, *own: str, pause_s: float = 0.0) -> float:
        """Seconds of a run that nothing strikes."""
        began = time.monotonic()
        assert self.drive(name, *own, pause_s=pause_s).wait() == 0, self.said(name)
        return time.monotonic() - began

    def run(self, fault: str, seed: int, *, pause_s: float = 0.0, twin: bool = False) -> Result:
        """One run, struck once (storage: all the while); where the driver ended, the same command again.

        pause_s: so much longer takes every unit. twin: whether an undisturbed one of its kind is timed right before it.
        """
        draw = random.Random(f"{fault} {seed}")
        own = ["--factors"] if seed % 4 == 3 else []
        # A disk that fills behind the last unit's back may have room enough for what is left.
        last = UNITS + FIT_UNITS * len(own) - (fault == DISK_FULL)
        at = draw.randint(1, last)
        name = f"{fault.partition(':')[0].replace(' ', '-')}-{FAULTS.index(fault)}-{seed}"
        twin_s = None
        if twin:
            with self._disk(f"{name}-twin", fault):
                twin_s = self.undisturbed(f"{name}-twin", *own, pause_s=pause_s)
                assert self._tables(f"{name}-twin") == self.expected
        with self._disk(name, fault) as disk:
            drive = partial(self.drive, name, *own, pause_s=pause_s)
            result = self._struck(fault, seed, at, name, drive, draw, disk)
        result.twin_s = twin_s
        return result

    def _disk(self, name: str, fault: str) -> AbstractContextManager[FillableDisk | None]:
        return fillable_disk(self.root / name) if fault == DISK_FULL else nullcontext()

    def _struck(
        self,
        fault: str,
        seed: int,
        at: int,
        name: str,
        drive: Callable[..., Child],
        draw: random.Random,
        disk: FillableDisk | None,
    ) -> Result:
        """The run `name`, struck when it hands out its unit number `at`. disk: what it writes to, where that fills."""
        folder = self._folder(name)
        reader = Reader(folder)
        struck: tuple[float, int] | None = None
        before: dict[str, tuple[int, int, int]] = {}
        sentence = ""
        times = [time.time()]
        with reader.reading():
            if fault == STORAGE:
                self.proxy.plan = Plan(seed, rate=0.1)
            driver = drive(kill_at=at if fault == DRIVER_KILLED else 0)
            if fault not in (STORAGE, DRIVER_KILLED) and self._handed_out(name, at):
                before = _shard_files(folder)
                if disk is not None:
                    disk.fill()
                else:
                    struck = self._strike(name, fault, draw)
            status = driver.wait()
            self.proxy.plan = None
            if fault in (DRIVER_KILLED, DISK_FULL):
                times.append(time.time())
                before, sentence = _shard_files(folder), self.said(name)
                if disk is not None:
                    disk.free()
                status = drive().wait()
        times.append(time.time())
        after = _shard_files(folder)
        result = Result(
            fault=fault,
            seed=seed,
            struck_at=at,
            seconds=times[-1] - times[0],
            recovered=status == 0 and self._tables(name) == self.expected,
            torn=reader.torn,
            redone=sorted(shard for shard, facts in before.items() if after.get(shard) != facts),
            said=self.said(name),
            sentence=sentence,
        )
        if result.recovered:
            self._measure(name, result, struck, times)
        return result

    def _measure(self, name: str, result: Result, struck: tuple[float, int] | None, times: list[float]) -> None:
        """What the run cost. times: when its drivers were started, and when the last one ended."""
        summary = read_summary(self._output(name))
        result.losses, result.driver = summary["workers"]["losses"], summary["driver"]
        events = self._events(name)
        result.unit_s = mean_unit_s(events)
        *starts, _ = times
        if len(starts) == 1:
            result.gaps, result.calm_gaps = gaps(self._spans(name), events, struck)
        else:
            result.thrown_s = in_flight_s([event for event in events if event.when < starts[1]], ended=starts[1])
            result.start_s = _first_unit(events, starts[0])
            result.restart_s = _first_unit(events, starts[1])

    def _events(self, name: str) -> list[Event]:
        lines = map(str.split, _whole_lines(self.root / f"{name}.progress"))
        return [Event(float(when), what, int(worker), int(pid)) for when, what, worker, pid in lines]

    def _spans(self, name: str) -> list[Span]:
        lines = map(str.split, _whole_lines(self.root / f"{name}.spans"))
        return [Span(float(began), float(ended), int(worker), function) for began, ended, worker, function in lines]

    def _handed_out(self, name: str, count: int) -> bool:
        """Wait until the driver has handed out so many units; False where it ended before."""
        while sum(event.what == "handed" for event in self._events(name)) < count:
            if (self.root / f"{name}.report.json").exists():
                return False
            time.sleep(0.01)
        return True

    def _strike(self, name: str, fault: str, draw: random.Random) -> tuple[float, int] | None:
        """When which worker was struck; None for a node's."""
        if fault == NODE_KILLED:
            index = draw.randrange(WORKERS)
            self.cluster.remove_node(self.nodes[index], allow_graceful=False)
            self.nodes[index] = self._add_node()
            return None
        event = draw.choice([event for event in self._events(name) if event.what == "handed"])
        with suppress(ProcessLookupError):
            os.kill(event.pid, signal.SIGKILL if fault == RANK_KILLED else signal.SIGSTOP)
        return time.time(), event.worker


def _first_unit(events: list[Event], start: float) -> float | None:
    """Seconds from a driver's start until it handed out a unit."""
    return next((event.when - start for event in events if event.what == "handed" and event.when > start), None)


def _whole_lines(path: Path) -> list[str]:
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []


def _shard_files(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in (folder / "shards").glob("*.parquet"):
        status = path.stat()
        found[path.name] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found
