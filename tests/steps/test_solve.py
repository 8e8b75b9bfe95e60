"""Laws of the iterated inverse: it solves the damped system, query by query, and what follows reads its solution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from infscan.config import Compression, Dtype, IterationConfig, ModelConfig, Solver
from infscan.corpus.addressable import CorpusAddress, PreparedCorpus
from infscan.model.architecture import describe
from infscan.model.gauss_newton import GaussNewton, damping_vector, join
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Part, Query
from infscan.results.tensor_files import read_facts, read_tensors
from infscan.steps.preconditioner import Preconditioner, StoredGradients, layer_factors, preconditioned, query_gradients
from infscan.steps.queries import QueryTask, query_task
from infscan.steps.solve import Solved, SolveTask, falling, solve_task, solved_before
from infscan.storage import Store
from tests.steps.builders import SEED, fit, fit_plan
from tests.steps.runs import tiny_model

TRACKED = r"layers\.0\.mlp"
CURVATURE = 8  # sequences that G is of


def a_query(query_id: str, *ids: int) -> Query:
    return Query(query_id, (Part(tuple(ids), (len(ids) - 2, len(ids) - 1), 1.0),), "completion", None, None)


QUERIES = (a_query("first", 5, 9, 3, 7, 11), a_query("second", 2, 4, 8, 16), a_query("third", 30, 20, 10, 40))


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> ModelWorker:
    """A small model in float64, one MLP tracked: G is small enough to be written out."""
    folder = tiny_model(tmp_path_factory.mktemp("double"), width=8)
    model = ModelConfig(path=str(folder), tracked=TRACKED, dtype=Dtype.float64)
    return ModelWorker(WorkerSettings(model, describe(str(folder), TRACKED).layers, sharded=False), RankContext())


@pytest.fixture(scope="module")
def ekfac(tmp_path_factory: pytest.TempPathFactory, double: ModelWorker, corpus: PreparedCorpus) -> Preconditioner:
    return fit(double, Store(str(tmp_path_factory.mktemp("factors"))), corpus, fit_plan(double, corpus))


def solve(
    rank: ModelWorker,
    ekfac: Preconditioner,
    corpus: PreparedCorpus,
    store: Store,
    query: Query,
    solver: Solver,
    **settings: float,
) -> Solved:
    return solve_together(rank, ekfac, corpus, store, (query,), solver, **settings)[0]


def solve_together(
    rank: ModelWorker,
    ekfac: Preconditioner,
    corpus: PreparedCorpus,
    store: Store,
    queries: tuple[Query, ...],
    solver: Solver,
    **settings: float,
) -> list[Solved]:
    iteration = IterationConfig(**{"steps": 400, "tolerance": 1e-8, **settings})
    task = SolveTask(
        store,
        tuple(query.id for query in queries),
        queries,
        solver,
        iteration,
        ekfac,
        CorpusAddress.of(corpus),
        np.arange(CURVATURE),
        "curvature",
        ("key",) * len(queries),
        SEED,
    )
    return solve_task(rank, task)


def dense_solution(
    rank: ModelWorker, ekfac: Preconditioner, corpus: PreparedCorpus, queries: tuple[Query, ...]
) -> Tensor:
    """(G + lambda)^-1 grad(-f), [Q, P], with G written out column by column."""
    sequences = corpus.read(np.arange(CURVATURE))
    ggn = GaussNewton(rank, sequences, tokens_per_batch=1024)
    lambdas = {}
    for layer in rank.layers:
        known = layer_factors(ekfac, layer, "cpu", torch.float64)
        assert known is not None
        lambdas[layer.name] = known[1]
    eye = torch.eye(ggn.size, dtype=torch.float64)
    G = torch.cat([ggn.product(part) for part in eye.split(64)])
    system = G + torch.diag(damping_vector(rank.layers, lambdas, eye))
    return torch.linalg.solve(system, join(rank.layers, query_gradients(rank, queries, rank.layers)).T).T


def read_solution(rank: ModelWorker, store: Store, query: Query) -> Tensor:
    tensors = read_tensors(store, query.id)
    return join(rank.layers, {name: matrix[None] for name, matrix in tensors.items()})[0]


def test_cg_finds_the_dense_solution(
    double: ModelWorker, ekfac: Preconditioner, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    expected = dense_solution(double, ekfac, corpus, QUERIES)
    for query, x_p in zip(QUERIES, expected, strict=True):
        solved = solve(double, ekfac, corpus, store, query, Solver.cg)
        assert solved.residual < 1e-7 < solved.ekfac_residual
        found = read_solution(double, store, query)
        assert float((found - x_p).norm() / x_p.norm()) < 1e-6
        assert solved_before(read_facts(store, query.id)) == solved


@pytest.mark.parametrize("solver", [Solver.cg, Solver.astra])
def test_queries_that_share_the_passes_of_the_model_find_what_each_finds_alone(
    solver: Solver, double: ModelWorker, ekfac: Preconditioner, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    store, forwards = Store(str(tmp_path)), 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    handle = double.model.module.get_input_embeddings().register_forward_hook(count)
    try:
        together = solve_together(double, ekfac, corpus, store, QUERIES, solver, steps=12)
        shared, forwards = forwards, 0
        alone = [solve(double, ekfac, corpus, Store(str(tmp_path / "b")), query, solver, steps=12) for query in QUERIES]
    finally:
        handle.remove()
    for query, one, other in zip(QUERIES, together, alone, strict=True):
        x_p, y_p = (read_solution(double, Store(str(tmp_path / part)), query) for part in ("", "b"))
        assert float((x_p - y_p).norm() / y_p.norm()) < 1e-9
        assert (one.query_id, one.products) == (other.query_id, other.products) == (query.id, 12)
        assert one.residual == pytest.approx(other.residual, rel=1e-6)
    # Three times as many forwards alone, each query's own ones and astra's step size apart.
    assert shared < 0.45 * forwards


def test_what_is_in_storage_already_stays(
    double: ModelWorker, ekfac: Preconditioner, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    """Where a batch was interrupted between its files: the others come out as they would have."""
    store = Store(str(tmp_path))
    solve_together(double, ekfac, corpus, store, QUERIES, Solver.cg, steps=3)
    kept = {entry.name: entry.etag for entry in store.list()}
    before = read_solution(double, store, QUERIES[1])
    store.remove("second")
    solve_together(double, ekfac, corpus, store, QUERIES, Solver.cg, steps=3)
    assert {name: etag for name, etag in kept.items() if name != "second"} == {
        entry.name: entry.etag for entry in store.list() if entry.name != "second"
    }
    assert torch.equal(read_solution(double, store, QUERIES[1]), before)


def test_astra_on_all_sequences_goes_there_too(
    double: ModelWorker, ekfac: Preconditioner, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    solved = solve(double, ekfac, corpus, Store(str(tmp_path)), QUERIES[0], Solver.astra, batch=CURVATURE, steps=150)
    assert solved.residual < 0.01 * solved.ekfac_residual
    found = read_solution(double, Store(str(tmp_path)), QUERIES[0])
    expected = dense_solution(double, ekfac, corpus, QUERIES[:1])[0]
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_random_batches_come_nearer_than_ekfac(
    double: ModelWorker, ekfac: Preconditioner, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    solved = solve(double, ekfac, corpus, Store(str(tmp_path)), QUERIES[0], Solver.astra, batch=4, steps=150)
    found = read_solution(double, Store(str(tmp_path)), QUERIES[0])
    start = join(double.layers, preconditioned(double, QUERIES[:1], double.layers, ekfac))[0]
    expected = dense_solution(double, ekfac, corpus, QUERIES[:1])[0]
    assert float((found - expected).norm()) < 0.5 * float((start - expected).norm())
    assert solved.residual < solved.ekfac_residual


def test_fewer_steps_leave_a_larger_residual(
    double: ModelWorker, ekfac: Preconditioner, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    few, more = (
        solve(double, ekfac, corpus, Store(str(tmp_path / str(steps))), QUERIES[1], Solver.cg, steps=steps)
        for steps in (5, 30)
    )
    assert few.products == 5
    assert more.residual < few.residual


@pytest.mark.parametrize("solver", [Solver.cg, Solver.astra])
def test_a_solution_is_the_same_whatever_was_solved_before(
    double: ModelWorker, ekfac: Preconditioner, corpus: PreparedCorpus, tmp_path: Path, solver: Solver
) -> None:
    after, alone = Store(str(tmp_path / "after")), Store(str(tmp_path / "alone"))
    for query in QUERIES:
        solve(double, ekfac, corpus, after, query, solver, steps=4)
    double.forget()
    solve(double, ekfac, corpus, alone, QUERIES[2], solver, steps=4)
    assert torch.equal(read_solution(double, after, QUERIES[2]), read_solution(double, alone, QUERIES[2]))


def test_what_follows_reads_the_solutions(
    double: ModelWorker, ekfac: Preconditioner, corpus: PreparedCorpus, tmp_path: Path
) -> None:
    store = Store(str(tmp_path))
    for query in QUERIES:
        solve(double, ekfac, corpus, store, query, Solver.cg, steps=20)
    inverse = replace(
        ekfac, solver=Solver.cg, solutions=StoredGradients(store, {query.id: query.id for query in QUERIES})
    )
    P = preconditioned(double, QUERIES, double.layers, inverse)
    for row, query in enumerate(QUERIES):
        assert torch.equal(join(double.layers, P)[row], read_solution(double, store, query))
    # At every rank the compression is of the solution: at the full one it is the solution.
    rank = min(min(layer.outputs, layer.inputs) for layer in double.layers) - 1
    for name, width in (("full", None), ("low", rank)):
        query_task(double, QueryTask(store, name, QUERIES, double.layers, inverse, width, Compression.weighted, "key"))
    full, low = read_tensors(store, "full"), read_tensors(store, "low")
    for layer in double.layers:
        torch.testing.assert_close(full[f"{layer.name}|P"], P[layer.name], rtol=1e-9, atol=1e-12)
        near = low[f"{layer.name}|U"] @ low[f"{layer.name}|V"].transpose(1, 2)
        assert float((near - P[layer.name]).norm()) < 0.2 * float(P[layer.name].norm())


def test_what_an_inverse_does_has_a_fingerprint(ekfac: Preconditioner, tmp_path: Path) -> None:
    solutions = StoredGradients(Store(str(tmp_path)), {"first": "solutions/1"})
    others = [ekfac, replace(ekfac, solver=Solver.cg), replace(ekfac, solver=Solver.cg, solutions=solutions)]
    others.append(replace(others[2], solutions=replace(solutions, names={"first": "solutions/2"})))
    assert len({inverse.fingerprint for inverse in others}) == 4


def test_step_sizes_fall_to_zero() -> None:
    sizes = falling(0.5, 10)
    assert sizes[0] == 0.5
    assert len(sizes) == 10
    assert np.allclose(np.diff(sizes), -0.05)
