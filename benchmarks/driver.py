"""What the driver costs without a model: planning, handing out, collecting, resuming and publishing many shards.

python benchmarks/driver.py [--shards 1000000] [--workers 1000] [--queries 10] [--published 30 100]     (`make bench`)
python benchmarks/driver.py --shards 0 --resume-shards 0 --published     (planning query batches alone)

Planning, the pool's loop, thresholds, the resume and the publication are the job's own code. In the place of Ray stand
worker groups that pickle their task and answer at once, with as many rows as beat the thresholds they were given, were
scores exponentially distributed; their time does not count. Two bounds of how answers come: all workers' between two
turns of the loop, or one's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from infscan.config import ClusterConfig, Config, FactorsConfig, ModelConfig, ScanConfig, Solver
from infscan.corpus.plan import Plan, shard_name
from infscan.corpus.reading import Reading
from infscan.corpus.sequences import Sequence, Span
from infscan.engine.executor import RunRecords, Step, left_of
from infscan.engine.pool import Pool
from infscan.engine.recovery import RecoveryLog
from infscan.engine.worker_group import Outcome, State
from infscan.influence.layers import Layer
from infscan.influence.layout import lay_out, plan_layouts
from infscan.influence.topk_tracker import ScoredRows
from infscan.model.worker import WorkerSettings
from infscan.queries import Part, Query
from infscan.results.refined import unit_path, write_unit
from infscan.results.shard_file import ScanCounts, ShardCounts, finished_shards, write_shard
from infscan.results.tensor_files import tensor_bytes
from infscan.steps.measure import MeasuredPart, measure
from infscan.steps.plan import make_plan
from infscan.steps.publish import publish
from infscan.steps.queries import BroadcastQueries, read_query_batch
from infscan.steps.ranking import rank
from infscan.steps.refine import Refined, refine_units
from infscan.steps.run_folder import CONFIG
from infscan.steps.scan import Scanned, scan
from infscan.steps.stored_queries import StoredBatch, read_spectra
from infscan.storage import Identity, Store
from infscan.telemetry import Telemetry

RESULTS = Path(__file__).parent / "results"


@dataclass
class Away:
    """Seconds that belong to somebody else: to workers, or to making what is measured."""

    seconds: float = 0.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


@dataclass
class Measured:
    """One step: seconds of the driver's own, and by how much its memory grew at most."""

    name: str
    units: int
    unit: str
    seconds: float = 0.0
    peak_bytes: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


@contextmanager
def measured(name: str, units: int, unit: str, away: Away, found: list[Measured]) -> Iterator[Measured]:
    """Time a step, less what happened `away` in it, and its peak of resident memory above what there was before."""
    step = Measured(name, units, unit)
    # Resets the peak that the kernel keeps of this process.
    Path("/proc/self/clear_refs").write_text("5")
    before, elsewhere, began = _resident("VmRSS"), away.seconds, time.perf_counter()
    yield step
    step.seconds = time.perf_counter() - began - (away.seconds - elsewhere)
    step.peak_bytes = _resident("VmHWM") - before
    found.append(step)


