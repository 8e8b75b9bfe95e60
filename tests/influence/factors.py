"""Small made-up layers and factors for tests of the arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from infscan.influence.blocks import BlockDiagonal, block_sizes
from infscan.influence.eigenbasis import eigenbasis
from infscan.influence.layers import LayerFactors

WIDE = torch.float64


def normal(seed: int, *shape: int, dtype: torch.dtype = WIDE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE).to(dtype)


def covariance(seed: int, n: int, decay: float = 1.0) -> Tensor:
    """A random second moment [n, n] whose eigenvalues fall off as k^-decay."""
    Q, _ = torch.linalg.qr(normal(seed, n, n))
    return (Q * torch.arange(1, n + 1, dtype=WIDE) ** -decay) @ Q.T


def diagonal_blocks(moment_nn: Tensor, blocks: int) -> BlockDiagonal:
    stops = torch.tensor(block_sizes(len(moment_nn), blocks)).cumsum(0).tolist()
    starts = [0, *stops[:-1]]
    return BlockDiagonal(tuple(moment_nn[i:j, i:j].clone() for i, j in zip(starts, stops, strict=True)))


def make_factors(
    seed: int, O: int, I: int, *, kronecker: bool = False, decay: float = 1.0, blocks: int = 1
) -> LayerFactors:
    """Factors of an O x I layer; `kronecker`: Lambda is exactly the outer product of S's and A's eigenvalues."""
    S = diagonal_blocks(covariance(seed, O, decay), blocks)
    A = diagonal_blocks(covariance(seed + 1, I, decay), blocks)
    S_eigenvalues, Q_S = eigenbasis(S, "S")
    A_eigenvalues, Q_A = eigenbasis(A, "A")
    product = S_eigenvalues[:, None] * A_eigenvalues
    Lambda = product if kronecker else product * (0.5 + normal(seed + 2, O, I).square())
    return LayerFactors(A, S, Q_A, Q_S, A_eigenvalues, S_eigenvalues, Lambda)


def tensors_of(factors: LayerFactors) -> list[Tensor]:
    parts = [value.blocks if isinstance(value, BlockDiagonal) else (value,) for value in vars(factors).values()]
    return [tensor for part in parts for tensor in part if isinstance(tensor, Tensor)]
