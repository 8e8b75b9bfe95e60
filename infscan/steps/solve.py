"""The iterated inverse of one query: (G + lambda) x = grad(-f) with exact products, from EK-FAC's solution on.

With stages, grad(-f) is what a later stage left of it, and lambda includes the stage's own alpha.
Solutions are stored at full rank, one file per query: compressing, checking and refining read them where they would
otherwise apply EK-FAC, so that the scan knows nothing of it (docs/method.md#iterated-inverse).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infscan.config import IterationConfig, Solver, fingerprint, plain
from infscan.corpus.addressable import CorpusAddress
from infscan.corpus.plan import Selection
from infscan.engine.executor import Step
from infscan.influence.astra import astra, largest_eigenvalue
from infscan.influence.cg import Operator, conjugate_gradients, damped
from infscan.influence.inverse import from_core, inverse_core
from infscan.influence.layers import Layer, LayerFactors
from infscan.model.gauss_newton import GaussNewton, damping_vector, join, split
from infscan.model.worker import ModelWorker
from infscan.queries import Query, queries_fingerprint
from infscan.results.tensor_files import read_facts, write_tensors
from infscan.steps.factors import Factors
from infscan.steps.preconditioner import Preconditioner, StoredGradients, gradients, layer_factors
from infscan.steps.run import Run
from infscan.storage import Store
from infscan.storage.foreign import parse_json

# Batches and steps of the power method before astra, and the share of the largest stable step that it takes.
_TRIED_BATCHES, _POWER_STEPS, _STABLE_SHARE = 4, 8, 0.5
_ASTRA_BATCH = 32

log = logging.getLogger("infscan")

FOLDER = "solutions"


def solve(run: Run, factors: Factors) -> Factors:
    """Iterate (G + lambda) x = grad(-f) for every query whose solution is not in <output>/solutions yet.

    Query by query, each on one rank: a solution does not depend on the other queries or on the number of workers.
    Returns the factors with an inverse that reads the solutions, and the residuals for summary.json.

    Raises:
        FactorsError: where an iteration diverges.
    """
    config = run.config.factors
    if not config.solver.iterated:
        return factors
    assert factors.curvature is not None, "an iterated inverse starts from factors"
    corpus, fitted = factors.curvature
    wanted = config.iteration.batch if config.solver is Solver.cg else None
    ids = fitted.at(Selection.of(fitted.size, wanted, run.config.seed).ids())
    settings = {
        "model": run.architecture.fingerprint,
        "tokenizer": run.inputs.tokenizer.digest if run.inputs.tokenizer else None,
        "factors": factors.fingerprint,
        "damping": plain(config.damping),
        "solver": config.solver,
        "iteration": plain(config.iteration),
        "seed": run.config.seed,
    }
    vectors = factors.inverse.vectors
    keys = {
        query.id: fingerprint(
            {
                **settings,
                "query": queries_fingerprint([query]),
                # Of a run with stages: what held this one, and what a later one left of the query.
                **({"alpha": factors.inverse.alpha} if factors.inverse.alpha else {}),
                **({"vector": vectors.names[query.id]} if vectors else {}),
            }
        )
        for query in run.queries
    }
    names = {query_id: f"{FOLDER}/{key[:24]}.safetensors" for query_id, key in keys.items()}
    ekfac = replace(factors.inverse, solver=Solver.ekfac)
    found: dict[str, Solved] = {}
    for query_id, name in names.items():
        if run.store.exists(name) and (facts := read_facts(run.store, name)).get("fingerprint") == keys[query_id]:
            found[query_id] = solved_before(facts)
    by_id = {query.id: query for query in run.queries}
    per_product = sequences_per_product(config.solver, config.iteration, len(ids))

    def task(query_id: str) -> SolveTask:
        return SolveTask(
            store=run.store,
            name=names[query_id],
            query=by_id[query_id],
            solver=config.solver,
            settings=config.iteration,
            ekfac=ekfac,
            corpus=CorpusAddress.of(corpus),
            curvature_ids=ids,
            curvature=factors.fingerprint or "",
            fingerprint=keys[query_id],
            seed=run.config.seed,
        )

    def on_done(query_id: str, solved: Solved) -> None:
        found[query_id] = solved

    def progress(query_id: str, solved: Solved) -> tuple[int, int]:
        return solved.products * per_product, 0

    left = len(by_id) - len(found)
    if left:
        _log_cost(run, per_product, left)
        step = Step("solve", "queries", list(by_id), solve_task, task, found.__contains__, progress)
        run.executor.run(step, on_done)
        run.executor.forget()
    inverse = replace(factors.inverse, solutions=StoredGradients(run.store, names))
    return replace(factors, inverse=inverse, iteration=_report(run, found))


def _log_cost(run: Run, per_product: int, queries: int) -> None:
    """What it will cost, before it is spent."""
    config = run.config.factors
    megabytes = 4 * sum(layer.size for layer in run.architecture.layers) / 2**20
    log.info(
        "solve       %s: %d queries, up to %d products each with G of %d sequences; %.3g MiB in storage per query",
        config.solver.value, queries, config.iteration.steps, per_product, megabytes,
    )  # fmt: skip


def _report(run: Run, found: dict[str, Solved]) -> dict[str, Any]:
    config = run.config.factors
    by_query = {
        query_id: {
            "residual": solved.residual,
            "ekfac_residual": solved.ekfac_residual,
            "products": solved.products,
        }
        for query_id, solved in sorted(found.items())
    }
    unconverged = [query_id for query_id, solved in found.items() if solved.residual > config.iteration.tolerance]
    if config.solver is Solver.cg and unconverged:
        run.telemetry.warn(
            f"{len(unconverged)} of {len(found)} queries stopped above factors.iteration.tolerance="
            f"{config.iteration.tolerance:g} after {config.iteration.steps} steps (relative residuals up to "
            f"{max(solved.residual for solved in found.values()):.2g}); more factors.iteration.steps lower them"
        )
    return {"solver": config.solver.value, "tolerance": config.iteration.tolerance, "queries": by_query}


@dataclass(frozen=True)
class SolveTask:
    """One query."""

    store: Store
    name: str
    query: Query
    solver: Solver
    settings: IterationConfig
    # Start, preconditioner and damping.
    ekfac: Preconditioner
    corpus: CorpusAddress
    # The sequences of the corpus that G is of.
    curvature_ids: np.ndarray
    curvature: str
    fingerprint: str
    seed: int


@dataclass(frozen=True)
class Solved:
    """What an iteration reached, on the sequences of G."""

    query_id: str
    # |v - (G + lambda) x| / |v| of the solution, and of EK-FAC's.
    residual: float
    ekfac_residual: float
    # With G of all those sequences, or (astra) of a batch each.
    products: int
    sequences: int


@dataclass(frozen=True)
class _System:
    """What every query of a task's run shares on a rank."""

    ggn: GaussNewton
    lambda_p: Tensor
    precondition: Operator


