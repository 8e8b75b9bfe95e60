"""Faults in the middle of a scan on a real local Ray; what ends well equals an undisturbed twin, bit for bit."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from safetensors.torch import load_file, save_file
from torch import Tensor

from infscan.api import run_fit
from infscan.config import ClusterConfig, Config, Packing
from infscan.corpus.packing import pack_settings
from infscan.engine import stragglers
from infscan.engine.attempts import NotMadeError
from infscan.engine.cluster import connect
from infscan.engine.executor import Executor
from infscan.engine.lease import LEASE, Lease
from infscan.engine.node_share import NodeShare
from infscan.engine.pool import Pool
from infscan.engine.schedule import SHRINKS_ALL
from infscan.engine.worker_group import WorkerGroup
from infscan.errors import DamagedError, FactorsError, InfscanError, QueryError, RunError, StorageError
from infscan.model.worker import Batch, ModelWorker
from infscan.pipeline import answer
from infscan.results.read import read_scores, read_summary, read_top
from infscan.results.schema import footer_of, to_parquet
from infscan.results.shard_file import finished_shards, read_hits
from infscan.steps import factors as fit
from infscan.steps import queries
from infscan.steps.scan import ScanTask, scan_task
from infscan.storage import Store
from infscan.storage.write_behind import WriteBehind
from tests.chaos.conftest import Trouble
from tests.corpus.builders import corpus_config, prepare
from tests.steps.runs import CONTEXT, EOS, VOCAB, small_run, token_corpus, token_queries
from tests.steps.test_end_to_end import assert_close_rows, rows_of

SHARDS, PER_SHARD = 30, 8
SEQUENCES = SHARDS * PER_SHARD


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.shutdown()
    connect(ClusterConfig(num_workers=2, ranks_per_worker=2))
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Config:
    """The undisturbed run. Its corpus has one part per shard; corpus and factors serve the disturbed ones."""
    root = tmp_path_factory.mktemp("twin")
    for number in range(SHARDS):
        token_corpus(root / "documents" / f"{number:02d}.jsonl", PER_SHARD, seed=number)
    pack = pack_settings(corpus_config(packing=Packing.document), CONTEXT, VOCAB, EOS, EOS)
    prepare(root / "documents", root / "corpus", pack)
    # No query measures token VOCAB - 1: a model may be broken at it alone.
    token_queries(root / "queries.jsonl", 3, vocab=VOCAB - 1)
    config = small_run(
        root,
        f"corpus.path={root / 'corpus'}",
        "factors.num_sequences=64",
        "cluster.num_workers=2",
        "scan.scores=all",
    )
    answer(config)
    return config


def disturbed(twin: Config, tmp_path: Path, *overrides: str) -> Config:
    """The twin's run in a folder of its own, on the twin's prepared corpus and factors; later overrides win."""
    return small_run(
        Path(twin.output).parent,
        f"corpus.path={twin.corpus.path}",
        "factors.num_sequences=64",
        "cluster.num_workers=2",
        "scan.scores=all",
        f"factors.path={twin.factors.path}",
        f"output={tmp_path / 'run'}",
        *overrides,
    )


def assert_same_answer(ours: Config, twin: Config) -> None:
    assert rows_of(ours.output) == rows_of(twin.output)
    assert read_scores(ours.output).equals(read_scores(twin.output))


def assert_counts_add_up(config: Config, *, quarantined: int = 0) -> dict[str, Any]:
    counts: dict[str, Any] = read_summary(config.output, unfinished=True)["counts"]
    assert counts["planned"] == {"sequences": SEQUENCES, "shards": SHARDS}
    assert counts["quarantined"] == {"sequences": quarantined * PER_SHARD, "shards": quarantined}
    assert counts["scanned"]["shards"] == SHARDS - quarantined
    assert counts["scanned"]["sequences"] == SEQUENCES - quarantined * PER_SHARD
    if not quarantined:
        assert counts["scanned"]["tokens"] == counts["corpus"]["tokens"]
    return counts


# --- ranks that die or hang ----------------------------------------------------------------------------------------


# What this says of each shard, test_chaos.py says of the files, with ranks that start faster.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "overrides"),
    [
        pytest.param(signal.SIGKILL, (), id="a rank is killed"),
        pytest.param(
            signal.SIGKILL, ("cluster.num_workers=1", "cluster.ranks_per_worker=2"), id="one of two ranks is killed"
        ),
        pytest.param(signal.SIGSTOP, ("cluster.heartbeat_s=0.5", "cluster.heartbeat_timeout_s=5"), id="a rank hangs"),
    ],
)
def test_a_lost_rank_costs_one_more_attempt(
    twin: Config, tmp_path: Path, trouble: Trouble, sent: signal.Signals, overrides: tuple[str, ...]
) -> None:
    """Its group is rebuilt, its shard is handed out again, and nothing that was finished is done again."""
    # One attempt: a machine's loss is not an error of the shard.
    config = disturbed(twin, tmp_path, "cluster.max_attempts=1", *overrides)
    trouble.signal = sent
    answer(config)
    assert trouble.victim is not None
    # One that hangs takes Ray some seconds longer to be rid of.
    trouble.victim.wait(timeout=30)
    assert len(trouble.handed_out) == SHARDS
    assert trouble.handed_out.total() == SHARDS + 1
    done = {Path(name).stem for name in trouble.done_before}
    assert done
    assert {trouble.handed_out[name] for name in done} == {1}
    assert_same_answer(config, twin)
    assert_counts_add_up(config)
    assert read_summary(config.output)["workers"]["rebuilds"] >= 1


def test_a_rank_that_is_late_is_not_waited_for(
    twin: Config, tmp_path: Path, trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still, and nothing takes it for dead: its shard goes to the other worker, and counts once."""
    monkeypatch.setattr(stragglers, "LATE_S", 1.0)
    config = disturbed(twin, tmp_path, "cluster.heartbeat_timeout_s=3000", "cluster.deadline_s=3000")
    trouble.signal = signal.SIGSTOP
    answer(config)
    assert trouble.victim is not None
    assert len(trouble.handed_out) == SHARDS
    assert trouble.handed_out.total() == SHARDS + 1
    assert_same_answer(config, twin)
    assert_counts_add_up(config)
    workers = read_summary(config.output)["workers"]
    assert (workers["rebuilds"], workers["reissued"]) == (0, 1)


