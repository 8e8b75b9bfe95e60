"""Scores of training sequences against the query batch, never materialising a gradient where it can be avoided.

score(q, z) = sum over layers of <P_q, g_z> = sum over layers and tokens of s_t^T P_q a_t   (METHOD: query batching)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerQueries:
    """All queries' preconditioned gradients of one layer: low rank (U, V) or full (P).

    U_oqr: [O, Q * r]; V_iqr: [I, Q * r]; P_qoi: [Q, O, I].
    """

    queries: int
    U_oqr: Tensor | None = None
    V_iqr: Tensor | None = None
    P_qoi: Tensor | None = None

    @staticmethod
    def low_rank(U_qor: Tensor, V_qir: Tensor) -> LayerQueries:
        """From U [Q, O, r] and V [Q, I, r], laid out so that one GEMM serves every query."""
        Q = U_qor.shape[0]
        return LayerQueries(
            Q,
            U_oqr=U_qor.permute(1, 0, 2).flatten(1).contiguous(),
            V_iqr=V_qir.permute(1, 0, 2).flatten(1).contiguous(),
        )

    @staticmethod
    def full(P_qoi: Tensor) -> LayerQueries:
        return LayerQueries(P_qoi.shape[0], P_qoi=P_qoi.contiguous())


def score_layer(s_bto: Tensor, a_bti: Tensor, queries: LayerQueries) -> Tensor:
    """One layer's share of every sequence's score against every query: [B, Q], float32 or wider.

    s_bto: [B, T, O], a_bti: [B, T, I], zero on padding.
    Low rank: sum_t (U_q^T s_t) . (V_q^T a_t), two GEMMs, 2 r Q (O + I) per token. Full: g = sum_t s_t a_t^T once,
    2 O I per token, then one GEMM against every P_q.
    """
    B, T, O = s_bto.shape
    if queries.P_qoi is not None:
        g_boi = s_bto.transpose(1, 2) @ a_bti
        return (g_boi.flatten(1) @ queries.P_qoi.flatten(1).T.to(g_boi.dtype)).to(_wide(s_bto))
    assert queries.U_oqr is not None
    assert queries.V_iqr is not None
    X_bx = s_bto.reshape(B * T, O) @ queries.U_oqr.to(s_bto.dtype)
    Y_bx = a_bti.reshape(B * T, -1) @ queries.V_iqr.to(a_bti.dtype)
    products = X_bx.mul_(Y_bx).view(B, T, -1).sum(dim=1, dtype=_wide(s_bto))
    return products.view(B, queries.queries, -1).sum(dim=-1)


def score_tokens(s_bto: Tensor, a_bti: Tensor, P_oi: Tensor) -> Tensor:
    """One layer's and one query's score by input position: s_t^T P a_t, [B, T], float32 or wider.

    P_oi: [O, I], full rank. Sums over t to the sequence's <P, g>.
    """
    wide = _wide(s_bto)
    return ((s_bto.to(wide) @ P_oi.to(wide)) * a_bti.to(wide)).sum(dim=-1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