def _resident(kind: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


class SimulatedGroup:
    """A worker group as the pool knows it, whose rank has scanned its shard as soon as it is asked."""

    def __init__(self, index: int, sizes: argparse.Namespace, away: Away) -> None:
        self.index, self.sizes, self.away = index, sizes, away
        self.state, self.facts = State.starting, list[Any]()
        self.unit: int | None = None
        self.running: list[object] = [object()]
        self.rng = np.random.default_rng(index)

    def is_placed(self) -> bool:
        return True

    def submit(self, unit: int, function: Any, task: Any, *shared: Any, oom_retries: int = 0, **ahead: Any) -> None:
        self.state, self.unit, self.running = State.busy, unit, [object()]
        sent = pickle.dumps(task, protocol=5)
        with self.away():
            self.answer = self._scanned(pickle.loads(sent))

    def _scanned(self, task: Any) -> tuple[ScoredRows, ShardCounts]:
        bars = task.thresholds.strengths_qs
        per_side = len(task.sequence_ids) // len(bars[0])
        # A shard keeps at most C rows: without a threshold, those above the strength that so many have.
        bars = np.maximum(bars, np.log(max(1, per_side / task.candidates)))
        counts = np.minimum(self.rng.poisson(per_side * np.exp(-bars.astype(np.float64))), task.candidates).reshape(-1)
        board = np.repeat(np.arange(len(counts)), counts)
        queries, sides = np.divmod(board, len(bars[0]))
        strengths = bars.reshape(-1)[board] + self.rng.exponential(size=len(board))
        places = 2 * (np.arange(len(board)) % per_side) + sides
        hits = ScoredRows(
            queries.astype(np.int32),
            sides.astype(np.int8),
            task.sequence_ids[places],
            np.where(sides == 0, strengths, -strengths).astype(np.float32),
        )
        n = len(task.sequence_ids)
        return hits, ShardCounts(n, n * self.sizes.tokens, 0, len(np.unique(places)), len(hits))

    @property
    def pending(self) -> list[object]:
        return [] if self.state is State.idle else self.running

    def poll_written(self) -> None:
        return

    def poll(self) -> tuple[Outcome, Any] | None:
        if self.state is State.idle:
            return None
        answer = None if self.state is State.starting else self.answer
        self.state = State.idle
        return Outcome.done, answer

    def forget(self) -> None:
        return


class SimulatedPool(Pool):
    """The pool over simulated groups. one: whether one worker answers between two turns of the loop, or all."""

    def __init__(self, sizes: argparse.Namespace, away: Away, *, one: bool) -> None:
        self.sizes, self.away, self.one, self.turns = sizes, away, one, 0
        cluster = ClusterConfig(num_workers=sizes.workers)
        super().__init__(cluster, WorkerSettings(ModelConfig(), (), False), 0.0, RecoveryLog())

    def new_group(self, index: int, settings: WorkerSettings) -> Any:
        return SimulatedGroup(index, self.sizes, self.away)

    def answers(self, refs: list[Any], limit_s: float) -> list[Any]:
        self.turns += 1
        return [refs[self.turns % len(refs)]] if self.one and self.turns > 1 else refs


class SimulatedExecutor:
    """An executor over a simulated pool."""

    pool: SimulatedPool
    oom_retries, num_workers = 0, 1

    def run(self, step: Step[Any], on_done: Any, on_given_up: Any, shared: Any) -> Any:
        left = left_of(step)
        return self.pool.run(left, step.function, step.task, on_done, *shared, on_given_up=on_given_up) if left else {}

    def forget(self) -> None:
        return

    def facts(self) -> list[list[Any]]:
        return []


class MeasuringExecutor(SimulatedExecutor):
    """An executor that finds every query likely."""

    def run(self, step: Step[Any], on_done: Any, on_given_up: Any = None, shared: Any = ()) -> Any:
        for unit in step.units:
            on_done(unit, [[MeasuredPart(-1.0, 1.0)] for _ in step.task(unit).queries])
        return {}


def simulated_run(folder: str, sizes: argparse.Namespace, queries: int) -> Any:
    """What the steps ask of a run, without a model."""
    config = Config(
        output=folder,
        factors=FactorsConfig(solver=Solver.identity),
        scan=ScanConfig(top_k=sizes.top_k, shard_sequences=sizes.shard_sequences),
        cluster=ClusterConfig(num_workers=sizes.workers),
    )
    asked = tuple(Query(f"query-{index:05d}", (Part((1, 2, 3), (2,)),)) for index in range(queries))
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(sizes.layers)]
    layers = [Layer(name, 1024, 256, bias=False, input_of=name) for name in names]
    inputs = SimpleNamespace(
        layers=layers,
        tokenizer=None,
        device="cpu",
        dtype="float32",
        refine_dtype="float32",
        model_identity=Identity("model", "simulated", "simulated", "nothing"),
        query_ids=tuple(query.id for query in asked),
        fingerprints=lambda: dict.fromkeys(("model", "corpus", "queries"), "simulated"),
    )
    return SimpleNamespace(
        config=config,
        store=Store(folder),
        folder=SimpleNamespace(
            claim=lambda config: None,
            check_claim=lambda config: None,
            fence=lambda: None,
            lease=SimpleNamespace(mine=SimpleNamespace(token="simulated")),
        ),
        queries=asked,
        telemetry=Telemetry(),
        architecture=SimpleNamespace(parameters=0),
        inputs=inputs,
        later=(),
        executor=SimulatedExecutor(),
        records=RunRecords(),
    )