def sequences_per_product(solver: Solver, settings: IterationConfig, sequences: int) -> int:
    """How many of G's sequences one product is of: all (cg), or a batch (astra)."""
    return min(sequences, settings.batch or _ASTRA_BATCH) if solver is Solver.astra else sequences


def ekfac_factors(worker: ModelWorker, inverse: Preconditioner) -> dict[str, tuple[LayerFactors, float]]:
    """Every tracked layer's factors and damping on the rank, by layer. inverse: one that has factors."""
    known = {layer.name: layer_factors(inverse, layer, worker.device, worker.wide) for layer in worker.layers}
    return {name: found for name, found in known.items() if found is not None}


def ekfac_inverse(layers: Sequence[Layer], factors: Mapping[str, tuple[LayerFactors, float]]) -> Operator:
    """x -> (G + lambda)^-1 x by EK-FAC, on vectors [K, P]. factors: with their damping, by layer."""

    def apply(x_kp: Tensor) -> Tensor:
        matrices = split(layers, x_kp)
        return join(
            layers,
            {name: from_core(inverse_core(matrices[name], *known), known[0]) for name, known in factors.items()},
        )

    return apply


def solve_task(worker: ModelWorker, task: SolveTask) -> Solved:
    """Iterate for one query and write its solution, [O, I] by layer, in the statistics' dtype.

    Raises:
        FactorsError: where the iteration diverges or meets a direction without positive curvature.
    """
    system = worker.cached("system", (task.curvature, task.ekfac), lambda: _system(worker, task))
    V = gradients(worker, (task.query,), worker.layers, task.ekfac)
    v_1p = join(worker.layers, V)
    x_1p, products = (_cg if task.solver is Solver.cg else _astra)(system, v_1p, task)
    both_2p = torch.cat([x_1p, system.precondition(v_1p)])
    # By a product of its own: a recurrence's residual drifts, and astra's is of one batch.
    rest_2p = v_1p - damped(system.ggn.product, system.lambda_p)(both_2p)
    residual, ekfac_residual = (rest_2p.norm(dim=1) / v_1p.norm()).tolist()
    solved = Solved(task.query.id, residual, ekfac_residual, products, len(task.curvature_ids))
    facts = {"fingerprint": task.fingerprint, "solved": json.dumps(asdict(solved))}
    tensors = {name: matrix[0] for name, matrix in split(worker.layers, x_1p).items()}
    write_tensors(task.store, task.name, tensors, facts)
    return solved


