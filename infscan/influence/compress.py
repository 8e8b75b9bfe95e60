"""Low-rank query gradients: P ~= U V^T, plain or weighted by the factors (docs/method.md#query-batching)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from infscan.influence.layers import LayerFactors
from infscan.influence.truncation import singular

# Eigenvalues of A and S are clamped from below at this share of their mean before they weigh a truncation.
EIGENVALUE_FLOOR = 1e-6


@dataclass(frozen=True)
class Compressed:
    """P ~= U V^T of one query and layer, the columns in falling order of what they contribute.

    U_or: [O, r]. V_ir: [I, r]. values_r: [r], singular values of the matrix that was truncated; weighted, the square of
    one is its column's share of E[(s^T P a)^2] over tokens with second moments S and A, independent of each other.
    total: the sum of all of that matrix's squared singular values, those left out included.
    """

    U_or: Tensor
    V_ir: Tensor
    values_r: Tensor
    total: float


def compress(P_oi: Tensor, rank: int) -> Compressed:
    """The best rank-r approximation in the Frobenius norm; each side has the roots of the singular values."""
    values, X_or, Y_ir = singular(P_oi, rank)
    roots = values.sqrt()
    return Compressed(X_or * roots, Y_ir * roots, values, _total(P_oi))


def clamped_roots(eigenvalues: Tensor) -> Tensor:
    """Square roots of eigenvalues clamped from below at `EIGENVALUE_FLOOR` of their mean."""
    return eigenvalues.clamp_min(float(eigenvalues.mean()) * EIGENVALUE_FLOOR).clamp_min(1e-30).sqrt()


def compress_weighted(C_oi: Tensor, factors: LayerFactors, rank: int) -> Compressed:
    """Truncate S^(1/2) P A^(1/2) and map back, from the core C = Q_S^T P Q_A.

    It minimises the expected squared error of s^T P a over tokens with second moments S and A. In the eigenbases the
    weights are diagonal: truncate D_S^(1/2) C D_A^(1/2), so no matrix root is ever formed.
    """
    S_roots, A_roots = clamped_roots(factors.S_eigenvalues), clamped_roots(factors.A_eigenvalues)
    M_oi = S_roots[:, None] * C_oi * A_roots
    values, X_or, Y_ir = singular(M_oi, rank)
    roots = values.sqrt()
    U_or = factors.Q_S @ (X_or * roots / S_roots[:, None])
    V_ir = factors.Q_A @ (Y_ir * roots / A_roots[:, None])
    return Compressed(U_or, V_ir, values, _total(M_oi))


def _total(M_oi: Tensor) -> float:
    return float(M_oi.square().sum(dtype=torch.float64))
