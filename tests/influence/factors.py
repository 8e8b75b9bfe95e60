"""Small made-up layers and factors for tests of the arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from infscan.influence.eigenbasis import eigenbasis
from infscan.influence.layers import LayerFactors

WIDE = torch.float64


def normal(seed: int, *shape: int, dtype: torch.dtype = WIDE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE).to(dtype)


def covariance(seed: int, n: int, decay: float = 1.0) -> Tensor:
    """A random second moment [n, n] whose eigenvalues fall off as k^-decay."""
    Q, _ = torch.linalg.qr(normal(seed, n, n))
    return (Q * torch.arange(1, n + 1, dtype=WIDE) ** -decay) @ Q.T


def make_factors(seed: int, O: int, I: int, *, kronecker: bool = False, decay: float = 1.0) -> LayerFactors:
    """Factors of an O x I layer; `kronecker`: Lambda is exactly the outer product of S's and A's eigenvalues."""
    S, A = covariance(seed, O, decay), covariance(seed + 1, I, decay)
    S_eigenvalues, Q_S = eigenbasis(S, "S")
    A_eigenvalues, Q_A = eigenbasis(A, "A")
    product = S_eigenvalues[:, None] * A_eigenvalues
    Lambda = product if kronecker else product * (0.5 + normal(seed + 2, O, I).square())
    return LayerFactors(A, S, Q_A, Q_S, A_eigenvalues, S_eigenvalues, Lambda)
