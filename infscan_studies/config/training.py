"""The settings of a model that is trained here, and of its training."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from infscan.errors import ConfigError


@dataclass
class Sizes:
    """An untrained GPT-NeoX, float32; vocabulary and context are the corpus's."""

    layers: int = 2
    """Blocks."""
    width: int = 64
    """Width of the residual stream."""
    heads: int = 2
    """Attention heads; they divide the width."""
    mlp_width: int = 256
    """Width of an MLP's hidden layer."""


class Reduction(StrEnum):
    """A batch's loss: `mean` over its predicted tokens, or `sum` over each sequence's tokens and mean over its
    sequences (the loss L(z) whose gradient an influence scan takes)."""

    mean = "mean"
    sum = "sum"


class TrainingOptimizer(StrEnum):
    """What trains a model: `adamw`, or `sgd` with the momentum beta1."""

    adamw = "adamw"
    sgd = "sgd"


@dataclass
class TrainingSettings:
    """Optimizer, schedule and order of a training run."""

    optimizer: TrainingOptimizer = TrainingOptimizer.adamw
    """`adamw`, or `sgd` with the momentum `beta1`; either decays weights by learning rate x weight_decay a step."""
    epochs: int = 6
    """Passes over the sequences."""
    batch_sequences: int = 16
    """Sequences per step."""
    learning_rate: float = 2e-3
    """Peak of the learning rate."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    final_fraction: float = 0.05
    """Share of the peak that the learning rate falls to, along a cosine."""
    beta1: float = 0.9
    """AdamW's decay of the first moment, or SGD's momentum."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Weight decay, on matrices."""
    gradient_clip: float = 1.0
    """Norm that a batch's gradient is clipped to."""
    reduction: Reduction = Reduction.mean
    """A loss: `mean` over its predicted tokens, or `sum` over each sequence's tokens and mean over sequences."""
    seed: int = 0
    """Seed of the order of the sequences."""

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        for name in ("epochs", "batch_sequences", "learning_rate", "gradient_clip"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} cannot train a model: give a number above 0.")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not a fraction: give a number from 0 to 1.")
        if self.reduction not in tuple(Reduction):
            raise ConfigError(f"reduction={self.reduction!r} is unknown: give 'mean' or 'sum'.")
