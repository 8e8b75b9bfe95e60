"""ASTRA: the damped inverse by preconditioned stochastic iteration (docs/method.md#iterated-inverse).

x_0 = M v,   m_j = beta m_(j-1) + M (v - (G_j + lambda) x_(j-1)),   x_j = x_(j-1) + eta_j m_j

G_j: the Gauss-Newton matrix of a random batch. M: an approximate inverse, EK-FAC's in a run. LiSSA is the case of
M = 1 / scale without momentum (`infscan_studies.truth.lissa`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.errors import FactorsError
from infscan.influence.cg import Operator, Total, row_dots, whole

# (x [K, P], rows of the batch) -> [K, P]: the mean of the rows' Gauss-Newton products
BatchOperator = Callable[[Tensor, NDArray[np.int64]], Tensor]
# A change this many times the right-hand side is no fluctuation.
_DIVERGED = 1e4


@dataclass(frozen=True)
class Step:
    """Where the iteration stood after `step` steps and `seconds`.

    change_k: |v - (G_j + lambda) x| / |v| on the step's batch.
    """

    step: int
    seconds: float
    change_k: Tensor


@dataclass(frozen=True)
class Estimate:
    """x_kp after the last step; snapshots: the steps asked for, by number; history: every step."""

    x_kp: Tensor
    snapshots: dict[int, Tensor]
    history: list[Step]


def astra(
    product: BatchOperator,
    v_kp: Tensor,
    lambda_p: Tensor,
    precondition: Operator,
    *,
    sequences: int,
    batch: int,
    step_sizes: Sequence[float],
    momentum: float,
    seed: int,
    snapshots: Sequence[int] = (),
    total: Total = whole,
) -> Estimate:
    """Estimate (G + lambda)^-1 v for every row of v_kp [K, P]; all rows see the same batches.

    lambda_p: [P]. sequences: N; each step draws `batch` of them without replacement, from `seed` alone.
    step_sizes: eta_1, eta_2, ...; momentum: beta. total: as of `conjugate_gradients`.

    Raises:
        FactorsError: where it diverges.
    """
    rng = np.random.default_rng(seed)
    started = time.perf_counter()

    def norms(x_kp: Tensor) -> Tensor:
        return total(row_dots(x_kp, x_kp)).sqrt()

    norms_k = norms(v_kp).clamp_min(torch.finfo(v_kp.dtype).tiny)
    x_kp = precondition(v_kp)
    m_kp = torch.zeros_like(x_kp)
    kept: dict[int, Tensor] = {}
    history: list[Step] = []
    for step, step_size in enumerate(step_sizes, start=1):
        rows = rng.choice(sequences, min(batch, sequences), replace=False)
        rest_kp = v_kp - product(x_kp, rows) - lambda_p * x_kp
        m_kp = momentum * m_kp + precondition(rest_kp)
        x_kp = x_kp + step_size * m_kp
        change_k = norms(rest_kp) / norms_k
        history.append(Step(step, time.perf_counter() - started, change_k))
        if not bool((change_k < _DIVERGED).all()):
            raise FactorsError(
                f"the iteration for (G + lambda)^-1 diverged at step {step} with a step size of {step_size:.3g}: a "
                "batch's curvature is larger than the steps allow; take smaller steps or larger batches."
            )
        if step in snapshots:
            kept[step] = x_kp
    return Estimate(x_kp, kept, history)


def largest_eigenvalue(
    product: BatchOperator,
    draw: Callable[[np.random.Generator], Tensor],
    *,
    sequences: int,
    batch: int,
    batches: int,
    steps: int,
    seed: int,
    total: Total = whole,
) -> float:
    """The largest eigenvalue of `product` over some random batches, by `steps` steps of the power method on each.

    It comes from below, so a step size needs a margin above it. draw: a vector [1, P] of standard normals; where ranks
    have parts of it, the generator is moved on as far on every one. total: as of `conjugate_gradients`.
    """
    rng = np.random.default_rng(seed)
    largest = 0.0

    def norm(x_1p: Tensor) -> Tensor:
        return total(row_dots(x_1p, x_1p)).sqrt()

    for _ in range(batches):
        rows = rng.choice(sequences, min(batch, sequences), replace=False)
        x_1p = draw(rng)
        value = 0.0
        for _ in range(steps):
            x_1p = product(x_1p / norm(x_1p).to(x_1p.dtype), rows)
            value = float(norm(x_1p))
            if value == 0:
                break
        largest = max(largest, value)
    return largest


def drawn(sizes: Sequence[int], mine: Sequence[bool], like: Tensor) -> Callable[[np.random.Generator], Tensor]:
    """What `largest_eigenvalue` draws with, of a vector whose parts have these sizes: the parts that are `mine`."""

    def draw(rng: np.random.Generator) -> Tensor:
        parts = [(rng.standard_normal(size), kept) for size, kept in zip(sizes, mine, strict=True)]
        return torch.from_numpy(np.concatenate([part for part, kept in parts if kept] or [np.empty(0)]))[None].to(like)

    return draw