def simulated_corpus(folder: str, sequences: int, sizes: argparse.Namespace) -> Any:
    return SimpleNamespace(
        store=Store(f"{folder}/corpus"),
        fingerprint="simulated",
        sequences=sequences,
        sequence_length=sizes.tokens,
        reading=Reading(),
        chosen=None,
        counts={},
    )


def put_shards(run: Any, plan: Plan, fingerprint: str, rng: np.random.Generator) -> None:
    """A scan's file for every shard, with 0 to 3 hits, as late shards have."""
    for number in range(plan.num_shards):
        ids = plan.ids(number)[: number % 4]
        hits = ScoredRows(
            rng.integers(0, len(run.queries), len(ids)).astype(np.int32),
            np.zeros(len(ids), np.int8),
            ids,
            rng.exponential(size=len(ids)).astype(np.float32),
        )
        counts = ShardCounts(plan.shard_sequences, plan.shard_sequences, 0, len(hits), len(hits))
        put_shard(run, shard_name(number), ids, hits, counts, 512, fingerprint)


def put_shard(
    run: Any,
    name: str,
    ids: np.ndarray,
    hits: ScoredRows,
    counts: ShardCounts,
    tokens: int,
    fingerprint: str = "simulated",
) -> None:
    made = [
        Sequence(
            n, np.random.default_rng(n).integers(0, 50_000, tokens), (Span(f"document-{n}", "web", 0, tokens),), 0, ""
        )
        for n in ids.tolist()
    ]
    write_shard(run.store, name, made, np.ones(len(ids), np.float32), hits, run.inputs.query_ids, counts, fingerprint)


def refined_units(
    run: Any, plan: Plan, sizes: argparse.Namespace, rng: np.random.Generator
) -> tuple[ScoredRows, Refined]:
    """Q x 2 C candidates from all over the corpus: their shards' files, and their refined units in one query group."""
    C, Q = run.config.candidates, len(run.queries)
    ids = np.sort(rng.choice(plan.selection.size, min(plan.selection.size, Q * 2 * C), replace=False))
    rows = rng.permutation(np.resize(ids, Q * 2 * C))
    queries = np.repeat(np.arange(Q, dtype=np.int32), 2 * C)
    sides = np.tile(np.repeat(np.arange(2, dtype=np.int8), C), Q)
    best = ScoredRows(queries, sides, rows, np.where(sides == 0, 1, -1).astype(np.float32))
    ends = np.searchsorted(ids, plan.shard_sequences * np.arange(1, plan.num_shards))
    for number, mine in enumerate(np.split(ids, ends)):
        n = len(mine)
        hits = ScoredRows(np.zeros(n, np.int32), np.zeros(n, np.int8), mine, np.ones(n, np.float32))
        put_shard(run, shard_name(number), mine, hits, ShardCounts(n, n, 0, n, n), sizes.tokens)
    layers = [layer.name for layer in run.inputs.layers]
    paths = []
    side_of = dict(zip(zip(queries.tolist(), rows.tolist(), strict=True), sides.tolist(), strict=True))
    for number, unit in enumerate(refine_units(best, [range(Q)], 256, 1 << 14)):
        pairs = list(zip(unit.queries.tolist(), unit.sequence_ids.tolist(), strict=True))
        signs = np.asarray([1 - 2 * side_of[pair] for pair in pairs], np.float32)[:, None]
        by_layer = signs * rng.exponential(size=(len(pairs), len(layers))).astype(np.float32)
        by_token = signs * rng.exponential(size=(len(pairs), sizes.tokens)).astype(np.float32)
        paths.append(unit_path("simulated" * 2, number))
        write_unit(
            run.store, paths[-1], [(run.inputs.query_ids[q], n) for q, n in pairs], by_layer, list(by_token), layers
        )
    return best, Refined([range(Q)], [[paths]])


