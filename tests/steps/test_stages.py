"""Laws of the multi-stage chain: it is the dense one, in both limits of alpha, for any number of stages, any number of
times (docs/method.md#multi-stage)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from infscan.config import Compression, DampingConfig, Dtype, IterationConfig, Labels, ModelConfig, Solver
from infscan.corpus.addressable import CorpusAddress, PreparedCorpus
from infscan.influence.inverse import inverse_core
from infscan.model.architecture import describe
from infscan.model.gauss_newton import GaussNewton, damping_vector, join
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Part, Query
from infscan.results.tensor_files import read_tensors
from infscan.steps.check import CheckTask, check_task
from infscan.steps.factor_files import read_layer_factors
from infscan.steps.preconditioner import Preconditioner, StoredGradients, layer_factors, preconditioned, query_gradients
from infscan.steps.queries import QueryTask, query_task, read_query_batch
from infscan.steps.solve import SolveTask, solve_task
from infscan.steps.stages import StageTask, stage_task
from infscan.storage import Store
from tests.steps.builders import SEED, fit, fit_plan, small_corpus
from tests.steps.runs import tiny_model

Matrix = NDArray[np.float64]

TRACKED = r"layers\.[01]\.mlp"
QUERIES = (
    Query("first", (Part((5, 9, 3, 7, 11), (3, 4)),)),
    Query("second", (Part((2, 4, 8, 16), (2, 3)), Part((2, 4, 9), (2,), -1.0))),
)
CLOSE = 1e-6


@dataclass
class Trained:
    """A stage: a rank with its model, in float64, its corpus, and factors of it."""

    rank: ModelWorker
    corpus: PreparedCorpus
    inverse: Preconditioner


def stage(folder: Path, seed: int, damping: DampingConfig) -> Trained:
    model = tiny_model(folder / "model", width=8, seed=seed)
    settings = ModelConfig(path=str(model), tracked=TRACKED, dtype=Dtype.float64)
    rank = ModelWorker(WorkerSettings(settings, describe(str(model), TRACKED).layers, sharded=False), RankContext())
    corpus = small_corpus(folder / "corpus", count=8 + 4 * seed)
    plan = fit_plan(rank, corpus, slices=2)
    inverse = fit(rank, Store(str(folder / "factors")), corpus, plan, Labels.empirical)
    return Trained(rank, corpus, replace(inverse, damping=damping))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[Trained]:
    """Pretraining and two fine-tunings; models are random, which the algebra does not mind."""
    dampings = (DampingConfig(relative=0.1), DampingConfig(absolute=0.02), DampingConfig(relative=0.3))
    folder = tmp_path_factory.mktemp("stages")
    for seed in range(3):
        (folder / str(seed) / "corpus").mkdir(parents=True)
    return [stage(folder / str(seed), seed, damping) for seed, damping in enumerate(dampings)]


def through(
    trained: Trained, alpha: float, vectors: StoredGradients | None, store: Store, name: str
) -> StoredGradients:
    """One stage's task, layers in two files; an infinite alpha is solver=identity."""
    inverse = replace(trained.inverse, alpha=alpha, vectors=vectors)
    if alpha == float("inf"):
        inverse = replace(inverse, solver=Solver.identity)
    layers = trained.rank.layers
    found = StoredGradients(
        store,
        {query.id: f"{name}-{query.id}-{{part:02d}}" for query in QUERIES},
        {layer.name: number % 2 for number, layer in enumerate(layers)},
    )
    for part in range(2):
        mine = tuple(layer for layer in layers if found.parts[layer.name] == part)
        names = tuple(found.file(query.id, mine[0]) for query in QUERIES)
        stage_task(trained.rank, StageTask(store, names, QUERIES, mine, inverse))
    return found


def brought_back(stages: Sequence[Trained], alphas: Sequence[float], store: Store) -> StoredGradients:
    """Through every stage but the first, the last one first. alphas: of stages 2, 3, ..."""
    vectors: StoredGradients | None = None
    for number in range(len(stages) - 1, 0, -1):
        vectors = through(stages[number], alphas[number - 1], vectors, store, f"x{number}")
    assert vectors is not None
    return vectors


def damped_system(trained: Trained, layer_index: int) -> Matrix:
    """G + lambda of one layer, written out entry by entry: (Q_S kron Q_A) diag(Lambda + lambda) (Q_S kron Q_A)^T."""
    layer = trained.rank.layers[layer_index]
    factors = read_layer_factors(trained.inverse.factors, layer)
    Q = np.kron(factors.Q_S.dense().numpy(), factors.Q_A.dense().numpy())
    Lambda = factors.Lambda.numpy().reshape(-1)
    settings = trained.inverse.damping
    lam = settings.absolute if settings.absolute is not None else settings.relative * Lambda.mean()
    return Q @ np.diag(Lambda + lam) @ Q.T


