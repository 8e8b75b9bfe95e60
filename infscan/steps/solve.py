"""The iterated inverse of some queries: (G + lambda) x = grad(-f) with exact products, from EK-FAC's solution on.

The queries of a batch share the passes of the model, and a group's ranks share their work and the vectors' memory.

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

from infscan.config import Config, IterationConfig, Solver, fingerprint, plain
from infscan.corpus.addressable import CorpusAddress
from infscan.corpus.plan import Selection
from infscan.engine.executor import Step
from infscan.influence.astra import astra, drawn, largest_eigenvalue
from infscan.influence.cg import Operator, Total, conjugate_gradients, damped, row_dots
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
# Queries that share the passes of the model at most: beyond, a query's share of what is shared is small. Vectors of a
# query's size that an iteration has at once: x, v, r, z, the direction, and its product in both dtypes.
_MOST_QUERIES, VECTORS = 8, 7

log = logging.getLogger("infscan")

FOLDER = "solutions"


def solve(run: Run, factors: Factors) -> Factors:
    """Iterate (G + lambda) x = grad(-f) for every query whose solution is not in <output>/solutions yet.

    In batches that the settings and the queries fix: a solution does not depend on the number of workers. Returns the
    factors with an inverse that reads the solutions, and the residuals for summary.json.

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
        "damping": config.damping.facts(),
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
    per_product = sequences_per_product(config.solver, config.iteration, len(ids))
    size = queries_per_batch(run.config, run.inputs.layers)
    batches = [run.queries[start : start + size] for start in range(0, len(run.queries), size)]

    def task(number: int) -> SolveTask:
        queries = tuple(batches[number])
        return SolveTask(
            store=run.store,
            names=tuple(names[query.id] for query in queries),
            queries=queries,
            solver=config.solver,
            settings=config.iteration,
            ekfac=ekfac,
            corpus=CorpusAddress.of(corpus),
            curvature_ids=ids,
            curvature=factors.fingerprint or "",
            fingerprints=tuple(keys[query.id] for query in queries),
            seed=run.config.seed,
        )

    def is_done(number: int) -> bool:
        return all(query.id in found for query in batches[number])

    def on_done(_: int, solved: list[Solved]) -> None:
        found.update({one.query_id: one for one in solved})

    def progress(_: int, solved: list[Solved]) -> tuple[int, int]:
        return max(one.products for one in solved) * per_product, 0

    left = [number for number in range(len(batches)) if not is_done(number)]
    if left:
        _log_cost(run, per_product, sum(len(batches[number]) for number in left), size)
        step = Step("solve", "batches", range(len(batches)), solve_task, task, is_done, progress)
        run.executor.run(step, on_done)
        run.executor.forget()
    inverse = replace(factors.inverse, solutions=StoredGradients(run.store, names))
    return replace(factors, inverse=inverse, iteration=_report(run, found))


