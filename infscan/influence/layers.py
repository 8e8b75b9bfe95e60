"""The shapes of a tracked layer, and what EK-FAC keeps of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infscan.influence.blocks import BlockDiagonal
from infscan.influence.span import Rotation


@dataclass(frozen=True)
class Layer:
    """A tracked linear layer y = W a + b.

    name: its module path. outputs: O. inputs: I, with the appended 1 counted where it has a bias.
    input_of: the first layer that has the same input (itself, mostly); layers with one input share one A.
    stack: of an expert of a mixture, the parameter that all its experts lie in; empty for a module of its own.
    share: the part of a sequence's tokens that it sees on average, below 1 for an expert.
    span: eigenvectors of S that are kept, where S is too wide to be formed (`infscan.influence.span`); 0 is all.
    """

    name: str
    outputs: int
    inputs: int
    bias: bool
    input_of: str
    stack: str = ""
    share: float = 1.0
    span: int = 0

    @property
    def kept_outputs(self) -> int:
        """Rows of Lambda as it is summed and stored: O, or those of the span and one for all that is outside."""
        return min(self.span + 1, self.outputs) if self.span else self.outputs

    @property
    def size(self) -> int:
        """Entries of its gradient, O x I: its weight's, and its bias's where it has one."""
        return self.outputs * self.inputs


@dataclass(frozen=True)
class LayerFactors:
    """EK-FAC factors of one layer, float32 unless said otherwise. Never changed in place.

    A (I x I), S (O x O): second moments per token, the diagonal blocks alone where there are several (factors.blocks).
    Q_A, Q_S: their eigenvectors in columns, block by block. A_eigenvalues (I), S_eigenvalues (O), in the same order.
    Of a layer with a span S is not there, and Q_S is a `SpannedBasis`: beyond its span, in Lambda and in S_eigenvalues,
    every row is the mean.
    Lambda (O x I), every entry: corrected eigenvalues per sequence. stack_mean: of an expert, the mean of Lambda over
    all experts of its stack, which its relative damping is of; None where that is its own mean.
    """

    A: BlockDiagonal
    S: BlockDiagonal | None
    Q_A: BlockDiagonal
    Q_S: Rotation
    A_eigenvalues: Tensor
    S_eigenvalues: Tensor
    Lambda: Tensor
    stack_mean: float | None = None

    def to(self, device: str, dtype: torch.dtype | None = None) -> LayerFactors:
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, dtype, non_blocking=True)
            for name, value in vars(self).items()
            if name != "stack_mean"
        }
        return LayerFactors(**moved, stack_mean=self.stack_mean)