def solved_before(facts: Mapping[str, str]) -> Solved:
    """The facts that a solution's file contains."""
    return Solved(**parse_json(facts["solved"]))


def _system(worker: ModelWorker, task: SolveTask) -> _System:
    sequences = worker.read(task.corpus, task.curvature_ids)
    factors = ekfac_factors(worker, task.ekfac)
    like = torch.zeros(0, dtype=worker.wide, device=worker.device)
    lambda_p = damping_vector(worker.layers, {name: lam for name, (_, lam) in factors.items()}, like)
    return _System(
        GaussNewton(worker, sequences, task.settings.tokens_per_batch), lambda_p, ekfac_inverse(worker.layers, factors)
    )


def _cg(system: _System, v_1p: Tensor, task: SolveTask) -> tuple[Tensor, int]:
    """From zero: preconditioned CG's first iterate is EK-FAC's solution, at the best length."""
    solution = conjugate_gradients(
        damped(system.ggn.product, system.lambda_p),
        v_1p,
        tolerance=task.settings.tolerance,
        max_iterations=task.settings.steps,
        preconditioner=system.precondition,
    )
    return solution.x_kp, int(solution.iterations_k[0])


def _astra(system: _System, v_1p: Tensor, task: SolveTask) -> tuple[Tensor, int]:
    settings, sequences = task.settings, len(task.curvature_ids)
    batch = sequences_per_product(task.solver, settings, sequences)
    largest = settings.step_size or _stable_step(system, batch, task.seed)
    estimate = astra(
        system.ggn.product,
        v_1p,
        system.lambda_p,
        system.precondition,
        sequences=sequences,
        batch=batch,
        step_sizes=falling(largest, settings.steps),
        momentum=settings.momentum,
        seed=task.seed,
    )
    return estimate.x_kp, settings.steps


def falling(largest: float, steps: int) -> Sequence[float]:
    """Step sizes that fall linearly, from `largest`; what the batches' noise left behind is averaged out at the end."""
    return [largest * (1 - step / steps) for step in range(steps)]


def _stable_step(system: _System, batch: int, seed: int) -> float:
    """Half of 1 / the largest eigenvalue of M (G_j + lambda) on a few batches: steps below twice that converge."""

    def preconditioned(x_1p: Tensor, rows: np.ndarray) -> Tensor:
        return system.precondition(system.ggn.product(x_1p, rows) + system.lambda_p * x_1p)

    value = largest_eigenvalue(
        preconditioned,
        system.lambda_p,
        sequences=len(system.ggn.sequences),
        batch=batch,
        batches=_TRIED_BATCHES,
        steps=_POWER_STEPS,
        seed=seed,
    )
    return _STABLE_SHARE / value