def queries_per_batch(config: Config, layers: Sequence[Layer]) -> int:
    """How many queries share the passes of the model: as asked, or as many as have their vectors in the memory that a
    group of queries has (scan.query_group_bytes), up to 8."""
    asked = config.factors.iteration.queries
    vectors = VECTORS * 4 * sum(layer.size for layer in layers)
    room = config.query_group_bytes * config.cluster.ranks_per_worker
    return asked or max(1, min(_MOST_QUERIES, room // vectors))


def _log_cost(run: Run, per_product: int, queries: int, together: int) -> None:
    """What it will cost, before it is spent."""
    config = run.config.factors
    megabytes = 4 * sum(layer.size for layer in run.architecture.layers) / 2**20
    log.info(
        "solve       %s: %d queries, %d at a time, up to %d products each with G of %d sequences; %.3g MiB in storage "
        "per query",
        config.solver.value, queries, min(together, queries), config.iteration.steps, per_product, megabytes,
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
    """A batch of queries."""

    store: Store
    # The files of the queries' solutions.
    names: tuple[str, ...]
    queries: tuple[Query, ...]
    solver: Solver
    settings: IterationConfig
    # Start, preconditioner and damping.
    ekfac: Preconditioner
    corpus: CorpusAddress
    # The sequences of the corpus that G is of.
    curvature_ids: np.ndarray
    curvature: str
    # Of the queries' solutions.
    fingerprints: tuple[str, ...]
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
    """What every batch of a task's run shares on a rank. Vectors are of the rank's own layers."""

    ggn: GaussNewton
    lambda_p: Tensor
    precondition: Operator
    # Over the ranks of the group.
    total: Total


def sequences_per_product(solver: Solver, settings: IterationConfig, sequences: int) -> int:
    """How many of G's sequences one product is of: all (cg), or a batch (astra)."""
    return min(sequences, settings.batch or _ASTRA_BATCH) if solver is Solver.astra else sequences


def powers(solver: Solver, settings: IterationConfig) -> int:
    """Products of one vector with G of a batch, before the first step: what astra finds its step size by."""
    return _TRIED_BATCHES * _POWER_STEPS if solver is Solver.astra and settings.step_size is None else 0


def ekfac_factors(
    worker: ModelWorker, inverse: Preconditioner, layers: Sequence[Layer] | None = None
) -> dict[str, tuple[LayerFactors, float]]:
    """Some layers' factors and damping on the rank, by layer; all tracked ones. inverse: one that has factors."""
    chosen = worker.layers if layers is None else layers
    known = {layer.name: layer_factors(inverse, layer, worker.device, worker.wide) for layer in chosen}
    return {name: found for name, found in known.items() if found is not None}


def ekfac_inverse(layers: Sequence[Layer], factors: Mapping[str, tuple[LayerFactors, float]]) -> Operator:
    """x -> (G + lambda)^-1 x by EK-FAC, on vectors [K, P]. factors: with their damping, by layer."""

    def apply(x_kp: Tensor) -> Tensor:
        matrices = split(layers, x_kp)
        return join(
            layers,
            {name: from_core(inverse_core(matrices[name], *known), known[0]) for name, known in factors.items()},
            x_kp,
        )

    return apply


def solve_task(worker: ModelWorker, task: SolveTask) -> list[Solved]:
    """Iterate for a batch of queries and write their solutions, [O, I] by layer, in the statistics' dtype.

    What is in storage already stays as it is. All ranks of a group have the task's results.

    Raises:
        FactorsError: where the iteration diverges or meets a direction without positive curvature.
    """
    system = worker.cached("system", (task.curvature, task.ekfac), lambda: _system(worker, task))
    own = system.ggn.mine
    none_k0 = system.lambda_p.new_zeros(len(task.queries), 0)
    v_kp = join(own, gradients(worker, task.queries, own, task.ekfac), none_k0)
    x_kp, products_k = (_cg if task.solver is Solver.cg else _astra)(system, v_kp, task)
    both_np = torch.cat([x_kp, system.precondition(v_kp)])
    # By a product of its own: a recurrence's residual drifts, and astra's is of one batch.
    rest_np = v_kp.repeat(2, 1) - damped(system.ggn.product, system.lambda_p)(both_np)
    squares_n, norms_k = system.total(row_dots(rest_np, rest_np)), system.total(row_dots(v_kp, v_kp))
    residuals = (squares_n / norms_k.repeat(2)).sqrt().view(2, -1).T.tolist()
    solved = [
        Solved(query.id, residual, ekfac_residual, products, len(task.curvature_ids))
        for query, (residual, ekfac_residual), products in zip(task.queries, residuals, products_k, strict=True)
    ]
    tensors = system.ggn.gather(x_kp)
    for number, (name, key, one) in enumerate(zip(task.names, task.fingerprints, solved, strict=True)):
        if worker.leads and not task.store.exists(name):
            facts = {"fingerprint": key, "solved": json.dumps(asdict(one))}
            write_tensors(task.store, name, {layer: x_koi[number] for layer, x_koi in tensors.items()}, facts)
    return solved


def solved_before(facts: Mapping[str, str]) -> Solved:
    """The facts that a solution's file contains."""
    return Solved(**parse_json(facts["solved"]))


def _system(worker: ModelWorker, task: SolveTask) -> _System:
    sequences = worker.read(task.corpus, task.curvature_ids)
    ggn = GaussNewton(worker, sequences, task.settings.tokens_per_batch)
    factors = ekfac_factors(worker, task.ekfac, ggn.mine)
    like = torch.zeros(0, dtype=worker.wide, device=worker.device)
    lambda_p = damping_vector(ggn.mine, {name: lam for name, (_, lam) in factors.items()}, like)
    return _System(ggn, lambda_p, ekfac_inverse(ggn.mine, factors), worker.total)


def _cg(system: _System, v_kp: Tensor, task: SolveTask) -> tuple[Tensor, list[int]]:
    """From zero: preconditioned CG's first iterate is EK-FAC's solution, at the best length."""
    solution = conjugate_gradients(
        damped(system.ggn.product, system.lambda_p),
        v_kp,
        tolerance=task.settings.tolerance,
        max_iterations=task.settings.steps,
        preconditioner=system.precondition,
        total=system.total,
    )
    return solution.x_kp, solution.iterations_k.tolist()


def _astra(system: _System, v_kp: Tensor, task: SolveTask) -> tuple[Tensor, list[int]]:
    settings, sequences = task.settings, len(task.curvature_ids)
    batch = sequences_per_product(task.solver, settings, sequences)
    largest = settings.step_size or _stable_step(system, batch, task.seed)
    estimate = astra(
        system.ggn.product,
        v_kp,
        system.lambda_p,
        system.precondition,
        sequences=sequences,
        batch=batch,
        step_sizes=falling(largest, settings.steps),
        momentum=settings.momentum,
        seed=task.seed,
        total=system.total,
    )
    return estimate.x_kp, [settings.steps] * len(v_kp)


def falling(largest: float, steps: int) -> Sequence[float]:
    """Step sizes that fall linearly, from `largest`; what the batches' noise left behind is averaged out at the end."""
    return [largest * (1 - step / steps) for step in range(steps)]


def _stable_step(system: _System, batch: int, seed: int) -> float:
    """Half of 1 / the largest eigenvalue of M (G_j + lambda) on a few batches: steps below twice that converge."""

    def preconditioned(x_1p: Tensor, rows: np.ndarray) -> Tensor:
        return system.precondition(system.ggn.product(x_1p, rows) + system.lambda_p * x_1p)

    own, layers = set(system.ggn.mine), system.ggn.layers
    value = largest_eigenvalue(
        preconditioned,
        drawn([layer.size for layer in layers], [layer in own for layer in layers], system.lambda_p),
        sequences=len(system.ggn.sequences),
        batch=batch,
        batches=_TRIED_BATCHES,
        steps=_POWER_STEPS,
        seed=seed,
        total=system.total,
    )
    return _STABLE_SHARE / value
