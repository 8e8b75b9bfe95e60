"""One basis pair per layer for all queries: P_q ~= B_O K_q B_I^T (docs/method.md#query-batching)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infscan.influence.compress import clamped_roots
from infscan.influence.layers import LayerFactors
from infscan.influence.layout import ON_CPU, Prices, SharedBasis, multiply_adds
from infscan.influence.span import Rotation

# Shares of what may be left out that are left out on the side of outputs, and the rest on that of inputs. Without any a
# side keeps its own coordinates, and no token is projected.
_SPLITS = (0.0, 0.25, 0.5, 0.75, 1.0)


def shared_basis(
    U_xo: Tensor,
    V_xi: Tensor,
    ranks: Sequence[int],
    factors: LayerFactors | None,
    weights_q: Tensor,
    kept: float,
    tokens: float,
    entries: int,
    prices: Prices = ON_CPU,
) -> SharedBasis[Tensor] | None:
    """Find the cheapest basis pair that leaves out at most 1 - kept of the queries' weighted squares.

    None where the cores of every such pair have more entries than these.

    U_xo: [sum of ranks, O], V_xi: [sum of ranks, I]: P_q = U_q^T V_q, query after query. In the factors' eigenbases,
    with eigenvalues for weights (as `compress_weighted`; without factors P_q as it is), M_q = S^(1/2) P_q A^(1/2). The
    bases span the leading eigenvectors of sum_q w_q M_q M_q^T and sum_q w_q M_q^T M_q (a higher-order SVD; De Lathauwer
    et al. 2000): what is left out is at most the sum of the eigenvalues left out on both sides. How 1 - kept is split
    between them is tried (`_SPLITS`), by `multiply_adds` at these prices for sequences of so many tokens. weights_q:
    [Q], w; 1 over a query's own total makes every query count alike.
    """
    O, I = U_xo.shape[1], V_xi.shape[1]
    S = A = None
    rows_xo, rows_xi = U_xo, V_xi
    if factors is not None:
        S = _Weights(factors.Q_S, clamped_roots(factors.S_eigenvalues))
        A = _Weights(factors.Q_A, clamped_roots(factors.A_eigenvalues))
        rows_xo, rows_xi = S.weigh(U_xo), A.weigh(V_xi)
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
    m, n = min(pairs, key=lambda pair: multiply_adds(O, I, tokens, len(ranks), 0, pair, prices)["shared_basis"])
    (left_xm, B_mo), (right_xn, B_ni) = outputs.projected(U_xo, rows_xo, m, S), inputs.projected(V_xi, rows_xi, n, A)
    pieces = zip(left_xm.split(list(ranks)), right_xn.split(list(ranks)), strict=True)
    return SharedBasis(torch.stack([mine.T @ its for mine, its in pieces]).to(U_xo.dtype), B_mo, B_ni)


@dataclass(frozen=True)
class _Weights:
    """A factor's eigenvectors [k, k] and the roots [k] of its eigenvalues."""

    Q: Rotation
    roots_k: Tensor

    def weigh(self, rows_xk: Tensor) -> Tensor:
        return (rows_xk @ self.Q) * self.roots_k

    def unweighed(self, X_km: Tensor) -> Tensor:
        return self.Q @ (X_km / self.roots_k[:, None])


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

    def projected(
        self, own_xk: Tensor, rows_xk: Tensor, count: int, weights: _Weights | None
    ) -> tuple[Tensor, Tensor | None]:
        """Rows on the leading vectors [x, count], and their basis in rows [count, k]; on all, the own rows and none."""
        if count == len(self.values_k):
            return own_xk, None
        X_km = self.vectors_kk[:, :count]
        B_km = weights.unweighed(X_km) if weights else X_km
        return rows_xk @ X_km, B_km.T.contiguous().to(own_xk.dtype)
