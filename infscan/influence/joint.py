"""One basis pair per layer for all queries: P_q ~= B_O K_q B_I^T, for many queries (METHOD: query batching)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infscan.influence.compress import clamped_roots
from infscan.influence.layers import LayerFactors


@dataclass(frozen=True)
class Joint:
    """P_q ~= B_O K_q B_I^T. B_mo: B_O's columns in rows, [m, O]. B_ni: [n, I]. K_qmn: the queries' cores, [Q, m, n]."""

    B_mo: Tensor
    B_ni: Tensor
    K_qmn: Tensor


def joint(
    U_xo: Tensor, V_xi: Tensor, ranks: Sequence[int], factors: LayerFactors | None, weights_q: Tensor, kept: float
) -> Joint:
    """The smallest basis pair that leaves out at most 1 - kept of the queries' weighted squares.

    U_xo: [sum of ranks, O], V_xi: [sum of ranks, I]: P_q = U_q^T V_q, query after query. In the factors' eigenbases,
    with eigenvalues for weights (as `compress_weighted`; without factors P_q as it is), M_q = S^(1/2) P_q A^(1/2). The
    bases span the leading eigenvectors of sum_q w_q M_q M_q^T and sum_q w_q M_q^T M_q (a higher-order SVD; De Lathauwer
    et al. 2000): what is left out is at most the sum of the eigenvalues left out on both sides, and each side has half
    of 1 - kept. weights_q: [Q], w; 1 over a query's own total makes every query count alike.
    """
    dtype = U_xo.dtype
    if factors is None:
        rows_xo, rows_xi = U_xo, V_xi
    else:
        S_roots, A_roots = clamped_roots(factors.S_eigenvalues), clamped_roots(factors.A_eigenvalues)
        rows_xo, rows_xi = (U_xo @ factors.Q_S) * S_roots, (V_xi @ factors.Q_A) * A_roots
    X_om = _leading(rows_xo, rows_xi, ranks, weights_q, kept)
    Y_in = _leading(rows_xi, rows_xo, ranks, weights_q, kept)
    left, right = (rows_xo @ X_om).split(list(ranks)), (rows_xi @ Y_in).split(list(ranks))
    K_qmn = torch.stack([mine.T @ its for mine, its in zip(left, right, strict=True)])
    if factors is not None:
        X_om, Y_in = factors.Q_S @ (X_om / S_roots[:, None]), factors.Q_A @ (Y_in / A_roots[:, None])
    return Joint(X_om.T.contiguous().to(dtype), Y_in.T.contiguous().to(dtype), K_qmn.to(dtype))


def smallest(ranks: Sequence[int]) -> tuple[int, int]:
    """(m, n) below which no basis pair keeps every query's columns: that of the query with the most."""
    return max(ranks), max(ranks)


def _leading(rows_xk: Tensor, others_xj: Tensor, ranks: Sequence[int], weights_q: Tensor, kept: float) -> Tensor:
    """Orthonormal [k, m]: the eigenvectors of sum_q w_q M_q M_q^T that hold all but (1 - kept) / 2 of its trace.

    M_q = rows_q^T others_q. One matrix product serves all queries: M_q M_q^T = rows_q^T (others_q others_q^T) rows_q.
    """
    scaled = [
        weight * (theirs @ theirs.T) @ mine
        for mine, theirs, weight in zip(
            rows_xk.split(list(ranks)), others_xj.split(list(ranks)), weights_q.to(rows_xk), strict=True
        )
    ]
    gram_kk = (rows_xk.T @ torch.cat(scaled)).to(torch.float64)
    values, vectors = torch.linalg.eigh((gram_kk + gram_kk.T) / 2)
    held = values.clamp_min(0).flip(0).cumsum(0)
    count = int(torch.searchsorted(held, held[-1] * (1 - (1 - kept) / 2))) + 1
    return vectors[:, -min(count, len(values)) :].flip(1).to(rows_xk.dtype)
