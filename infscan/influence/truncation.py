"""Low-rank approximations of matrices: exact for narrow ones, by a converged block Krylov method for wide ones."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this many rows or columns the eigendecomposition of the smaller Gram matrix is quick.
EXACT_BELOW = 320
# Blocks are added until one lowers a wide matrix's squared error by less than this share of it. Convergence is faster
# than geometric: what is left to gain then is less than that again (below 1e-3 for spectra that fall at all).
GAIN = 1e-2
# Columns of a block beyond the rank, and how many blocks at most.
_OVERSAMPLING, _MOST_BLOCKS = 8, 12


def singular(M_oi: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading r singular values [r], falling, with left [O, r] and right [I, r] singular vectors: M ~= X s Y^T.

    Where min(O, I) is at most `EXACT_BELOW`: exact, from the Gram matrix of the smaller side in float64, whose error on
    leading vectors is far below float32's. Wider: block Krylov iteration with Rayleigh-Ritz (Musco and Musco 2015,
    arXiv 1504.05477, algorithm 2), until a block lowers the squared error by less than `GAIN` of it.
    A vanishing singular value has a zero column on one side.
    """
    O, I = M_oi.shape
    if O > I:
        values, Y_ir, X_or = singular(M_oi.T, rank)
        return values, X_or, Y_ir
    rank = min(rank, O)
    X_or = _exact(M_oi, rank) if max(EXACT_BELOW, 4 * rank) >= O else _krylov(M_oi, rank)
    Y_ir = M_oi.T @ X_or
    values = Y_ir.norm(dim=0)
    return values, X_or, torch.where(values > 0, Y_ir / values, torch.zeros_like(Y_ir))


def _exact(M_oi: Tensor, rank: int) -> Tensor:
    wide = M_oi.to(torch.float64)
    _, X_oo = torch.linalg.eigh(wide @ wide.T)
    return X_oo[:, -rank:].flip(1).to(M_oi.dtype)


def _krylov(M_oi: Tensor, rank: int) -> Tensor:
    """Orthonormal [O, r] whose span holds as much of M as the best one's, but for less than `GAIN` of the rest."""
    O, I = M_oi.shape
    columns = min(O, rank + _OVERSAMPLING)
    total = float(M_oi.square().sum(dtype=torch.float64))
    # Seeded by the shape alone: a query's result depends on nothing else.
    noise = torch.randn(I, columns, generator=torch.Generator().manual_seed(I), dtype=torch.float32)
    block, _ = torch.linalg.qr(M_oi @ noise.to(M_oi))
    # Images of the basis, M^T x for each of its columns, in rows: X^T M takes less than half as long as M^T X.
    basis, images_ci = block, block.T @ M_oi
    captured = 0.0
    while True:
        squares, W = torch.linalg.eigh((images_ci @ images_ci.T).to(torch.float64))
        before, captured = captured, float(squares[-rank:].sum())
        if captured - before <= GAIN * max(total - captured, 0.0) + torch.finfo(M_oi.dtype).eps * total:
            break
        if basis.shape[1] + columns > min(O, _MOST_BLOCKS * columns):
            break
        block = M_oi @ images_ci[-columns:].T
        for _ in range(2):
            # Twice: the first projection leaves rounding errors as large as what it removes is near to the block.
            block = block - basis @ (basis.T @ block)
            block, _ = torch.linalg.qr(block)
        basis = torch.cat([basis, block], dim=1)
        images_ci = torch.cat([images_ci, block.T @ M_oi])
    return basis @ W[:, -rank:].flip(1).to(M_oi.dtype)
