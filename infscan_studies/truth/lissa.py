"""LiSSA: the damped inverse by a stochastic Neumann series (Agarwal et al. 2017; Koh & Liang 2017).

x_0 = v / scale,   x_j = x_(j-1) + (v - (G_j + lambda) x_(j-1)) / scale     (depth steps, G_j on a random batch)

It converges to (G + lambda)^-1 v where `scale` is above the largest eigenvalue of every batch's G_j + lambda, along
directions of eigenvalue mu as (1 - mu / scale)^j: the small ones take about scale / lambda steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from infscan.errors import FactorsError
from infscan.influence.astra import BatchOperator, Estimate, astra


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
        FactorsError: where it diverges: a batch's curvature is above `scale`.
    """
    try:
        return astra(
            product,
            v_kp,
            lambda_p,
            lambda r_kp: r_kp / scale,
            sequences=sequences,
            batch=batch,
            step_sizes=[1.0] * depth,
            momentum=0.0,
            seed=seed,
            snapshots=snapshots,
        )
    except FactorsError as error:
        raise FactorsError(f"LiSSA with scale {scale:.3g}: {error} Raise validate.lissa.scale.") from None