def drive(sizes: argparse.Namespace, folder: str) -> list[Measured]:
    """Plan, and scan with each kind of arrival."""
    found: list[Measured] = []
    away = Away()
    run = simulated_run(folder, sizes, sizes.queries)
    corpus = simulated_corpus(folder, sizes.shards * sizes.shard_sequences, sizes)
    with measured("plan", sizes.shards, "shard", away, found):
        plan = make_plan(run, corpus)
    batch = BroadcastQueries("simulated", None, {}, run.inputs.query_ids, len(run.queries))
    for one in (False, True):
        run.executor.pool = SimulatedPool(sizes, away, one=one)
        run.executor.pool.wait_for_one()
        how = "one" if one else "all"
        with measured(f"schedule and collect, answers {how} at a time", sizes.shards, "shard", away, found) as step:
            scanned = scan(run, plan, corpus, batch)
        assert scanned.counts.shards == sizes.shards
        step.notes = {
            "turns": run.executor.pool.turns,
            "rows a query and side": scanned.counts.rows / sizes.queries / 2,
        }
    return found


def resumed(sizes: argparse.Namespace, folder: str) -> list[Measured]:
    """A resume that finds every shard done, of a scan of `resume_shards`."""
    found: list[Measured] = []
    away, shards = Away(), sizes.resume_shards
    run = simulated_run(folder, sizes, sizes.queries)
    corpus = simulated_corpus(folder, shards * sizes.shard_sequences, sizes)
    plan, batch = make_plan(run, corpus), BroadcastQueries("simulated", None, {})
    run.executor.pool = SimulatedPool(sizes, away, one=False)
    run.executor.pool.wait_for_one()
    put_shards(run, plan, scan(run, plan, corpus, batch).fingerprint, np.random.default_rng(0))
    del run.executor.pool
    with measured("list the finished shards", shards, "shard", away, found):
        assert len(finished_shards(run.store)) == shards
    with measured("resume: list and read them all", shards, "shard", away, found):
        scanned = scan(run, plan, corpus, batch)
    assert scanned.counts.shards == shards, "a shard's file was not taken for what it is"
    return found


def published(sizes: argparse.Namespace, folder: str, queries: int) -> Measured:
    """Publish that many queries' rows, their candidates spread over `publish_shards` shards."""
    found: list[Measured] = []
    run = simulated_run(folder, sizes, queries)
    corpus = simulated_corpus(folder, sizes.publish_shards * sizes.shard_sequences, sizes)
    plan = make_plan(run, corpus)
    best, refined = refined_units(run, plan, sizes, np.random.default_rng(0))
    run.executor = MeasuringExecutor()
    measure(run)
    run.store.write_json(CONFIG, {})
    rows = queries * 2 * sizes.top_k
    with measured(f"publish, {queries} queries x {2 * sizes.top_k}", rows, "row", Away(), found) as step:
        scanned = Scanned(best, ScanCounts(), {}, "simulated")
        publish(run, plan, corpus, scanned, rank(run, scanned, refined))
    step.notes = {"margins_bytes": rows * 4 * (sizes.layers + sizes.tokens)}
    return found[0]


# Llama-3.1-8B's MLPs: of 32 blocks gate, up and down.
_8B = [Layer(f"{n}.{kind}", *shape, bias=False, input_of=f"{n}.{kind}") for n in range(32) for kind, shape in {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}.items()]  # fmt: skip # noqa: E501
_RANK = 32


def query_files(
    folder: str, layers: list[Layer], queries: int, *, holes: bool = False
) -> tuple[Store, list[list[str]], int]:
    """A file for each query: its spectra, and zeros for columns. holes: they take no disk, and nobody can read them.

    Returns the store, the names, and the bytes that the files have by their names.
    """
    store, made = Store(folder), np.random.default_rng(0)
    tensors = {f"{layer.name}|totals": torch.ones(1, dtype=torch.float64) for layer in layers}
    for layer in layers:
        tensors[f"{layer.name}|values"] = torch.from_numpy(np.sort(made.exponential(size=(1, _RANK)))[:, ::-1].copy())
    columns = {
        f"{layer.name}|{kind}": (1, width, _RANK)
        for layer in layers
        for kind, width in (("U", layer.outputs), ("V", layer.inputs))
    }
    path = Path(folder, "batch-0000")
    path.parent.mkdir(parents=True)
    if holes:
        write_with_holes(path, tensors, columns)
    else:
        path.write_bytes(tensor_bytes(tensors | {name: torch.zeros(shape) for name, shape in columns.items()}))
    names = [f"batch-{query:04d}" for query in range(queries)]
    for name in names[1:]:
        os.link(path, Path(folder, name))
    return store, [[name] for name in names], queries * path.stat().st_size