def test_a_rank_that_dies_between_computing_and_writing_loses_both_units_and_no_row(
    twin: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its writer waits until another shard is being computed, and then takes the process with it."""
    submit, given = WorkerGroup.submit, list[tuple[str, bool]]()

    def handed(self: WorkerGroup, unit: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if isinstance(arguments[0], ScanTask):
            given.append((arguments[0].shard, options["behind"]))
            function = dies_writing if len(given) == 5 else scan_task
        submit(self, unit, function, *arguments, **options)

    monkeypatch.setattr(WorkerGroup, "submit", handed)
    config = disturbed(twin, tmp_path)
    answer(config)
    assert_same_answer(config, twin)
    assert_counts_add_up(config)
    (loss,) = read_summary(config.output)["workers"]["losses"]
    assert loss["unit_s"] > 0
    again = [shard for shard, behind in given if not behind]
    assert Counter(shard for shard, _ in given) == Counter(finished_shards(Store(config.output))) + Counter(again)
    # The one that was not written, and the one that was computed.
    assert len(again) == 2
    assert given[4][0] in again


def dies_writing(worker: ModelWorker, *arguments: Any) -> Any:
    start, computing = WriteBehind.start, threading.Event()

    def die() -> None:
        computing.wait()
        os.kill(os.getpid(), signal.SIGKILL)

    def read(address: Any, ids: Any) -> Any:
        computing.set()
        time.sleep(60)

    def begin(write: Callable[[], Any]) -> Any:
        # The next shard begins with reading.
        worker.read = read  # type: ignore[method-assign]
        return start(worker.behind, die)

    worker.behind.start = begin  # type: ignore[method-assign]
    return scan_task(worker, *arguments)


def test_a_worker_that_fails_whatever_it_is_given_is_retired(
    twin: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a rank whose GPU is sick: no shard is given up, and the other worker does the rest."""
    submit, run = WorkerGroup.submit, Pool.run

    def sick(worker: ModelWorker, *_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def handed(self: WorkerGroup, unit: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if not isinstance(arguments[0], ScanTask):
            submit(self, unit, function, *arguments, **options)
            return
        given[self.index] += 1
        if given[1] == 3:
            third.touch()
        # The other one waits at its fifth shard, until the sick one has had its third.
        chosen = sick if self.index == 1 else waits if given[0] == 5 else function
        submit(self, unit, chosen, *arguments, **options)

    given: Counter[int] = Counter()
    third = tmp_path / "third"

    def waits(worker: ModelWorker, *arguments: Any) -> Any:
        while not third.exists():
            time.sleep(0.1)
        return scan_task(worker, *arguments)

    def as_on_gpus(self: Pool, *arguments: Any, **named: Any) -> Any:
        self.gpus = 1.0
        return run(self, *arguments, **named)

    monkeypatch.setattr(WorkerGroup, "submit", handed)
    monkeypatch.setattr(Pool, "run", as_on_gpus)
    config = disturbed(twin, tmp_path)
    answer(config)
    assert_same_answer(config, twin)
    assert_counts_add_up(config)
    summary = read_summary(config.output)
    assert [one["worker"] for one in summary["workers"]["retired"]] == [1]
    assert len(summary["workers"]["losses"]) == 3
    assert any("worker 1 on" in warning and "is retired" in warning for warning in summary["warnings"])


# --- what the ranks of a node read together ------------------------------------------------------------------------


def here() -> str:
    node: str = ray.get_runtime_context().get_node_id()
    return node


def test_a_node_makes_what_its_ranks_read_once(tmp_path: Path) -> None:
    def layers(count: int) -> Iterator[tuple[int, np.ndarray]]:
        with (tmp_path / "made").open("a") as marks:
            marks.write("x")
        for number in range(count):
            yield number, np.full(3, number)

    for pieces in (1, 4):
        share = NodeShare(layers, (pieces,), pieces)
        for _ in range(3):
            assert [(number, array.tolist()) for number, array in share.on(here()).read()] == [
                (number, [number] * 3) for number in range(pieces)
            ]
    assert (tmp_path / "made").read_text() == "xx"


def test_what_a_node_could_not_make_says_why_and_is_tried_again(tmp_path: Path) -> None:
    def busy(kind: str) -> Iterator[int]:
        yield 1
        if kind == "storage":
            error = StorageError("the store is busy")
            error.transient = True
            raise error
        raise DamagedError("queries/batch-0000 is damaged")

    share = NodeShare(busy, ("storage",), 2)
    for _ in range(5):
        with pytest.raises(NotMadeError, match="the store is busy") as caught:
            list(share.on(here()).read())
        assert caught.value.transient
        share.failed_on(here(), caught.value)
    share = NodeShare(busy, ("damage",), 2)
    with pytest.raises(NotMadeError) as caught:
        list(share.on(here()).read())
    with pytest.raises(DamagedError, match="batch-0000 is damaged"):
        share.failed_on(here(), caught.value)
    # The store itself was too small, or the process was killed: not for ever.
    for _ in range(2):
        share.failed_on(here(), NotMadeError(None, "OutOfMemoryError: the node's memory"))
    with pytest.raises(RunError, match=r"3 times: OutOfMemoryError: the node's memory. Look at its object store"):
        share.failed_on(here(), NotMadeError(None, "OutOfMemoryError: the node's memory"))


def test_a_query_batch_that_is_damaged_when_ranks_read_it_ends_the_run(
    twin: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, and no shard is given up for it; the next run makes it again."""
    inner = queries.read_spectra

    def then_damaged(store: Store, *rest: Any) -> Any:
        found = inner(store, *rest)
        [path] = Path(store.uri, "queries").glob("batch-*")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(bytes(data))
        return found

    config = disturbed(twin, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(queries, "read_spectra", then_damaged)
        with pytest.raises(DamagedError, match=r"queries/batch-0000\S* is damaged"):
            answer(config)
    assert not Store(config.output).names("quarantine")
    answer(config)
    assert_same_answer(config, twin)


# --- memory that runs out ------------------------------------------------------------------------------------------


@dataclass
class Room:
    """What a micro-batch of the scan may have at most, in padded tokens; None: as much as it likes."""

    tokens: int | None = None


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    """Ranks run out of memory where there is no room; set `tokens` at any time."""
    room, submit = Room(), WorkerGroup.submit

    def submit_cramped(
        self: WorkerGroup, unit: int, function: Callable[..., Any], *arguments: Any, **options: Any
    ) -> None:
        tokens = room.tokens

        def in_little_memory(rank: ModelWorker, *arguments: Any) -> Any:
            def backward(batch: Batch, *rest: Any, **named: Any) -> Tensor:
                if batch.ids_bt.numel() > tokens:
                    raise MemoryError("no room")
                return ModelWorker.backward(rank, batch, *rest, **named)

            rank.backward = backward  # type: ignore[method-assign]
            try:
                return function(rank, *arguments)
            finally:
                del rank.backward

        chosen = in_little_memory if tokens and isinstance(arguments[0], ScanTask) else function
        submit(self, unit, chosen, *arguments, **options)

    monkeypatch.setattr(WorkerGroup, "submit", submit_cramped)
    return room


def test_memory_that_runs_out_halves_micro_batches_and_costs_no_attempt(
    twin: Config, tmp_path: Path, room: Room
) -> None:
    """Scores agree within rounding; every shard that was halved says so, in its file and in summary.json."""
    room.tokens = 128
    config = disturbed(twin, tmp_path, "cluster.num_workers=1", "cluster.max_attempts=1")
    answer(config)
    assert_close_rows(config, twin)
    counts = assert_counts_add_up(config)
    store = Store(config.output)
    halvings = [read_hits(store, name, ["q0", "q1", "q2"])[1].halvings for name in finished_shards(store)]
    assert set(halvings) <= {0, 1}
    assert counts["scanned"]["halved"] == sum(halvings) > 0
    # It ran out in two of them; from then on all began at the size that fits.
    assert read_summary(config.output)["workers"]["halvings"] == SHRINKS_ALL < sum(halvings)
    assert "scan.tokens_per_batch=256" in " ".join(read_summary(config.output)["warnings"])

    # One sequence alone that does not fit ends the job, and says what would help; more room lets it go on.
    (tmp_path / "run" / "shards" / "shard-000003.parquet").unlink()
    room.tokens = 1
    with pytest.raises(RunError, match=r"one sequence alone \(\d+ tokens\) does not fit .*ranks_per_worker"):
        answer(config)
    room.tokens = None
    answer(config)
    assert_close_rows(config, twin)


# --- a poison shard ------------------------------------------------------------------------------------------------


def damage(part: Path) -> None:
    """Flip bytes in the middle of the part's token column: its size and its footer stay as they were."""
    column = pq.read_metadata(part).row_group(0).column(0)
    offset = column.data_page_offset + column.total_compressed_size // 2
    data = bytearray(part.read_bytes())
    for at in range(offset, offset + 4):
        data[at] ^= 0xFF
    part.write_bytes(bytes(data))


def test_a_run_without_a_single_good_shard_says_so(twin: Config, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(twin.corpus.path, corpus)
    for part in corpus.glob("part-*.parquet"):
        damage(part)
    once = ("cluster.num_workers=1", "cluster.max_attempts=1", "scan.check_sequences=0")
    config = disturbed(twin, tmp_path, f"corpus.path={corpus}", *once)
    with pytest.raises(RunError, match=rf"{SHARDS} shards are quarantined .*allow_quarantined=0"):
        answer(config)
    assert_counts_add_up(config, quarantined=SHARDS)
    assert read_top(config.output, unfinished=True).num_rows == 0


def test_a_poison_shard_is_quarantined_and_a_rerun_finishes_it(twin: Config, tmp_path: Path, trouble: Trouble) -> None:
    corpus, output = tmp_path / "corpus", tmp_path / "run"
    shutil.copytree(twin.corpus.path, corpus)
    part = corpus / "part-00011.parquet"
    sound = part.read_bytes()
    damage(part)
    cluster = ("cluster.num_workers=1", "cluster.max_attempts=2")
    settings = (f"corpus.path={corpus}", *cluster)
    config = disturbed(twin, tmp_path, *settings)

    with pytest.raises(RunError, match=r"1 shards are quarantined \(shard-000011; see in .*allow_quarantined=0"):
        answer(config)
    [note] = (output / "quarantine").iterdir()
    said = json.loads(note.read_text())
    assert note.name == "shard-000011.json"
    assert (said["shard"], said["first_sequence_id"], said["last_sequence_id"]) == ("shard-000011", 88, 95)
    assert str(part) in said["reason"]
    assert not (output / "_SUCCESS").exists()
    assert not (output / "shards" / "shard-000011.parquet").exists()
    assert trouble.handed_out == Counter({f"shard-{n:06d}": 1 for n in range(SHARDS)}) + Counter(["shard-000011"])
    assert_counts_add_up(config, quarantined=1)

    # Allowed for: only the shard in quarantine is tried again, and the run ends well without it.
    trouble.handed_out.clear()
    answer(disturbed(twin, tmp_path, *settings, "scan.allow_quarantined=1"))
    assert trouble.handed_out == {"shard-000011": 2}
    assert (output / "_SUCCESS").exists()
    assert note.exists()
    assert read_scores(config.output).num_rows == SEQUENCES - PER_SHARD
    assert_counts_add_up(config, quarantined=1)
    assert "shard-000011 is quarantined" in " ".join(read_summary(config.output)["warnings"])

    # Mended: the shard is finished and its note is gone.
    part.write_bytes(sound)
    trouble.handed_out.clear()
    answer(config)
    assert trouble.handed_out == {"shard-000011": 1}
    assert not note.exists()
    assert_same_answer(config, twin)
    assert_counts_add_up(config)


# --- numbers that are none -----------------------------------------------------------------------------------------


def broken_model(twin: Config, folder: Path, parameter: str, row: int) -> Path:
    """A copy of the twin's model with one row of a weight set to NaN."""
    shutil.copytree(twin.model.path, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[parameter][row] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_that_computes_nothing_stops_at_the_factors(
    twin: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a sentence: what Ray would say of the other layers' tasks is not shown beside it."""
    model = broken_model(twin, tmp_path / "model", "gpt_neox.layers.0.mlp.dense_h_to_4h.weight", 3)
    config = disturbed(twin, tmp_path, f"model.path={model}", f"factors.path={tmp_path / 'factors'}")
    # A scan sees it before, by its first query.
    with pytest.raises(QueryError, match=r"'q0': its gradient at gpt_neox\.layers\.\d\.mlp\.\w+ is NaN or infinite"):
        answer(config)
    with pytest.raises(FactorsError, match=r"of gpt_neox\.layers\.\d\.mlp\.\w+ has \d+ entries that are NaN"):
        run_fit(config)
    assert not (tmp_path / "factors" / "factors.json").exists()
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_scores_that_are_none_are_counted_and_stop_the_scan(twin: Config, tmp_path: Path) -> None:
    """A model broken at one token of the corpus, which no query has: the sequences with that token have no score."""
    model = broken_model(twin, tmp_path / "model", "gpt_neox.embed_in.weight", VOCAB - 1)
    plain = (f"model.path={model}", "factors.solver=identity", "scan.compression=plain", "cluster.num_workers=1")
    with pytest.raises(
        RunError, match=r"\d+ sequences have scores that are NaN or infinite.*scan\.max_nonfinite=0\.001"
    ):
        answer(disturbed(twin, tmp_path, *plain))
    assert not (tmp_path / "run" / "_SUCCESS").exists()

    config = disturbed(twin, tmp_path, *plain, "scan.max_nonfinite=1")
    answer(config)
    documents = [json.loads(line) for path in sorted((Path(twin.output).parent / "documents").iterdir())
                 for line in path.read_text().splitlines()]  # fmt: skip
    without = {number for number, row in enumerate(documents) if VOCAB - 1 in row["tokens"]}
    counts = assert_counts_add_up(config)
    assert 0 < counts["scanned"]["nonfinite"] == len(without) < SEQUENCES
    assert counts["refined"]["nonfinite"] == 0
    tables = rows_of(config.output)
    assert tables["top"]
    assert not without & {row["sequence_id"] for row in tables["top"]}


@pytest.mark.slow
def test_a_refined_score_that_is_none_is_counted_and_left_out(twin: Config, tmp_path: Path) -> None:
    """A refined unit in storage is used as it is: a NaN put into one is in the counts, and never in the tables."""
    config = disturbed(twin, tmp_path, "cluster.num_workers=1")
    shutil.copytree(twin.output, config.output)
    best = next(row for row in rows_of(twin.output)["top"] if row["rank"] == 1)
    pair = best["query_id"], best["sequence_id"]
    # Similarities and token targets of the row lie there too.
    units = {path: pq.read_table(path) for path in (tmp_path / "run" / "refined").glob("*/*.parquet")}
    [(unit, table, rows, row)] = [
        (path, table, rows, row)
        for path, table in units.items()
        for rows in [table.to_pylist()]
        for row in rows
        if (row["query_id"], row["sequence_id"]) == pair and sum(row["layer_scores"]) == pytest.approx(best["score"])
    ]
    row["layer_scores"][0] = float("nan")
    changed = type(table).from_pylist(rows, schema=table.schema.remove_metadata())
    unit.write_bytes(to_parquet(changed, footer_of(table.schema, unit.name)))
    answer(config)
    counts = assert_counts_add_up(config)
    assert counts["refined"] == {"rows": read_summary(twin.output)["counts"]["refined"]["rows"], "nonfinite": 1}
    assert "NaN" in " ".join(read_summary(config.output)["warnings"])
    published = {(row["query_id"], row["sequence_id"]) for row in rows_of(config.output)["top"]}
    assert published
    assert pair not in published


# --- a second driver -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_drivers_at_once_do_no_harm(twin: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that keeps nobody out, and from the very start: factors of their own, prepared and fitted by both."""
    monkeypatch.setattr(Lease, "take", lambda self: self.store.write(LEASE, self.mine.to_bytes()))
    monkeypatch.setattr(Lease, "release", lambda self: None)
    # Nor does either notice the other.
    monkeypatch.setattr(Lease, "_look", lambda self: None)
    config = disturbed(
        twin,
        tmp_path,
        f"corpus.path={Path(twin.output).parent / 'documents'}",
        f"factors.path={tmp_path / 'factors'}",
        "cluster.num_workers=1",
    )
    together = threading.Barrier(2)
    errors: list[InfscanError] = []

    def drive() -> None:
        together.wait()
        try:
            answer(config)
        except InfscanError as error:
            errors.append(error)

    drivers = [threading.Thread(target=drive) for _ in range(2)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert not errors
    assert_same_answer(config, twin)
    assert_counts_add_up(config)


@pytest.mark.slow
def test_factors_that_another_driver_finished_meanwhile_are_taken(
    twin: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes the partial sums when it is done, under the hands of this one."""
    factors = tmp_path / "factors"
    sums = fit._Fitting.sum_lambdas

    def meanwhile(self: fit._Fitting, executor: Executor) -> None:
        sums(self, executor)
        shutil.copytree(twin.factors.path or "", factors, dirs_exist_ok=True)
        shutil.rmtree(factors / "covariance")
        shutil.rmtree(factors / "lambda")

    monkeypatch.setattr(fit._Fitting, "sum_lambdas", meanwhile)
    config = disturbed(twin, tmp_path, f"factors.path={factors}", "cluster.num_workers=1")
    answer(config)
    assert_same_answer(config, twin)
