"""corpus.attention=within: in every pass, a packed sequence counts as its documents do alone, each with the token after
it to predict."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from infscan.config import (
    Attention,
    Compression,
    DampingConfig,
    Dtype,
    IterationConfig,
    Labels,
    ModelConfig,
    Packing,
    Solver,
)
from infscan.corpus.addressable import AddressableCorpus, CorpusAddress, PreparedCorpus, open_corpus
from infscan.corpus.parts import open_prepared
from infscan.corpus.reading import Reading
from infscan.corpus.sequences import Sequence
from infscan.influence.cg import damped
from infscan.influence.layers import Layer
from infscan.influence.layout import QueryBatch
from infscan.influence.topk import SIDES
from infscan.influence.topk_tracker import Thresholds
from infscan.model.architecture import describe
from infscan.model.gauss_newton import GaussNewton, damping_vector, join
from infscan.model.loaded import RankContext
from infscan.model.losses import Loss
from infscan.model.worker import Batch, ModelWorker, WorkerSettings
from infscan.queries import Part, Query
from infscan.results.refined import read_unit
from infscan.results.tensor_files import read_tensors
from infscan.steps.check import CheckTask, check_task
from infscan.steps.eigenbases import decompose_layer, finish_layer
from infscan.steps.factor_files import read_layer_factors
from infscan.steps.factors import covariance_task, lambda_task
from infscan.steps.preconditioner import Preconditioner, query_gradients
from infscan.steps.queries import QueryTask, query_task, read_query_batch
from infscan.steps.refine import RefineTask, refine_task
from infscan.steps.scan import ScanTask, scan_task
from infscan.steps.solve import SolveTask, ekfac_factors, solve_task
from infscan.storage import Store
from tests.corpus.builders import VOCAB, prepare, settings, write_rows
from tests.steps.builders import SEED, fit, fit_plan, fit_tasks
from tests.steps.runs import tiny_model

T = 16
LENGTHS = (5, 1, 6, 20, 3, 2, 9, 15, 4, 1, 1, 7)
QUERIES = (Query("a", (Part((5, 9, 33, 4), (2, 3)),)), Query("b", (Part((7, 7, 12), (2,)),)))
CLOSE = 1e-9


@dataclass(frozen=True)
class Case:
    """packed: sequences of several documents. apart: the stretches of each between its starts, the token after each
    included; `rows[n]` are those of sequence n, as numbers in `apart`."""

    rank: ModelWorker
    packed: PreparedCorpus
    apart: PreparedCorpus
    rows: list[list[int]]

    def sequences(self) -> list[Sequence]:
        return self.rank.read(CorpusAddress.of(self.packed), self.ids)

    @property
    def across(self) -> AddressableCorpus:
        """The packed sequences, their documents not kept apart."""
        return open_corpus(self.packed.store)

    @property
    def ids(self) -> np.ndarray:
        return np.arange(self.packed.sequences)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("attention")
    path = str(tiny_model(folder / "model", width=8, vocab=VOCAB))
    tracked = r"layers\.\d+\.(mlp|attention\.dense)"
    layers = describe(path, tracked).layers
    rank = ModelWorker(
        WorkerSettings(ModelConfig(path, dtype=Dtype.float64, tracked=tracked), layers, sharded=False), RankContext()
    )
    rng = np.random.default_rng(0)
    documents = [{"id": f"d{n}", "tokens": rng.integers(2, VOCAB, length).tolist()} for n, length in enumerate(LENGTHS)]
    write_rows(folder / "in.jsonl", documents)
    pack = settings(Packing.concat, T, bos=True)
    packed = open_prepared(prepare(folder / "in.jsonl", folder / "packed", pack)[1].store, Reading(Attention.within))
    stretches: list[list[int]] = []
    rows = []
    for sequence in packed.read(np.arange(packed.sequences)):
        assert sequence.starts is not None
        ends = [*sequence.starts[1:].tolist(), len(sequence)]
        rows.append([len(stretches) + n for n in range(len(ends))])
        stretches += [
            sequence.token_ids[start : end + 1].tolist()
            for start, end in zip(sequence.starts.tolist(), ends, strict=True)
        ]
    assert max(map(len, rows)) > 3
    write_rows(folder / "apart.jsonl", [{"id": f"s{n}", "tokens": tokens} for n, tokens in enumerate(stretches)])
    apart = prepare(folder / "apart.jsonl", folder / "apart", settings(Packing.document, T + 1))[1]
    return Case(rank, packed, apart, rows)


@pytest.fixture(scope="module")
def inverse(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Preconditioner:
    """Any factors: what is compared is what the sequences give."""
    return fit(case.rank, Store(str(tmp_path_factory.mktemp("factors"))), case.apart, fit_plan(case.rank, case.apart))


def by_hand(rank: ModelWorker, sequence: Sequence, labels: dict[int, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """(s [T, O], a [T, I]) by layer of the sum of -log p(label) over positions, its documents run one by one."""
    assert sequence.starts is not None
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in rank.layers}
    for start, end in zip(sequence.starts, [*sequence.starts[1:], len(sequence)], strict=True):
        ids = torch.from_numpy(sequence.token_ids[start:end])[None]
        loss = Loss(torch.zeros_like(ids), torch.zeros_like(ids))
        for t in range(ids.shape[1]):
            if start + t in labels:
                loss.labels_bt[0, t], loss.weights_bt[0, t] = labels[start + t], 1

        def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor, _routed: object) -> None:
            parts[layer.name].append((s_bto[0].clone(), a_bti[0].clone()))

        rank.backward(Batch(np.arange(1), ids, torch.ones_like(ids, dtype=torch.bool)), rank.layers, loss, consume)
    return {name: (torch.cat([s for s, _ in found]), torch.cat([a for _, a in found])) for name, found in parts.items()}


@pytest.mark.parametrize("labels", list(Labels))
def test_factors_are_those_of_documents_run_one_by_one(case: Case, tmp_path: Path, labels: Labels) -> None:
    rank, store = case.rank, Store(str(tmp_path))
    plan = fit_plan(rank, case.packed, tokens_per_batch=40)
    draw = labels is Labels.sampled
    for task in fit_tasks(store, case.packed, plan, labels, draw=draw):
        covariance_task(rank, task)
    for layer in rank.layers:
        decompose_layer(store, plan, layer)
    for task in fit_tasks(store, case.packed, plan, labels):
        lambda_task(rank, task)
    for layer in rank.layers:
        finish_layer(store, plan, layer)
    stored = read_tensors(store, "labels/slice-0000.safetensors")["labels"] if draw else None
    A = {layer.name: torch.zeros(layer.inputs, layer.inputs, dtype=torch.float64) for layer in rank.layers}
    S = {layer.name: torch.zeros(layer.outputs, layer.outputs, dtype=torch.float64) for layer in rank.layers}
    energy = dict.fromkeys(A, 0.0)
    sequences = case.sequences()
    for row, sequence in enumerate(sequences):
        T = len(sequence)
        true = {t: int(sequence.token_ids[t + 1]) for t in range(T - 1)}
        drawn = true if stored is None else {t: int(stored[row, t]) for t in range(T)}
        for name, (s_to, a_ti) in by_hand(rank, sequence, drawn).items():
            A[name] += a_ti.T @ a_ti
            S[name] += s_to.T @ s_to
            energy[name] += float((s_to.T @ a_ti).square().sum()) / len(sequences)
    for layer in rank.layers:
        factors = read_layer_factors(store, layer)
        torch.testing.assert_close(factors.A.dense(), A[layer.input_of] / case.packed.tokens, rtol=CLOSE, atol=CLOSE)
        torch.testing.assert_close(factors.S.dense(), S[layer.name] / case.packed.tokens, rtol=CLOSE, atol=CLOSE)
        assert float(factors.Lambda.sum()) == pytest.approx(energy[layer.name], rel=CLOSE)


def test_curvature_is_the_sum_of_the_documents(case: Case) -> None:
    """J^T H J at every position: of the documents alone, without the token after them."""
    sequences = case.sequences()
    documents, rows = [], []
    for sequence in sequences:
        assert sequence.starts is not None
        rows.append(np.arange(len(documents), len(documents) + len(sequence.starts)))
        documents += [
            Sequence(0, part, (), 0, "") for part in np.split(sequence.token_ids, sequence.starts[1:])
        ]  # fmt: skip
    packed, alone = (GaussNewton(case.rank, some, tokens_per_batch=64) for some in (sequences, documents))
    x_kp = torch.randn(2, packed.size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row, parts in enumerate(rows):
        expected = alone.product(x_kp, parts) * len(parts)
        found = packed.product(x_kp, np.array([row]))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * float(expected.abs().max()))


def scores(case: Case, inverse: Preconditioner, corpus: AddressableCorpus, batch: QueryBatch) -> np.ndarray:
    found = check_task(
        case.rank,
        CheckTask(
            CorpusAddress.of(corpus),
            np.arange(corpus.sequences),
            QUERIES,
            (0, 1),
            case.rank.layers,
            inverse,
            "print",
            64,
        ),
        batch,
    )
    assert found is not None
    np.testing.assert_allclose(*found, rtol=0, atol=1e-9 * np.abs(found[1]).max())
    return found[1]


def test_scores_are_the_sums_of_the_documents_scores(case: Case, inverse: Preconditioner, tmp_path: Path) -> None:
    """In check, scan and refine alike; across documents they are others."""
    store, rank = Store(str(tmp_path)), case.rank
    rank.forget()
    query_task(rank, QueryTask(store, "all", QUERIES, rank.layers, inverse, None, Compression.weighted, "x"))
    queries = read_query_batch(store, [["all"]]).batch
    alone_nq = scores(case, inverse, case.apart, queries)
    expected_nq = np.stack([alone_nq[rows].sum(axis=0) for rows in case.rows])
    largest = np.abs(expected_nq).max()
    within_nq = scores(case, inverse, case.packed, queries)
    np.testing.assert_allclose(within_nq, expected_nq, rtol=0, atol=CLOSE * largest)
    across_nq = scores(case, inverse, case.across, queries)
    for row, parts in enumerate(case.rows):
        assert (np.abs(across_nq[row] - expected_nq[row]).max() < 1e-6 * largest) == (len(parts) == 1)

    count = case.packed.sequences
    task = ScanTask(
        run=store,
        corpus=CorpusAddress.of(case.packed),
        shard="shard-000000",
        sequence_ids=case.ids,
        query_ids=("a", "b"),
        query_batch="print",
        sides=SIDES,
        candidates=count,
        thresholds=Thresholds.none(len(QUERIES)),
        tokens_per_batch=40,
        dense=False,
        fingerprint="print",
    )
    hits = scan_task(rank, task, queries)
    assert hits is not None
    scanned = {(query, sequence_id): score for query, _, sequence_id, score in hits[0].rows()}
    wanted = dict.fromkeys(range(count), (0, 1))
    shards = (("shard-000000", case.ids),)
    refine_task(rank, RefineTask(store, "unit.parquet", "group", QUERIES, rank.layers, inverse, shards, wanted, 40))
    unit = read_unit(store, ["unit.parquet"], [layer.name for layer in rank.layers])
    keys = zip(unit.query_ids.to_pylist(), unit.sequence_ids.tolist(), strict=True)
    refined = dict(zip(keys, unit.scores.tolist(), strict=True))
    assert len(refined) == 2 * count
    for query, name in enumerate("ab"):
        for number in range(count):
            expected = pytest.approx(expected_nq[number, query], rel=1e-5, abs=1e-5 * largest)
            if (query, number) in scanned:
                assert scanned[query, number] == expected
            assert refined[name, number] == expected


def test_an_iterated_inverse_solves_the_system_of_documents_apart(
    case: Case, inverse: Preconditioner, tmp_path: Path
) -> None:
    rank, store = case.rank, Store(str(tmp_path))
    rank.forget()
    strong = replace(inverse, damping=DampingConfig(relative=1.0))
    task = SolveTask(
        store=store,
        names=("a",),
        queries=QUERIES[:1],
        solver=Solver.cg,
        settings=IterationConfig(steps=40, tolerance=1e-4),
        ekfac=strong,
        corpus=CorpusAddress.of(case.packed),
        curvature_ids=case.ids,
        curvature="print",
        fingerprints=("key",),
        seed=SEED,
    )
    solve_task(rank, task)
    x_1p = join(rank.layers, {name: value[None] for name, value in read_tensors(store, "a").items()})
    v_1p = join(rank.layers, query_gradients(rank, QUERIES[:1], rank.layers))
    lambda_p = damping_vector(rank.layers, {name: lam for name, (_, lam) in ekfac_factors(rank, strong).items()}, v_1p)

    def residual(sequences: list[Sequence]) -> float:
        system = damped(GaussNewton(rank, sequences, tokens_per_batch=64).product, lambda_p)
        return float((system(x_1p) - v_1p).norm() / v_1p.norm())

    within, across = residual(case.sequences()), residual(case.across.read(case.ids))
    assert within < 0.01 < 0.05 < across
