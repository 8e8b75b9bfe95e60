"""Scores of training sequences against the query batch, never materialising a gradient where it can be avoided.

score(q, z) = sum over layers of <P_q, g_z> = sum over layers and tokens of s_t^T P_q a_t

In docs/method.md#query-batching.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infscan.influence.precision import batched_product
from infscan.influence.routed import Routed

# Columns of one matrix product: enough to keep it busy, few enough that a batch's [tokens, columns] stay small.
_COLUMNS = 1024
# Entries of the sequences' own matrices g that are formed at once, however many sequences there are: on a CPU (float32:
# 128 MiB), and on a GPU (bfloat16: 1 GiB), which reads every query's matrix again for each time.
_FORMED_ENTRIES, _FORMED_ON_A_GPU = 1 << 25, 1 << 29
# A GPU's product is cut into squares of the result, and each is one processor's: of fewer squares than this, the sum
# that makes one is split over several. No part is shorter than the second.
_SQUARE, _SQUARES, _LEAST_SUMMED = 128, 256, 4096


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
    """All queries' preconditioned gradients of one layer on a device, as columns or as cores (`layout.on_device`).

    U_parts, V_parts: [O, c] and [I, c], all queries' columns side by side, cut every `_COLUMNS`; query q owns the next
    ranks[q] of them. K_qmn: cores [Q, m, n], P_q = B_O K_q B_I^T, with B_om and B_in one basis for all queries; a side
    without one keeps its own coordinates, and without both K_q is P_q itself. Where inputs keep theirs, the last
    column, a bias's, may lie apart in K_qm: products of an even width are faster. scratch: where the sequences' own
    cores are formed; all layers may have the same one. Products with tokens are in the dtype of what is laid out.
    """

    ranks: tuple[int, ...]
    U_parts: tuple[Tensor, ...] = ()
    V_parts: tuple[Tensor, ...] = ()
    K_qmn: Tensor | None = None
    K_qm: Tensor | None = None
    B_om: Tensor | None = None
    B_in: Tensor | None = None
    scratch: Scratch | None = field(default=None, compare=False, repr=False)

    @property
    def queries(self) -> int:
        return len(self.ranks)

    @property
    def nbytes(self) -> int:
        """Without the scratch, which layers share."""
        parts = (*self.U_parts, *self.V_parts, self.K_qmn, self.K_qm, self.B_om, self.B_in)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def dtype(self) -> torch.dtype:
        return self.U_parts[0].dtype if self.K_qmn is None else self.K_qmn.dtype

    @property
    def inputs(self) -> int:
        """I, with the bias's 1 where there is a bias."""
        if self.K_qmn is not None and self.B_in is None:
            return self.K_qmn.shape[-1] + (self.K_qm is not None)
        return len(self.V_parts[0] if self.B_in is None else self.B_in)

    @staticmethod
    def factored(U_xo: Tensor, V_xi: Tensor, ranks: Sequence[int]) -> LayerQueries:
        """From columns in rows, U [sum of ranks, O] and V [sum of ranks, I]: one GEMM a side serves every query."""
        cut = (
            [part.T.contiguous() for part in U_xo.split(_COLUMNS)],
            [part.T.contiguous() for part in V_xi.split(_COLUMNS)],
        )
        return LayerQueries(tuple(ranks), U_parts=tuple(cut[0]), V_parts=tuple(cut[1]))

    @staticmethod
    def dense(P_qoi: Tensor, scratch: Scratch | None = None, *, bias: bool = False) -> LayerQueries:
        """bias: the last column is a bias's, and is laid apart."""
        return LayerQueries.shared_basis(P_qoi, scratch=scratch, bias=bias)

    @staticmethod
    def shared_basis(
        K_qmn: Tensor,
        B_mo: Tensor | None = None,
        B_ni: Tensor | None = None,
        scratch: Scratch | None = None,
        *,
        bias: bool = False,
    ) -> LayerQueries:
        """From bases in rows, B_O [m, O] and B_I [n, I], where there are any; bias: as of `dense`, without a B_I."""
        ranks, K_qm = (0,) * len(K_qmn), None
        if bias and B_ni is None:
            K_qmn, K_qm = K_qmn[..., :-1], K_qmn[..., -1].contiguous()
        B_om, B_in = (None if basis is None else basis.T.contiguous() for basis in (B_mo, B_ni))
        return LayerQueries(ranks, (), (), K_qmn.contiguous(), K_qm, B_om, B_in, scratch)

    def densify(self) -> Tensor:
        """P of every query, whatever the way they are laid out: [Q, O, I]."""
        if self.K_qmn is None:
            U_ox, V_ix = torch.cat(self.U_parts, dim=1), torch.cat(self.V_parts, dim=1)
            pairs = zip(U_ox.split(self.ranks, dim=1), V_ix.split(self.ranks, dim=1), strict=True)
            return torch.stack([U_or @ V_ir.T for U_or, V_ir in pairs])
        found = self.K_qmn if self.K_qm is None else torch.cat([self.K_qmn, self.K_qm.unsqueeze(-1)], dim=-1)
        found = found if self.B_om is None else self.B_om @ found
        return found if self.B_in is None else found @ self.B_in.T


