"""Preconditioned conjugate gradients for (G + lambda) x = v, to a tolerance: the truth of the damped inverse.

Hestenes and Stiefel 1952; docs/method.md#iterated-inverse, #ground-truths. Several right-hand sides share each product
with G, and each stops by itself, so that its solution does not depend on the others beyond rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infscan.errors import FactorsError

# [K, P] -> [K, P], K of any size
Operator = Callable[[Tensor], Tensor]
# The sum over the ranks that hold the vectors' parts.
Total = Callable[[Tensor], Tensor]


def whole(part: Tensor) -> Tensor:
    """The sum over one rank, which has all of it."""
    return part


@dataclass(frozen=True)
class Solution:
    """x_kp: the solutions. iterations_k: products each one took. converged_k: whether its tolerance was met.

    residuals: after 0, 1, ... iterations, |v - (G + lambda) x| / |v| of each right-hand side, as the recurrence has it.
    seconds: since the start, at the same moments.
    """

    x_kp: Tensor
    iterations_k: Tensor
    converged_k: Tensor
    residuals: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def damped(product: Operator, lambda_p: Tensor) -> Operator:
    """x -> G x + lambda x, with lambda_p [P] each entry's damping."""
    return lambda x_kp: product(x_kp) + lambda_p * x_kp


def conjugate_gradients(
    operator: Operator,
    v_kp: Tensor,
    *,
    tolerance: float,
    max_iterations: int,
    preconditioner: Operator | None = None,
    total: Total = whole,
    on_iteration: Callable[[int, float, Tensor, Tensor], None] | None = None,
) -> Solution:
    """Solve operator(x) = v for every row of v_kp [K, P], in its dtype; inner products are summed in float64.

    operator: symmetric positive definite. preconditioner: an approximate inverse, symmetric positive definite too.
    The start is x = 0, so the first iterate with a preconditioner M is along M v. tolerance: of the relative residual.
    total: where several ranks have a part of every vector each (P is the part's), it sums over them, alike on all.
    on_iteration(iteration, seconds, residual_k, x_kp) sees every iterate; it must copy what it keeps.
    In exact arithmetic the error falls with every iteration (in the norm of G + lambda), the residual need not.

    Raises:
        FactorsError: where a direction has no positive curvature or a number is not finite.
    """
    precondition = preconditioner or (lambda r_kp: r_kp)

    def dots(x_kp: Tensor, y_kp: Tensor) -> Tensor:
        return total(row_dots(x_kp, y_kp))

    started = time.perf_counter()
    x_kp, r_kp = torch.zeros_like(v_kp), v_kp.clone()
    norms_k = dots(v_kp, v_kp).sqrt()
    z_kp = precondition(r_kp)
    p_kp, rz_k = z_kp.clone(), dots(r_kp, z_kp)
    iterations_k = torch.zeros(len(v_kp), dtype=torch.int64)
    # A right-hand side of zero has the solution zero.
    residual_k = (norms_k > 0).to(torch.float64)
    solution = Solution(x_kp, iterations_k, residual_k <= tolerance, [residual_k.clone()], [0.0])
    for iteration in range(1, max_iterations + 1):
        active = (residual_k > tolerance).nonzero().flatten()
        if not len(active):
            break
        directions = p_kp[active]
        Ap = operator(directions)
        curvature = dots(directions, Ap)
        if not bool((torch.isfinite(curvature) & (curvature > 0)).all()):
            raise FactorsError(
                f"conjugate gradients met a curvature of {float(curvature.min()):.3g} in iteration {iteration}: "
                "rounding outweighs the damping; use model.dtype=float64, or raise factors.damping."
            )
        alpha = (rz_k[active] / curvature).to(v_kp.dtype)[:, None]
        x_kp[active] += alpha * directions
        r_kp[active] -= alpha * Ap
        residual_k[active] = dots(r_kp[active], r_kp[active]).sqrt() / norms_k[active]
        z = precondition(r_kp[active])
        rz = dots(r_kp[active], z)
        p_kp[active] = z + (rz / rz_k[active]).to(v_kp.dtype)[:, None] * directions
        rz_k[active] = rz
        iterations_k[active.to(iterations_k.device)] = iteration
        solution.residuals.append(residual_k.clone())
        solution.seconds.append(time.perf_counter() - started)
        if on_iteration is not None:
            on_iteration(iteration, solution.seconds[-1], residual_k, x_kp)
    solution.converged_k.copy_(residual_k <= tolerance)
    return solution


def row_dots(x_kp: Tensor, y_kp: Tensor) -> Tensor:
    """Row by row, [K] float64."""
    return (x_kp.to(torch.float64) * y_kp.to(torch.float64)).sum(dim=1)
