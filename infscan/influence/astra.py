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
from infscan.influence.cg import Operator

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
) -> Estimate:
    """Estimate (G + lambda)^-1 v for every row of v_kp [K, P]; all rows see the same batches.

    lambda_p: [P]. sequences: N; each step draws `batch` of them without replacement, from `seed` alone.
    step_sizes: eta_1, eta_2, ...; momentum: beta.

    Raises:
        FactorsError: where it diverges.
    """
    rng = np.random.default_rng(seed)
    started = time.perf_counter()
    norms_k = v_kp.norm(dim=1).clamp_min(torch.finfo(v_kp.dtype).tiny)
    x_kp = precondition(v_kp)
    m_kp = torch.zeros_like(x_kp)
    kept: dict[int, Tensor] = {}
    history: list[Step] = []
    for step, step_size in enumerate(step_sizes, start=1):
        rows = rng.choice(sequences, min(batch, sequences), replace=False)
        rest_kp = v_kp - product(x_kp, rows) - lambda_p * x_kp
        m_kp = momentum * m_kp + precondition(rest_kp)
        x_kp = x_kp + step_size * m_kp
        change_k = rest_kp.norm(dim=1) / norms_k
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
    product: BatchOperator, like_p: Tensor, *, sequences: int, batch: int, batches: int, steps: int, seed: int
) -> float:
    """The largest eigenvalue of `product` over some random batches, by `steps` steps of the power method on each.

    It comes from below, so a step size needs a margin above it. like_p: [P], for dtype and device.
    """
    rng = np.random.default_rng(seed)
    largest = 0.0
    for _ in range(batches):
        rows = rng.choice(sequences, min(batch, sequences), replace=False)
        x_1p = torch.from_numpy(rng.standard_normal((1, like_p.numel()))).to(like_p)
        value = 0.0
        for _ in range(steps):
            x_1p = product(x_1p / x_1p.norm(), rows)
            value = float(x_1p.norm())
            if value == 0:
                break
        largest = max(largest, value)
    return largest
