"""The last blocks of a model: which tracked layers they have, and where a backward through them alone may end."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from infscan.errors import ConfigError
from infscan.influence.layers import Layer

# gpt_neox.layers.3.mlp.up: the first number in a path is the block's.
_BLOCK = re.compile(r"^(.*?\.)(\d+)\.")


def last_blocks(layers: Sequence[Layer], blocks: int) -> tuple[Layer, ...]:
    """The tracked layers of the last `blocks` blocks that have any, in the model's order; a tracked head is among them.

    Raises:
        ConfigError: where they are not fewer than all, or where blocks do not form one row.
    """
    numbers = {layer.name: _place(layer.name) for layer in layers}
    rows = {prefix for prefix, _ in filter(None, numbers.values())}
    there = sorted({place[1] for place in numbers.values() if place})
    if len(rows) != 1:
        raise ConfigError(
            f"scan.sieve={blocks}: the tracked layers are in {len(rows)} rows of numbered blocks, and a sieve is of "
            "the last blocks of one; leave it out."
        )
    if blocks >= len(there):
        raise ConfigError(
            f"scan.sieve={blocks}: the model has {len(there)} blocks with tracked layers, so this many leave nothing "
            f"out; give {'fewer than ' + str(len(there)) if len(there) > 1 else 'none: leave it out'}."
        )
    first = there[-blocks]
    return tuple(layer for layer in layers if (place := numbers[layer.name]) is None or place[1] >= first)


def suffixes(layers: Sequence[Layer]) -> list[int]:
    """How many last blocks scan.sieve=auto tries: every eighth part of those with tracked layers, but not all; none
    where blocks do not form one row."""
    places = [place for place in (_place(layer.name) for layer in layers) if place]
    blocks = len({number for _, number in places})
    if len({row for row, _ in places}) != 1:
        return []
    return sorted({round(blocks * part / 8) for part in range(1, 8)} - {0, blocks})


def ends_at(layers: Sequence[Layer]) -> str | None:
    """The block below the lowest that these layers are in: a backward through them need go no further.

    None where that is the embedding.
    """
    places = [place for place in (_place(layer.name) for layer in layers) if place]
    if not places or (lowest := min(places, key=lambda place: place[1]))[1] == 0:
        return None
    return f"{lowest[0]}{lowest[1] - 1}"


def _place(name: str) -> tuple[str, int] | None:
    found = _BLOCK.match(name)
    return (found[1], int(found[2])) if found else None


@contextmanager
def not_checkpointed(children: Mapping[str, nn.Module], last: str | None) -> Iterator[None]:
    """While open, blocks up to `last` (all of them, where that is no block) are not checkpointed: nothing of them is
    kept anyway, and what a checkpointed block gives out cannot begin to require a gradient."""
    changed: list[nn.Module] = []
    if last is not None:
        row, _, number = last.rpartition(".")
        paths = [f"{row}.{index}" for index in range(int(number) + 1)] if number.isdigit() else list(children)
        changed = [block for path in paths if (block := children.get(path)) is not None and block.training]
    for block in changed:
        # Of the block alone: a checkpointed block is in training mode, and nothing in it is.
        block.training = False
    try:
        yield
    finally:
        for block in changed:
            block.training = True
