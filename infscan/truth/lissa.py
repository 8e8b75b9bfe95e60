"""LiSSA: the damped inverse by a stochastic Neumann series (Agarwal et al. 2017; Koh & Liang 2017).

x_0 = v / scale,   x_j = x_(j-1) + (v - (G_j + lambda) x_(j-1)) / scale     (depth steps, G_j on a random batch)

It converges to (G + lambda)^-1 v where `scale` is above the largest eigenvalue of every batch's G_j + lambda, along
directions of eigenvalue mu as (1 - mu / scale)^j: the small ones take about scale / lambda steps.
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

# (x [K, P], rows of the batch) -> [K, P]: the mean of the rows' Gauss-Newton products
BatchOperator = Callable[[Tensor, NDArray[np.int64]], Tensor]


@dataclass(frozen=True)
class Step:
    """Where LiSSA stood after `step` steps and `seconds`. change_k: |v - (G_j + lambda) x| / |v| on its batch."""

    step: int
    seconds: float
    change_k: Tensor


@dataclass(frozen=True)
class Estimate:
    """x_kp after the last step; snapshots: the steps asked for, by number; history: every step."""

    x_kp: Tensor
    snapshots: dict[int, Tensor]
    history: list[Step]


def lissa(
    product: BatchOperator,
    v_kp: Tensor,
    lambda_p: Tensor,
    *,
    sequences: int,
    batch: int,
    depth: int,
    scale: float,
    seed: int,
    snapshots: Sequence[int] = (),
) -> Estimate:
    """Estimate (G + lambda)^-1 v for every row of v_kp [K, P]; all rows see the same batches.

    lambda_p: [P]. sequences: N; each step draws `batch` of them without replacement, from `seed` alone.

    Raises:
        FactorsError: where it diverges.
    """
    rng = np.random.default_rng(seed)
    started = time.perf_counter()
    norms_k = v_kp.norm(dim=1).clamp_min(torch.finfo(v_kp.dtype).tiny)
    x_kp = v_kp / scale
    kept: dict[int, Tensor] = {}
    history: list[Step] = []
    for step in range(1, depth + 1):
        rows = rng.choice(sequences, min(batch, sequences), replace=False)
        rest_kp = v_kp - product(x_kp, rows) - lambda_p * x_kp
        x_kp = x_kp + rest_kp / scale
        change_k = rest_kp.norm(dim=1) / norms_k
        history.append(Step(step, time.perf_counter() - started, change_k))
        if not bool((change_k < 1e4).all()):
            raise FactorsError(
                f"LiSSA diverged at step {step} with scale {scale:.3g}: a batch's curvature is larger; "
                "raise validate.lissa.scale."
            )
        if step in snapshots:
            kept[step] = x_kp
    return Estimate(x_kp, kept, history)


def largest_eigenvalue(
    product: BatchOperator, like_p: Tensor, *, sequences: int, batch: int, batches: int, steps: int, seed: int
) -> float:
    """The largest eigenvalue of G_j over some random batches, by `steps` steps of the power method on each.

    It comes from below, so a scale needs a margin above it. like_p: [P], for dtype and device.
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
