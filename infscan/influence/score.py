"""Scores of training sequences against the query batch, never materialising a gradient where it can be avoided.

score(q, z) = sum over layers of <P_q, g_z> = sum over layers and tokens of s_t^T P_q a_t   (METHOD: query batching)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# A multiply-add of a matrix formed for every sequence takes as long as so many of one long product over all tokens
# (measured on CPU: d = 512, T = 256, where 10 queries of rank 32 cost 0.19 floors and forming g 0.46).
_FORMED = 1.7
# Columns of one matrix product: enough to keep it busy, few enough that a batch's [tokens, columns] stay small.
_COLUMNS = 1024
# Entries of the sequences' own matrices g that are formed at once (float32: 128 MiB), however many sequences there are.
_FORMED_ENTRIES = 1 << 25


class Scratch:
    """Memory for the matrices formed of one layer after another, which a CPU is to use again.

    The pages of a large tensor that is made anew take a third of the time that filling it by a product takes.
    """

    def __init__(self) -> None:
        self._held: Tensor | None = None

    @staticmethod
    def on(device: str) -> Scratch | None:
        """None on a GPU, whose allocator keeps what is freed."""
        return Scratch() if device == "cpu" else None

    @property
    def nbytes(self) -> int:
        return 0 if self._held is None else self._held.nbytes

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor of like's dtype and device. What was taken before is overwritten."""
        size = math.prod(shape)
        if self._held is None or len(self._held) < size or self._held.dtype != like.dtype:
            self._held = None
            self._held = like.new_empty(size)
        return self._held[:size].view(shape)


@dataclass(frozen=True)
class LayerQueries:
    """All queries' preconditioned gradients of one layer, laid out in one of three ways.

    U_parts, V_parts: [O, c] and [I, c], all queries' columns side by side, cut every `_COLUMNS`; query q owns the next
    ranks[q] of them. P_qoi: [Q, O, I], full; its last column, a bias's, may lie apart in P_qo: products of an even
    width are faster. B_om, B_in, K_qmn: one basis pair for all queries, P_q ~= B_O K_q B_I^T. scratch: where the
    sequences' matrices g are formed against P_qoi; all layers may have the same one.
    """

    ranks: tuple[int, ...]
    U_parts: tuple[Tensor, ...] = ()
    V_parts: tuple[Tensor, ...] = ()
    P_qoi: Tensor | None = None
    P_qo: Tensor | None = None
    B_om: Tensor | None = None
    B_in: Tensor | None = None
    K_qmn: Tensor | None = None
    scratch: Scratch | None = field(default=None, compare=False, repr=False)

    @property
    def queries(self) -> int:
        return len(self.ranks)

    @property
    def inputs(self) -> int:
        """I, with the bias's 1 where there is a bias."""
        if self.P_qoi is not None:
            return self.P_qoi.shape[-1] + (self.P_qo is not None)
        return len(self.V_parts[0] if self.B_in is None else self.B_in)

    @staticmethod
    def low_rank(U_xo: Tensor, V_xi: Tensor, ranks: Sequence[int]) -> LayerQueries:
        """From columns in rows, U [sum of ranks, O] and V [sum of ranks, I]: one GEMM a side serves every query."""
        cut = (
            [part.T.contiguous() for part in U_xo.split(_COLUMNS)],
            [part.T.contiguous() for part in V_xi.split(_COLUMNS)],
        )
        return LayerQueries(tuple(ranks), U_parts=tuple(cut[0]), V_parts=tuple(cut[1]))

    def multiplied_out(self) -> Tensor:
        """P of every query, whatever the way they are laid out: [Q, O, I]."""
        if self.P_qoi is not None:
            return self.P_qoi if self.P_qo is None else torch.cat([self.P_qoi, self.P_qo.unsqueeze(-1)], dim=-1)
        if self.K_qmn is not None:
            assert self.B_om is not None
            assert self.B_in is not None
            return self.B_om @ self.K_qmn @ self.B_in.T
        U_ox, V_ix = torch.cat(self.U_parts, dim=1), torch.cat(self.V_parts, dim=1)
        pairs = zip(U_ox.split(self.ranks, dim=1), V_ix.split(self.ranks, dim=1), strict=True)
        return torch.stack([U_or @ V_ir.T for U_or, V_ir in pairs])

    @staticmethod
    def full(P_qoi: Tensor, scratch: Scratch | None = None, *, bias: bool = False) -> LayerQueries:
        """bias: the last column is a bias's, and is laid apart."""
        ranks = (0,) * len(P_qoi)
        if not bias:
            return LayerQueries(ranks, P_qoi=P_qoi.contiguous(), scratch=scratch)
        weights_qoi, bias_qo = P_qoi[..., :-1].contiguous(), P_qoi[..., -1].contiguous()
        return LayerQueries(ranks, P_qoi=weights_qoi, P_qo=bias_qo, scratch=scratch)

    @staticmethod
    def joint(B_mo: Tensor, B_ni: Tensor, K_qmn: Tensor) -> LayerQueries:
        return LayerQueries((0,) * len(K_qmn), B_om=B_mo.T.contiguous(), B_in=B_ni.T.contiguous(), K_qmn=K_qmn)


