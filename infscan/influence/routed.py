"""The tokens of a micro-batch that reach one expert of a mixture: some of each sequence's, never on a padded grid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routed:
    """Where an expert's tokens stand. tokens_m: int64 [M], ascending, b * T + t in a micro-batch of [B, T]."""

    tokens_m: Tensor
    B: int
    T: int

    @property
    def rows_m(self) -> Tensor:
        """The sequence of each token."""
        return self.tokens_m // self.T

    @property
    def positions_m(self) -> Tensor:
        """The position of each token in its sequence."""
        return self.tokens_m % self.T

    def of(self, x_bt: Tensor) -> Tensor:
        """The expert's tokens of something that every token has: [M, ...] from [B, T, ...]."""
        return x_bt.flatten(0, 1)[self.tokens_m]

    def by_row(self, x_mq: Tensor) -> Tensor:
        """The sum over each sequence's tokens: [B, q] from [M, q]."""
        return x_mq.new_zeros(self.B, *x_mq.shape[1:]).index_add_(0, self.rows_m, x_mq)

    def gradients(self, s_mo: Tensor, a_mi: Tensor) -> Tensor:
        """Each sequence's sum over its tokens of s a^T: [B, O, I]."""
        g_boi = s_mo.new_zeros(self.B, s_mo.shape[1], a_mi.shape[1])
        for row, mine in self.segments():
            g_boi[row] = s_mo[mine].T @ a_mi[mine]
        return g_boi

    def segments(self) -> Iterator[tuple[int, slice]]:
        """Every sequence that has tokens here, with where they are."""
        if self.tokens_m.device.type == "meta":
            counts = [len(self.tokens_m) * row // self.B for row in range(self.B + 1)]
            counts = [stop - start for start, stop in pairwise(counts)]
        else:
            counts = torch.bincount(self.rows_m, minlength=self.B).tolist()
        start = 0
        for row, count in enumerate(counts):
            if count:
                yield row, slice(start, start + count)
            start += count
