"""The damped EK-FAC inverse, applied on the query side (docs/method.md#ek-fac, steps 5 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from infscan.errors import FactorsError
from infscan.influence.layers import LayerFactors


def damping(Lambda_oi: Tensor, relative: float, absolute: float | None, name: str, mean: float | None = None) -> float:
    """lambda_l: `absolute` where given, else `relative` times the mean of Lambda_l (0.1 in Grosse et al. 2023).

    mean: of an expert, that of all experts of its layer (docs/method.md#ek-fac), in place of its own.

    Raises:
        FactorsError: where the result is not a positive finite number (a layer whose gradients all vanish).
    """
    own = float(Lambda_oi.mean(dtype=torch.float64)) if mean is None else mean
    value = relative * own if absolute is None else absolute
    if not (value > 0 and value != float("inf")):
        raise FactorsError(
            f"{name}: the damping comes to {value}, because the layer's mean corrected eigenvalue is zero or not "
            "finite; leave the layer out with model.tracked=<regex>, or give factors.damping.absolute."
        )
    return value


def to_core(P_qoi: Tensor, factors: LayerFactors) -> Tensor:
    """C = Q_S^T P Q_A, [Q, O, I]: the matrices in the eigenbases."""
    return factors.Q_S.T @ P_qoi @ factors.Q_A


def tokens_to_core(s_to: Tensor, a_ti: Tensor, factors: LayerFactors) -> Tensor:
    """Q_S^T V Q_A of V = sum_t s_t a_t^T, [O, I], the tokens rotated before they are multiplied.

    s_to: [T, O], a_ti: [T, I]. Costs T (O^2 + I^2) products instead of O I (O + I): a query has few tokens.
    """
    return (s_to @ factors.Q_S).T @ (a_ti @ factors.Q_A)


def inverse_core(V_qoi: Tensor, factors: LayerFactors, lam: float) -> Tensor:
    """C = (Q_S^T V Q_A) / (Lambda + lambda): the preconditioned gradients, still in the eigenbases.

    V_qoi: [Q, O, I]. Returns [Q, O, I]. P = Q_S C Q_A^T (Grosse et al. 2023, equation 21). Q_S and Q_A rotate block by
    block; every entry of V is kept, whichever pair of blocks it is in.
    """
    return damped_core(to_core(V_qoi, factors), factors, lam)


def damped_core(C_qoi: Tensor, factors: LayerFactors, lam: float) -> Tensor:
    """C / (Lambda + lambda), for C in the eigenbases already."""
    return C_qoi / (factors.Lambda + lam)


def from_core(C_qoi: Tensor, factors: LayerFactors) -> Tensor:
    """P = Q_S C Q_A^T, [Q, O, I]."""
    return factors.Q_S @ C_qoi @ factors.Q_A.T