def score_layer(s_bto: Tensor, a_bti: Tensor, queries: LayerQueries, routed: Routed | None = None) -> Tensor:
    """One layer's share of every sequence's score against every query: [B, Q], float32 or wider.

    s_bto: [B, T, O], a_bti: [B, T, I], zero on padding; or [B, T, I - 1], the 1 that a bias multiplies left out and
    taken as read. Multiply-adds per token, with R columns in all: factored: sum_t (U_q^T s_t) . (V_q^T a_t), R (O + I).
    Otherwise: B_O^T g B_I, g = sum_t s_t a_t^T, once from the projected tokens, and <K_q, it> for every query:
    m O + n I + m n (1 + Q / T), where a side without a basis is not projected. routed: of an expert, whose s is [M, O]
    and a [M, I].
    """
    if routed is not None:
        return _score_routed(s_bto, a_bti, queries, routed)
    wide = _wide(s_bto)
    s_bto, a_bti = s_bto.to(queries.dtype), a_bti.to(queries.dtype)
    B, T, _ = s_bto.shape
    ones = a_bti.shape[-1] == queries.inputs
    s_xo, a_xi = s_bto.flatten(0, 1), a_bti.flatten(0, 1)

    def inputs(V_ic: Tensor) -> Tensor:
        return a_xi @ V_ic if ones else torch.addmm(V_ic[-1], a_xi, V_ic[:-1])

    if queries.K_qmn is None:
        shares = [
            (s_xo @ U_oc).mul_(inputs(V_ic)).view(B, T, -1).sum(dim=1, dtype=wide)
            for U_oc, V_ic in zip(queries.U_parts, queries.V_parts, strict=True)
        ]
        return _by_query(torch.cat(shares, dim=1), queries.ranks)
    s_btm = s_bto if queries.B_om is None else (s_xo @ queries.B_om).view(B, T, -1)
    a_btn = a_bti if queries.B_in is None else inputs(queries.B_in).view(B, T, -1)
    scores_bq = _against(s_btm, a_btn[..., : queries.K_qmn.shape[-1]], queries.K_qmn, queries.scratch).to(wide)
    if queries.K_qm is None:
        return scores_bq
    # s is zero on padding, so that a 1 there adds nothing.
    s_bm = (s_btm.transpose(1, 2) @ a_bti[..., -1:]).squeeze(-1) if ones else s_btm.sum(dim=1)
    return scores_bq.add_(s_bm @ queries.K_qm.T)


def _score_routed(s_mo: Tensor, a_mi: Tensor, queries: LayerQueries, routed: Routed) -> Tensor:
    """`score_layer` over an expert's tokens, as many as each sequence has there: [B, Q]."""
    if queries.K_qmn is None:
        wide = _wide(s_mo)
        s_mo, a_mi = s_mo.to(queries.dtype), a_mi.to(queries.dtype)
        ones = a_mi.shape[-1] == queries.inputs
        shares = [
            routed.by_row((s_mo @ U_oc).mul_(a_mi @ V_ic if ones else torch.addmm(V_ic[-1], a_mi, V_ic[:-1])).to(wide))
            for U_oc, V_ic in zip(queries.U_parts, queries.V_parts, strict=True)
        ]
        return _by_query(torch.cat(shares, dim=1), queries.ranks)
    scores_bq = s_mo.new_zeros(routed.B, queries.queries, dtype=_wide(s_mo))
    for row, mine in routed.segments():
        scores_bq[row] = score_layer(s_mo[None, mine], a_mi[None, mine], queries)[0]
    return scores_bq


