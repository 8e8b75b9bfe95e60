"""Low-rank query gradients: P ~= U V^T, plain or weighted by the factors (METHOD: query batching)."""

from __future__ import annotations

import torch
from torch import Tensor

from infscan.influence.layers import LayerFactors

# Eigenvalues of A and S are clamped from below at this share of their mean before they weigh a truncation.
EIGENVALUE_FLOOR = 1e-6


def truncate(M_qoi: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation in the Frobenius norm: M ~= U V^T.

    M_qoi: [Q, O, I]. Returns U [Q, O, r] and V [Q, I, r], each with the square roots of the singular values, in M's
    dtype. Exact: from the eigendecomposition of the smaller Gram matrix in float64, whose error on the leading
    singular vectors is far below float32's; deterministic. Query by query, so that only one is held in float64.
    """
    pairs = [_truncate_one(M_oi.to(torch.float64), rank) for M_oi in M_qoi]
    U_qor, V_qir = (torch.stack(side).to(M_qoi.dtype) for side in zip(*pairs, strict=True))
    return U_qor, V_qir


def _truncate_one(M_oi: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if M_oi.shape[0] > M_oi.shape[1]:
        V_ir, U_or = _truncate_one(M_oi.T, rank)
        return U_or, V_ir
    squares, X_or = torch.linalg.eigh(M_oi @ M_oi.T)
    X_or = X_or[:, -rank:]
    # sqrt of the singular values; a zero one leaves a zero column instead of a division by zero.
    roots = squares[-rank:].clamp_min(0).pow(0.25)
    Y_ir = M_oi.T @ X_or
    return X_or * roots, torch.where(roots > 0, Y_ir / roots, torch.zeros_like(Y_ir))


def clamped_roots(eigenvalues: Tensor) -> Tensor:
    """Square roots of eigenvalues clamped from below at `EIGENVALUE_FLOOR` of their mean."""
    return eigenvalues.clamp_min(float(eigenvalues.mean()) * EIGENVALUE_FLOOR).clamp_min(1e-30).sqrt()


def compress_weighted(C_qoi: Tensor, factors: LayerFactors, rank: int) -> tuple[Tensor, Tensor]:
    """Truncate S^(1/2) P A^(1/2) and map back, from the core C = Q_S^T P Q_A.

    It minimises the expected squared error of s^T P a over tokens with second moments S and A. In the eigenbases the
    weights are diagonal: truncate D_S^(1/2) C D_A^(1/2), so no matrix root is ever formed.
    Returns U [Q, O, r] and V [Q, I, r] with U V^T ~= P.
    """
    S_roots, A_roots = clamped_roots(factors.S_eigenvalues), clamped_roots(factors.A_eigenvalues)
    U_qor, V_qir = truncate(S_roots[:, None] * C_qoi * A_roots, rank)
    return factors.Q_S @ (U_qor / S_roots[:, None]), factors.Q_A @ (V_qir / A_roots[:, None])
