"""What ranks that share a model gather of it at a time: decoder blocks, and the limits that follow from the largest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from infscan.config import ZeroConfig

# The one at work, and the next one.
_BLOCKS = 2
# Below this a model is small, and more is gained by fewer calls.
_LEAST_LIVE, _LEAST_AHEAD = 30_000_000, 10_000_000


@dataclass(frozen=True)
class GatherLimits:
    """In parameters. live: gathered at once. ahead: of them, before they are used. block: of the largest block; 0 where
    the model has none."""

    live: int
    ahead: int
    block: int = 0

    @staticmethod
    def of(settings: ZeroConfig, block: int) -> GatherLimits:
        """What is not given follows from the model's largest block."""
        live, ahead = settings.max_live_parameters, settings.prefetch_bucket_size
        return GatherLimits(
            max(_LEAST_LIVE, _BLOCKS * block) if live is None else live,
            max(_LEAST_AHEAD, block) if ahead is None else ahead,
            block,
        )

    @property
    def by_block(self) -> bool:
        """Whether a block's parameters are gathered together, in one call, and not one matrix after the other."""
        return 0 < self.block <= self.live

    def most(self, largest: int) -> int:
        """The most that is gathered, where the largest parameter has so many entries: what is gathered ahead counts as
        live, but for the parameter with which it reaches its limit."""
        return max(self.live, largest) + min(self.ahead, largest)


def blocks(module: nn.Module) -> list[nn.Module]:
    """A model's decoder blocks: what activations are checkpointed by, none within another."""
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if isinstance(child, GradientCheckpointingLayer) else blocks(child)
    return found


def largest_block(module: nn.Module) -> int:
    """The parameters of a model's largest block; 0 where it has none that transformers calls so."""
    return max((sum(each.numel() for each in block.parameters()) for block in blocks(module)), default=0)
