"""Thirds of a model's layers: lower, middle and upper, by block."""

from __future__ import annotations

import re
from collections.abc import Sequence

THIRDS = ("lower", "middle", "upper")


def block_of(layer: str) -> int:
    """The number of a layer's block, the first number in its module path: 3 for `gpt_neox.layers.3.mlp.dense_h_to_4h`;
    -1 for a layer outside the blocks."""
    found = re.search(r"\.(\d+)(?:\.|$)", layer)
    return int(found[1]) if found else -1


def thirds(layers: Sequence[str]) -> dict[str, str]:
    """`lower`, `middle` or `upper` by layer: block b of B is in third floor(3 b / B); those outside the blocks by which
    side of them they stand on."""
    blocks = max((block_of(layer) for layer in layers), default=-1) + 1
    found: dict[str, str] = {}
    seen = False
    for layer in layers:
        block = block_of(layer)
        seen = seen or block >= 0
        found[layer] = THIRDS[3 * block // blocks] if block >= 0 else THIRDS[2 if seen else 0]
    return found
