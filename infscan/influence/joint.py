"""One basis pair per layer for all queries: P_q ~= B_O K_q B_I^T, for many queries (METHOD: query batching)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infscan.influence.compress import clamped_roots
from infscan.influence.layers import LayerFactors
from infscan.influence.score import weighed

# Shares of what may be left out that are left out on the side of outputs, and the rest on that of inputs. Without any a
# side keeps its own coordinates, and no token is projected.
_SPLITS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Joint:
    """P_q ~= B_O K_q B_I^T. B_mo: B_O's columns in rows, [m, O]. B_ni: [n, I]. K_qmn: the queries' cores, [Q, m, n].

    None in a basis's place: the side has its own coordinates (m = O, n = I).
    """

    B_mo: Tensor | None
    B_ni: Tensor | None
    K_qmn: Tensor


def joint(
    U_xo: Tensor,
    V_xi: Tensor,
    ranks: Sequence[int],
    factors: LayerFactors | None,
    weights_q: Tensor,
    kept: float,
    tokens: int,
    entries: int,
) -> Joint | None:
    """The basis pair that is cheapest to scan with and leaves out at most 1 - kept of the queries' weighted squares;
    None where the cores of none that does have so few entries.

    U_xo: [sum of ranks, O], V_xi: [sum of ranks, I]: P_q = U_q^T V_q, query after query. In the factors' eigenbases,
    with eigenvalues for weights (as `compress_weighted`; without factors P_q as it is), M_q = S^(1/2) P_q A^(1/2). The
    bases span the leading eigenvectors of sum_q w_q M_q M_q^T and sum_q w_q M_q^T M_q (a higher-order SVD; De Lathauwer
    et al. 2000): what is left out is at most the sum of the eigenvalues left out on both sides. How 1 - kept is split
    between them is tried (`_SPLITS`), by `weighed` products for sequences of so many tokens. weights_q: [Q], w; 1 over
    a query's own total makes every query count alike.
    """
    O, I = U_xo.shape[1], V_xi.shape[1]
    if factors is None:
        rows_xo, rows_xi = U_xo, V_xi
    else:
        S_roots, A_roots = clamped_roots(factors.S_eigenvalues), clamped_roots(factors.A_eigenvalues)
        rows_xo, rows_xi = (U_xo @ factors.Q_S) * S_roots, (V_xi @ factors.Q_A) * A_roots
    outputs = _Side.of(rows_xo, rows_xi, ranks, weights_q)
    inputs = _Side.of(rows_xi, rows_xo, ranks, weights_q)
    pairs = [
        (m, n)
        for split in _SPLITS
        for m in outputs.sizes((1 - kept) * split)
        for n in inputs.sizes((1 - kept) * (1 - split))
        if len(ranks) * m * n <= entries
    ]
    if not pairs:
        return None
    m, n = min(pairs, key=lambda pair: weighed(O, I, tokens, len(ranks), 0, pair)["joint"])
    B_om = B_in = None
    left_xm, right_xn = U_xo, V_xi
    if m < O:
        X_om = outputs.leading(m)
        left_xm = rows_xo @ X_om
        B_om = X_om if factors is None else factors.Q_S @ (X_om / S_roots[:, None])
    if n < I:
        Y_in = inputs.leading(n)
        right_xn = rows_xi @ Y_in
        B_in = Y_in if factors is None else factors.Q_A @ (Y_in / A_roots[:, None])
    pieces = zip(left_xm.split(list(ranks)), right_xn.split(list(ranks)), strict=True)
    K_qmn = torch.stack([mine.T @ its for mine, its in pieces])

    def in_rows(basis: Tensor | None) -> Tensor | None:
        return None if basis is None else basis.T.contiguous().to(U_xo.dtype)

    return Joint(in_rows(B_om), in_rows(B_in), K_qmn.to(U_xo.dtype))


def smallest(ranks: Sequence[int], O: int, I: int) -> list[tuple[int, int]]:
    """(m, n) of the smallest pairs that could keep every query's columns, with a basis on both sides or on one."""
    most = max(ranks)
    return [(min(most, O), min(most, I)), (O, min(most, I)), (min(most, O), I)]


@dataclass(frozen=True)
class _Side:
    """values_k: eigenvalues of sum_q w_q M_q M_q^T, falling and not negative; vectors_kk: in columns, as they fall."""

    values_k: Tensor
    vectors_kk: Tensor

    @staticmethod
    def of(rows_xk: Tensor, others_xj: Tensor, ranks: Sequence[int], weights_q: Tensor) -> _Side:
        """M_q = rows_q^T others_q. One matrix product serves all queries: M_q M_q^T = rows_q^T (others_q others_q^T)
        rows_q."""
        scaled = [
            weight * (theirs @ theirs.T) @ mine
            for mine, theirs, weight in zip(
                rows_xk.split(list(ranks)), others_xj.split(list(ranks)), weights_q.to(rows_xk), strict=True
            )
        ]
        gram_kk = (rows_xk.T @ torch.cat(scaled)).to(torch.float64)
        values, vectors = torch.linalg.eigh((gram_kk + gram_kk.T) / 2)
        return _Side(values.clamp_min(0).flip(0), vectors.flip(1).to(rows_xk.dtype))

    def sizes(self, left_out: float) -> set[int]:
        """The fewest vectors that leave out at most this share of the trace; and all, which need no basis."""
        held = self.values_k.cumsum(0)
        count = int(torch.searchsorted(held, held[-1] * (1 - left_out))) + 1
        return {min(count, len(held)), len(held)}

    def leading(self, count: int) -> Tensor:
        """Orthonormal [k, count]."""
        return self.vectors_kk[:, :count]
