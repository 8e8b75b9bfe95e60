"""Square matrices that are zero outside of near-equal diagonal blocks (docs/method.md#ek-fac, step 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def block_sizes(n: int, blocks: int) -> list[int]:
    """n cut into `blocks` sizes that differ by at most one, the larger ones first (as numpy.array_split)."""
    return [n // blocks + (index < n % blocks) for index in range(blocks)]


@dataclass(frozen=True, eq=False)
class BlockDiagonal:
    """An [n, n] matrix of which only the diagonal blocks are held, from the top left to the bottom right.

    `M @ x` and `x @ M` are the products with the dense matrix; with one block they are that block's, bit for bit.
    """

    blocks: tuple[Tensor, ...]

    @staticmethod
    def zeros(n: int, blocks: int, *, dtype: torch.dtype, device: str = "cpu") -> BlockDiagonal:
        return BlockDiagonal(tuple(torch.zeros(k, k, dtype=dtype, device=device) for k in block_sizes(n, blocks)))

    @property
    def sizes(self) -> list[int]:
        return [len(block) for block in self.blocks]

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.blocks)

    @property
    def T(self) -> BlockDiagonal:
        return BlockDiagonal(tuple(block.T for block in self.blocks))

    def dense(self) -> Tensor:
        """[n, n], zeros included."""
        return torch.block_diag(*self.blocks)

    def to(self, device: str, dtype: torch.dtype | None = None, *, non_blocking: bool = False) -> BlockDiagonal:
        return BlockDiagonal(tuple(block.to(device, dtype, non_blocking=non_blocking) for block in self.blocks))

    def __matmul__(self, x: Tensor) -> Tensor:
        """M x for x [..., n, m]."""
        parts = zip(self.blocks, x.split(self.sizes, dim=-2), strict=True)
        return _joined([block @ part for block, part in parts], dim=-2)

    def __rmatmul__(self, x: Tensor) -> Tensor:
        """x M for x [..., n]."""
        parts = zip(x.split(self.sizes, dim=-1), self.blocks, strict=True)
        return _joined([part @ block for part, block in parts], dim=-1)

    def rotate_with_one(self, x: Tensor) -> Tensor:
        """[x, 1] M for x [..., n - 1], with nothing appended to x: the last row of M is added."""
        *sizes, last = self.sizes
        *parts, x_end = x.split([*sizes, last - 1], dim=-1)
        M_end = self.blocks[-1]
        end = torch.addmm(M_end[-1], x_end.flatten(0, -2), M_end[:-1]).unflatten(0, x.shape[:-1])
        return _joined([*(part @ block for part, block in zip(parts, self.blocks, strict=False)), end], dim=-1)


def _joined(products: list[Tensor], dim: int) -> Tensor:
    # One product is left as it is: a copy would cost memory and might be laid out, and then rounded, differently.
    return products[0] if len(products) == 1 else torch.cat(products, dim=dim)
