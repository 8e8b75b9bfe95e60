"""The iterated inverse of one query: (G + lambda) x = grad(-f) with exact products, from EK-FAC's solution on.

With stages, grad(-f) is what a later stage left of it, and lambda includes the stage's own alpha.
Solutions are stored at full rank, one file per query: compressing, checking and refining read them where they would
otherwise apply EK-FAC, so that the scan knows nothing of it (METHOD: iterated inverse).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from infscan.config import Attention, IterationConfig, Solver
from infscan.influence.astra import astra, largest_eigenvalue
from infscan.influence.cg import Operator, conjugate_gradients, damped
from infscan.influence.inverse import from_core, inverse_core
from infscan.influence.layers import Layer, LayerFactors
from infscan.passes.factor_store import write_tensors
from infscan.passes.ggn import GaussNewton, damping_vector, join, split
from infscan.passes.queries import Inverse, gradients, layer_factors
from infscan.passes.rank import Rank
from infscan.queries import Query
from infscan.storage import Store

# Batches and steps of the power method before astra, and the share of the largest stable step that it takes.
_TRIED_BATCHES, _POWER_STEPS, _STABLE_SHARE = 4, 8, 0.5
_ASTRA_BATCH = 32


@dataclass(frozen=True)
class SolveTask:
    """One query. curvature_ids: the sequences of `corpus` that G is of. ekfac: start, preconditioner and damping."""

    store: Store
    name: str
    query: Query
    solver: Solver
    settings: IterationConfig
    ekfac: Inverse
    corpus: Store
    curvature_ids: np.ndarray
    curvature: str
    fingerprint: str
    seed: int
    attention: Attention = Attention.across


@dataclass(frozen=True)
class Solved:
    """residual, ekfac_residual: |v - (G + lambda) x| / |v| of the solution and of EK-FAC's, on the sequences of G.

    products: with G of all those sequences, or (astra) of a batch each.
    """

    query_id: str
    residual: float
    ekfac_residual: float
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


def ekfac_factors(rank: Rank, inverse: Inverse) -> dict[str, tuple[LayerFactors, float]]:
    """Every tracked layer's factors and damping on the rank, by layer. inverse: one that has factors."""
    known = {layer.name: layer_factors(inverse, layer, rank.device, rank.wide) for layer in rank.layers}
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


def solve_task(rank: Rank, task: SolveTask) -> Solved:
    """Iterate for one query and write its solution, [O, I] by layer, in the statistics' dtype.

    Raises:
        FactorsError: where the iteration diverges or meets a direction without positive curvature.
    """
    system = rank.cached("system", (task.curvature, task.ekfac), lambda: _system(rank, task))
    V = gradients(rank, (task.query,), rank.layers, task.ekfac)
    v_1p = join(rank.layers, V)
    x_1p, products = (_cg if task.solver is Solver.cg else _astra)(system, v_1p, task)
    both_2p = torch.cat([x_1p, system.precondition(v_1p)])
    # By a product of its own: a recurrence's residual drifts, and astra's is of one batch.
    rest_2p = v_1p - damped(system.ggn.product, system.lambda_p)(both_2p)
    residual, ekfac_residual = (rest_2p.norm(dim=1) / v_1p.norm()).tolist()
    solved = Solved(task.query.id, residual, ekfac_residual, products, len(task.curvature_ids))
    facts = {"fingerprint": task.fingerprint, "solved": json.dumps(asdict(solved))}
    tensors = {name: matrix[0] for name, matrix in split(rank.layers, x_1p).items()}
    write_tensors(task.store, task.name, tensors, facts)
    return solved


def solved_before(facts: Mapping[str, str]) -> Solved:
    """What a solution's file says of it."""
    return Solved(**json.loads(facts["solved"]))


def _system(rank: Rank, task: SolveTask) -> _System:
    sequences = rank.read(task.corpus, task.curvature_ids, task.attention)
    factors = ekfac_factors(rank, task.ekfac)
    like = torch.zeros(0, dtype=rank.wide, device=rank.device)
    lambda_p = damping_vector(rank.layers, {name: lam for name, (_, lam) in factors.items()}, like)
    return _System(
        GaussNewton(rank, sequences, task.settings.tokens_per_batch), lambda_p, ekfac_inverse(rank.layers, factors)
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