def write_with_holes(path: Path, tensors: dict[str, torch.Tensor], holes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file as `tensor_bytes` lays it out, the tensors first; of the holes (float32) it has no bytes."""
    whole = tensor_bytes(tensors)
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    data, end = whole[8 + length :], len(whole) - 8 - length
    for name, shape in holes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    start = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(start).to_bytes(8, "little") + start + data)
        stream.truncate(8 + len(start) + end)


def planned_batch(folder: str, queries: int) -> Measured:
    """Read what an 8B model's query batch is planned by, and plan it."""
    found: list[Measured] = []
    store, names, size = query_files(folder, _8B, queries, holes=True)
    with measured(f"plan a query batch of {queries} queries, 8B", queries, "query", Away(), found) as step:
        plan = plan_layouts(read_spectra(store, names, [_8B], _RANK), _8B, 512, 0, 0.9)
        batch = StoredBatch(store, tuple(map(tuple, names)), (tuple(_8B),), plan, {}, queries, "bfloat16")
        sent = len(pickle.dumps(batch, protocol=5))
    step.notes = {"GiB in storage": size / 2**30, "kB to a node": sent / 1e3}
    return found[0]


def whole_batch(folder: str, queries: int, *, whole: bool) -> Measured:
    """A smaller model's batch, by its spectra or (as before) whole and laid out."""
    found: list[Measured] = []
    layers = [Layer(f"l{n}", 2048, 512, bias=False, input_of=f"l{n}") for n in range(8)]
    store, names, size = query_files(folder, layers, queries)
    how = "whole, as before" if whole else "by its spectra"
    with measured(f"plan a small query batch {how}", queries, "query", Away(), found) as step:
        if whole:
            stored = read_query_batch(store, names)
            laid_out = lay_out(stored.batch, plan_layouts(stored.spectra, layers, 512, 0, 0.9))
            sent = pickle.dumps(laid_out, protocol=5)
            del sent
        else:
            plan_layouts(read_spectra(store, names, [layers], _RANK), layers, 512, 0, 0.9)
    step.notes = {"MiB in storage": size / 2**20}
    return found[0]


def show(steps: list[Measured]) -> None:
    table = Table("step", "per unit, ms", "in all, s", "memory above before, MiB", "notes")
    for step in steps:
        each = f"{1e3 * step.seconds / step.units:.3f} a {step.unit}"
        notes = ", ".join(f"{name} {value:,.0f}" for name, value in step.notes.items())
        table.add_row(step.name, each, f"{step.seconds:.1f}", f"{step.peak_bytes / 2**20:.0f}", notes)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--shard-sequences", type=int, default=4096)
    parser.add_argument("--resume-shards", type=int, default=20_000, help="of which every file is written")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--top-k", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--published", type=int, nargs="*", default=[10, 40])
    parser.add_argument("--batches", type=int, nargs="*", default=[256, 1000])
    parser.add_argument("--publish-shards", type=int, default=1000)
    parser.add_argument("--folder", help="where the simulated runs lie while they last (the system's temporary folder)")
    sizes = parser.parse_args()
    steps: list[Measured] = []
    with tempfile.TemporaryDirectory(dir=sizes.folder) as folder:
        if sizes.shards:
            steps += drive(sizes, f"{folder}/scan")
        if sizes.resume_shards:
            steps += resumed(sizes, f"{folder}/resume")
        for queries in sizes.batches:
            steps.append(planned_batch(f"{folder}/batch-{queries}", queries))
        for whole in (True, False) if sizes.batches else ():
            steps.append(whole_batch(f"{folder}/whole-{whole}", 200, whole=whole))
        for queries in sizes.published:
            steps.append(published(sizes, f"{folder}/publish-{queries}", queries))
    show(steps)
    RESULTS.mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "processor": platform.processor(), "load": os.getloadavg()}
    value = {"sizes": vars(sizes), "machine": machine, "steps": [vars(step) for step in steps]}
    (RESULTS / "driver.json").write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