def score_layer(s_bto: Tensor, a_bti: Tensor, queries: LayerQueries) -> Tensor:
    """One layer's share of every sequence's score against every query: [B, Q], float32 or wider.

    s_bto: [B, T, O], a_bti: [B, T, I], zero on padding; or [B, T, I - 1], the 1 that a bias multiplies left out and
    taken as read. Products per token, R columns in all (`cheapest` compares): low rank: sum_t (U_q^T s_t) . (V_q^T
    a_t), R (O + I). Full: g = sum_t s_t a_t^T once, O I (1 + Q / T). Joint: the core B_O^T g B_I from projected tokens,
    m O + n I + m n (1 + Q / T).
    """
    B, T, _ = s_bto.shape
    ones = a_bti.shape[-1] == queries.inputs
    if queries.P_qoi is not None:
        if queries.P_qo is None:
            return _against(s_bto, a_bti, queries.P_qoi, queries.scratch)
        # s is zero on padding, so that a 1 there adds nothing.
        s_bo = (s_bto.transpose(1, 2) @ a_bti[..., -1:]).squeeze(-1) if ones else s_bto.sum(dim=1)
        of_bias_bq = s_bo @ queries.P_qo.T.to(s_bo.dtype)
        a_bti = a_bti[..., :-1] if ones else a_bti
        return _against(s_bto, a_bti, queries.P_qoi, queries.scratch).add_(of_bias_bq)
    s_xo, a_xi = s_bto.flatten(0, 1), a_bti.flatten(0, 1)

    def inputs(V_ic: Tensor) -> Tensor:
        V_ic = V_ic.to(a_xi.dtype)
        return a_xi @ V_ic if ones else torch.addmm(V_ic[-1], a_xi, V_ic[:-1])

    if queries.K_qmn is not None:
        assert queries.B_om is not None
        assert queries.B_in is not None
        s_xm, a_xn = s_xo @ queries.B_om.to(s_xo.dtype), inputs(queries.B_in)
        return _against(s_xm.view(B, T, -1), a_xn.view(B, T, -1), queries.K_qmn)
    shares = [
        (s_xo @ U_oc.to(s_xo.dtype)).mul_(inputs(V_ic)).view(B, T, -1).sum(dim=1, dtype=_wide(s_bto))
        for U_oc, V_ic in zip(queries.U_parts, queries.V_parts, strict=True)
    ]
    return _by_query(torch.cat(shares, dim=1), queries.ranks)


def _against(s_btm: Tensor, a_btn: Tensor, K_qmn: Tensor, scratch: Scratch | None = None) -> Tensor:
    """<K_q, sum_t s_t a_t^T>: [B, Q]."""
    K_qx = K_qmn.flatten(1).to(s_btm.dtype)
    at_once = formed_at_once(*K_qmn.shape[1:])
    shares = []
    for s_cmt, a_ctn in zip(s_btm.transpose(1, 2).split(at_once), a_btn.split(at_once), strict=True):
        out = None if scratch is None else scratch.take(s_cmt, len(s_cmt), *K_qmn.shape[1:])
        g_cx = torch.bmm(s_cmt, a_ctn, out=out).flatten(1)
        # The other way round it takes half as long again: few rows, few columns and a million products for each entry.
        shares.append((K_qx @ g_cx.T).T)
    return torch.cat(shares).to(_wide(s_btm))


def formed_at_once(m: int, n: int) -> int:
    """How many sequences' [m, n] matrices are formed before they are scored."""
    return max(1, _FORMED_ENTRIES // (m * n))


def _by_query(shares_bx: Tensor, ranks: tuple[int, ...]) -> Tensor:
    if min(ranks) == max(ranks):
        return shares_bx.view(len(shares_bx), len(ranks), -1).sum(dim=-1)
    return torch.stack([part.sum(dim=1) for part in shares_bx.split(list(ranks), dim=1)], dim=1)


def products(
    O: int, I: int, T: int, Q: int, columns: int, joint: tuple[int, int] | None = None, formed: float = 1.0
) -> dict[str, float]:
    """Multiply-adds per token by the way of scoring: `low`, `full`, `joint` (see `score_layer`).

    columns: of all queries together. joint: (m, n), where there is a basis pair. T: tokens of a sequence. Those of a
    matrix formed for every sequence count `formed` times.
    """
    by_matrix = formed * (1 + Q / T)
    found = {"low": float(columns * (O + I)), "full": O * I * by_matrix}
    if joint:
        m, n = joint
        found["joint"] = m * O + n * I + m * n * by_matrix
    return found


def cheapest(O: int, I: int, T: int, Q: int, columns: int, joint: tuple[int, int] | None = None) -> str:
    """The way with the fewest `products`, those of a matrix formed for every sequence weighed as measured; ties in
    their order."""
    costs = products(O, I, T, Q, columns, joint, _FORMED)
    return min(costs, key=costs.__getitem__)


def score_tokens(s_bto: Tensor, a_bti: Tensor, P_oi: Tensor) -> Tensor:
    """One layer's and one query's score by input position: s_t^T P a_t, [B, T], float32 or wider.

    P_oi: [O, I], full rank. Sums over t to the sequence's <P, g>.
    """
    wide = _wide(s_bto)
    return ((s_bto.to(wide) @ P_oi.to(wide)) * a_bti.to(wide)).sum(dim=-1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