def _against(s_btm: Tensor, a_btn: Tensor, K_qmn: Tensor, scratch: Scratch | None = None) -> Tensor:
    """<K_q, sum_t s_t a_t^T>: [B, Q]."""
    K_qx = K_qmn.flatten(1)
    # Shapes alone stand for a GPU's, but where there is a scratch, which is a CPU's.
    on_cpu = K_qmn.is_cpu or scratch is not None
    at_once = formed_at_once(*K_qmn.shape[1:], on_cpu=on_cpu)
    shares = []
    for s_cmt, a_ctn in zip(s_btm.transpose(1, 2).split(at_once), a_btn.split(at_once), strict=True):
        out = None if scratch is None else scratch.take(s_cmt, len(s_cmt), *K_qmn.shape[1:])
        g_cx = torch.bmm(s_cmt, a_ctn, out=out).flatten(1)
        # The other way round it takes half as long again: few rows, few columns and a million products for each entry.
        shares.append(((K_qx @ g_cx.T) if on_cpu else long_product(K_qx, g_cx, splits_of(K_qx, g_cx))).T)
    return torch.cat(shares)


def formed_at_once(m: int, n: int, *, on_cpu: bool) -> int:
    """How many sequences' [m, n] matrices are formed before they are scored."""
    return max(1, (_FORMED_ENTRIES if on_cpu else _FORMED_ON_A_GPU) // (m * n))


def long_product(K_qx: Tensor, g_cx: Tensor, splits: int) -> Tensor:
    """K g^T, [Q, c], float32 or wider: few rows and columns, and a long sum, cut into so many that are added at the
    end. Views, not copies; `splits` divides x."""
    wide = _wide(K_qx)
    K_pqy = K_qx.view(len(K_qx), splits, -1).transpose(0, 1)
    g_pyc = g_cx.view(len(g_cx), splits, -1).permute(1, 2, 0)
    return batched_product(K_pqy, g_pyc, wide).sum(dim=0)


def splits_of(K_qx: Tensor, g_cx: Tensor) -> int:
    """Into how many a GPU's sum is cut: a power of two that divides it, until there is work for all processors."""
    squares = math.prod(-(-len(one) // _SQUARE) for one in (K_qx, g_cx))
    x = K_qx.shape[1]
    wanted = min(_SQUARES // squares, x // _LEAST_SUMMED)
    return math.gcd(x, 1 << (wanted.bit_length() - 1)) if wanted > 1 else 1


def _by_query(shares_bx: Tensor, ranks: tuple[int, ...]) -> Tensor:
    if min(ranks) == max(ranks):
        return shares_bx.view(len(shares_bx), len(ranks), -1).sum(dim=-1)
    return torch.stack([part.sum(dim=1) for part in shares_bx.split(list(ranks), dim=1)], dim=1)


def score_tokens(s_bto: Tensor, a_bti: Tensor, P_oi: Tensor) -> Tensor:
    """One layer's and one query's score by input position: s_t^T P a_t, [B, T], float32 or wider.

    P_oi: [O, I], full rank. a_bti: [B, T, I], or [B, T, I - 1], the 1 that a bias multiplies left out and taken as
    read. Sums over t to the sequence's <P, g>.
    """
    wide = _wide(s_bto)
    s_bto, a_bti, P_oi = s_bto.to(wide), a_bti.to(wide), P_oi.to(wide)
    given = a_bti.shape[-1]
    scores_bt = ((s_bto @ P_oi[:, :given]) * a_bti).sum(dim=-1)
    return scores_bt if given == P_oi.shape[1] else scores_bt + s_bto @ P_oi[:, -1]


def score_routed_tokens(s_mo: Tensor, a_mi: Tensor, P_oi: Tensor, routed: Routed, rows_n: Tensor) -> Tensor:
    """`score_tokens` of an expert for some of the micro-batch's sequences: [n, T], zero at tokens that are elsewhere.

    rows_n: int64 [n], the sequences, each once.
    """
    if s_mo.device.type == "meta":
        return score_tokens(s_mo, a_mi, P_oi).new_zeros(len(rows_n), routed.T)
    place_b = torch.full((routed.B,), -1, device=s_mo.device)
    place_b[rows_n] = torch.arange(len(rows_n), device=s_mo.device)
    place_m = place_b[routed.rows_m]
    mine = place_m >= 0
    scores_c = score_tokens(s_mo[mine], a_mi[mine], P_oi)
    scores_nt = scores_c.new_zeros(len(rows_n), routed.T)
    scores_nt[place_m[mine], routed.positions_m[mine]] = scores_c
    return scores_nt


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