def dense_chain(stages: Sequence[Trained], alphas: Sequence[float]) -> dict[str, Matrix]:
    """(G_1 + lambda_1)^-1 alpha_2 (G_2 + alpha_2 + lambda_2)^-1 ... grad(-f), by layer [Q, O I]."""
    last = stages[-1].rank
    V = query_gradients(last, QUERIES, last.layers)
    found = {}
    for index, layer in enumerate(last.layers):
        x = V[layer.name].numpy().reshape(len(QUERIES), -1).T
        for number in range(len(stages) - 1, 0, -1):
            system, alpha = damped_system(stages[number], index), alphas[number - 1]
            x = alpha * np.linalg.solve(system + alpha * np.eye(len(system)), x)
        found[layer.name] = np.linalg.solve(damped_system(stages[0], index), x).T
    return found


def off(ours: torch.Tensor, theirs: Matrix) -> float:
    return float(np.linalg.norm(ours.numpy().reshape(theirs.shape) - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(("count", "alphas"), [(2, (0.05,)), (3, (0.05, 0.7)), (3, (1e-9, 1e9))])
def test_the_chain_is_the_dense_one(
    stages: list[Trained], tmp_path: Path, count: int, alphas: tuple[float, ...]
) -> None:
    chain, store, print_ = stages[:count], Store(str(tmp_path)), str(alphas)
    first = stages[0].rank
    inverse = replace(stages[0].inverse, vectors=brought_back(chain, alphas, store))
    expected = dense_chain(chain, alphas)
    P = preconditioned(first, QUERIES, first.layers, inverse)
    for name, dense in expected.items():
        assert off(P[name], dense) < CLOSE, name

    # The stored query batch, and full-rank gradients as refining and checking make them, give the scores of the same P.
    query_task(first, QueryTask(store, "batch", QUERIES, first.layers, inverse, None, Compression.weighted, print_))
    ids = np.arange(stages[0].corpus.sequences)
    task = CheckTask(CorpusAddress.of(stages[0].corpus), ids, QUERIES, (0, 1), first.layers, inverse, print_, 256)
    found = check_task(first, task, read_query_batch(store, [["batch"]]).batch)
    assert found is not None
    wanted = np.zeros((len(ids), len(QUERIES)))
    for batch in first.batches(stages[0].corpus.read(ids), 256):

        def consume(layer, s_bto, a_bti, _routed, batch=batch) -> None:  # type: ignore[no-untyped-def]
            g = (s_bto.transpose(1, 2) @ a_bti).flatten(1).numpy()
            wanted[batch.rows] += g @ expected[layer.name].T

        first.backward(batch, first.layers, batch.loss(), consume)
    for scores_nq in found:
        assert np.linalg.norm(scores_nq - wanted) / np.linalg.norm(wanted) < CLOSE


def test_a_large_alpha_leaves_the_pretrained_inverse_alone(stages: list[Trained], tmp_path: Path) -> None:
    first, last = stages[0], stages[1]
    V = query_gradients(last.rank, QUERIES, last.rank.layers)
    for alpha in (1e9, float("inf")):
        vectors = brought_back(stages[:2], (alpha,), Store(str(tmp_path / str(alpha))))
        P = preconditioned(first.rank, QUERIES, first.rank.layers, replace(first.inverse, vectors=vectors))
        for index, layer in enumerate(first.rank.layers):
            alone = np.linalg.solve(damped_system(first, index), V[layer.name].numpy().reshape(len(QUERIES), -1).T).T
            assert off(P[layer.name], alone) < CLOSE


def test_a_small_alpha_has_a_limit_in_proportion(stages: list[Trained], tmp_path: Path) -> None:
    """I / alpha -> (G_1 + lambda_1)^-1 (G_2 + lambda_2)^-1 grad(-f), a finite vector."""
    first, last = stages[0], stages[1]
    V = query_gradients(last.rank, QUERIES, last.rank.layers)
    for alpha in (1e-9, 1e-30):
        vectors = brought_back(stages[:2], (alpha,), Store(str(tmp_path / str(alpha))))
        P = preconditioned(first.rank, QUERIES, first.rank.layers, replace(first.inverse, vectors=vectors))
        for index, layer in enumerate(first.rank.layers):
            x = np.linalg.solve(damped_system(last, index), V[layer.name].numpy().reshape(len(QUERIES), -1).T)
            limit = np.linalg.solve(damped_system(first, index), x).T
            assert off(P[layer.name] / alpha, limit) < CLOSE


def test_at_a_later_stage_its_own_alpha_is_added_and_nothing_multiplied(stages: list[Trained]) -> None:
    last = stages[1]
    V = query_gradients(last.rank, QUERIES, last.rank.layers)
    P = preconditioned(last.rank, QUERIES, last.rank.layers, replace(last.inverse, alpha=0.4))
    for index, layer in enumerate(last.rank.layers):
        system = damped_system(last, index)
        x = V[layer.name].numpy().reshape(len(QUERIES), -1).T
        assert off(P[layer.name], np.linalg.solve(system + 0.4 * np.eye(len(system)), x).T) < CLOSE


def test_a_relative_damping_is_of_lambda_alone(stages: list[Trained]) -> None:
    inverse = replace(stages[0].inverse, damping=DampingConfig(relative=0.1))
    layer = stages[0].rank.layers[0]
    alone, held = (layer_factors(replace(inverse, alpha=alpha), layer, "cpu", torch.float64) for alpha in (0.0, 100.0))
    assert alone is not None
    assert held is not None
    assert held[1] == alone[1] + 100.0
    assert torch.equal(held[0].Lambda, alone[0].Lambda)


def test_factors_and_results_are_unchanged_by_a_thousand_uses(stages: list[Trained], tmp_path: Path) -> None:
    last, store = stages[1], Store(str(tmp_path))
    layers = last.rank.layers[:1]
    folder = Path(last.inverse.factors.uri)
    stored = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    known = layer_factors(replace(last.inverse, alpha=0.05), layers[0], "cpu", torch.float64)
    assert known is not None
    inverse = replace(last.inverse, alpha=0.05, vectors=through(last, 0.05, None, store, "x"))
    first = preconditioned(last.rank, QUERIES[:1], layers, inverse)[layers[0].name]
    C_qoi = inverse_core(first, *known)
    for _ in range(1000):
        assert torch.equal(inverse_core(first, *known), C_qoi)
        again = preconditioned(last.rank, QUERIES[:1], layers, inverse)[layers[0].name]
    assert torch.equal(again, first)
    assert {path: path.read_bytes() for path in stored} == stored


def test_a_querys_vector_does_not_depend_on_the_others(stages: list[Trained], tmp_path: Path) -> None:
    last, together, alone = stages[1], Store(str(tmp_path / "together")), Store(str(tmp_path / "alone"))
    inverse = replace(last.inverse, alpha=0.05)
    stage_task(last.rank, StageTask(together, ("a", "b"), QUERIES, last.rank.layers, inverse))
    stage_task(last.rank, StageTask(alone, ("b",), QUERIES[1:], last.rank.layers, inverse))
    assert together.read("b") == alone.read("b")


@pytest.mark.slow
def test_cg_brings_back_through_the_true_system(stages: list[Trained], tmp_path: Path) -> None:
    """solver=cg at a later stage: alpha (G + alpha + lambda)^-1 with G written out; at the first, on what it left."""
    last, store = stages[1], Store(str(tmp_path))
    rank, alpha = last.rank, 0.5
    layers = tuple(layer for layer in rank.layers if ".0." in layer.name)
    narrow = ModelWorker.__new__(ModelWorker)
    narrow.__dict__ = {**rank.__dict__, "layers": layers, "_cache": {}}
    inverse = replace(last.inverse, alpha=alpha)
    iteration = IterationConfig(steps=400, tolerance=1e-8)
    ids = np.arange(4)
    names = tuple(f"s-{query.id}" for query in QUERIES)
    address = CorpusAddress.of(last.corpus)
    task = SolveTask(
        store, names, QUERIES, Solver.cg, iteration, inverse, address, ids, "c", ("key",) * len(QUERIES), SEED
    )
    solve_task(narrow, task)
    solved = replace(inverse, solver=Solver.cg, solutions=StoredGradients(store, {q.id: f"s-{q.id}" for q in QUERIES}))
    stage_task(narrow, StageTask(store, ("a", "b"), QUERIES, layers, solved))

    ggn = GaussNewton(narrow, last.corpus.read(ids), tokens_per_batch=1024)
    lambdas = {}
    for layer in layers:
        known = layer_factors(replace(inverse, alpha=0.0), layer, "cpu", torch.float64)
        assert known is not None
        lambdas[layer.name] = known[1]
    eye = torch.eye(ggn.size, dtype=torch.float64)
    system = torch.cat([ggn.product(part) for part in eye.split(64)]) + alpha * eye
    system = system + torch.diag(damping_vector(layers, lambdas, eye))
    dense = alpha * torch.linalg.solve(system, join(layers, query_gradients(narrow, QUERIES, layers)).T).T
    for name, x_p in zip(("a", "b"), dense, strict=True):
        found = join(layers, {key: value[None] for key, value in read_tensors(store, name).items()})[0]
        assert float((found - x_p).norm() / x_p.norm()) < CLOSE
    # The first stage iterates on what the last one left, whatever its own model's gradients are.
    first = stages[0]
    vectors = StoredGradients(store, {"first": "a", "second": "b"})
    narrow.__dict__ |= {**first.rank.__dict__, "layers": layers, "_cache": {}}
    start = replace(first.inverse, vectors=vectors)
    address = CorpusAddress.of(first.corpus)
    task = SolveTask(store, ("end",), QUERIES[:1], Solver.cg, iteration, start, address, ids, "d", ("key",), SEED)
    assert solve_task(narrow, task)[0].residual < 1e-6
    x_1p = join(layers, {key: value[None] for key, value in read_tensors(store, "end").items()})
    ggn = GaussNewton(narrow, first.corpus.read(ids), tokens_per_batch=1024)
    lambdas = {layer.name: known[1] for layer in layers if (known := layer_factors(start, layer, "cpu", torch.float64))}
    rest = ggn.product(x_1p) + damping_vector(layers, lambdas, eye) * x_1p - dense[:1]
    assert float(rest.norm() / dense[0].norm()) < CLOSE
