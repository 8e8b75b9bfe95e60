"""The second moments A of a layer's inputs and S of its pseudo-gradients (docs/method.md#ek-fac, step 2)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from infscan.influence.blocks import BlockDiagonal
from infscan.influence.precision import add_product, operand

# Thinner panels save more products and make each slower: below this many rows one matrix product is as quick.
_PANEL_ROWS, _MOST_PANELS = 192, 8
# Rows mirrored at a time: few enough that a cache holds the square in their corner.
_MIRRORED_ROWS = 256


def with_ones(a_bti: Tensor, mask_bt: Tensor, *, bias: bool, padded: bool = True) -> Tensor:
    """Zero the padding of a layer's inputs and, where it has a bias, append the 1 that the bias multiplies.

    a_bti: [B, T, I]. mask_bt: [B, T], true on tokens. Not `padded`: it is true everywhere, and nothing is copied to be
    zeroed. Returns [B, T, I] (which then is `a_bti` itself) or [B, T, I + 1], in a's dtype.
    """
    mask_bt1 = mask_bt.unsqueeze(-1)
    if padded:
        # Filled, not multiplied: an activation that overflows on padding must not become NaN * 0.
        a_bti = a_bti.masked_fill(~mask_bt1, 0)
    return torch.cat([a_bti, mask_bt1.to(a_bti.dtype)], dim=-1) if bias else a_bti


def add_second_moment(total: BlockDiagonal, x_btn: Tensor, ones_bt: Tensor | None = None) -> None:
    """total += sum over tokens of x x^T, its diagonal blocks alone, in float32 or wider. Padding must be zero in x.

    total: [n, n]; x_btn: [B, T, n], or [B, T, n - 1] with the 1 that a bias multiplies left out: ones_bt, bool [B, T],
    then says which tokens have one; of an expert's tokens both have one axis for B and T. Grosse et al. 2023, equation
    16, as sums: divide by the tokens at the end.
    Only the upper triangle is summed, in panels of rows that start at the diagonal: near half the products of x^T x.
    What is below the diagonal means nothing until `mirror` has made the sum symmetric.
    """
    sizes = total.sizes
    if ones_bt is not None:
        sizes[-1] -= 1
        of_ones = total.blocks[-1][:, -1]
        tokens = tuple(range(x_btn.dim() - 1))
        of_ones[:-1] += x_btn[..., x_btn.shape[-1] - sizes[-1] :].sum(dim=tokens, dtype=of_ones.dtype)
        of_ones[-1] += ones_bt.sum()
    for block, x_btk in zip(total.blocks, x_btn.split(sizes, dim=-1), strict=True):
        x_mk = operand(x_btk.flatten(0, -2), block)
        k = x_mk.shape[1]
        for start, stop in _panels(k):
            add_product(block[start:stop, start:k], x_mk[:, start:stop].T, x_mk[:, start:])


def mirror(total: BlockDiagonal) -> BlockDiagonal:
    """Make `total`, whose upper triangle `add_second_moment` has summed, symmetric; in place, and returned."""
    for block in total.blocks:
        for start in range(0, len(block), _MIRRORED_ROWS):
            stop = start + _MIRRORED_ROWS
            corner = block[start:stop, start:stop]
            corner.copy_(corner.triu() + corner.triu(1).T)
            block[stop:, start:stop] = block[start:stop, stop:].T
    return total


def _panels(n: int) -> list[tuple[int, int]]:
    count = min(_MOST_PANELS, max(1, n // _PANEL_ROWS))
    edges = [n * index // count for index in range(count + 1)]
    return list(pairwise(edges))
