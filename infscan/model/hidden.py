"""Hidden states of a middle block, by a forward alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infscan.model.attention import document_logits
from infscan.model.family import text_tower
from infscan.model.gathered import blocks
from infscan.model.loaded import LoadedModel
from infscan.model.losses import instead_of_head

# Of a model's blocks, those below which most of what a text says has been read and the next token is not yet all.
_DEPTH = 2 / 3


def middle_block(module: PreTrainedModel) -> int:
    """The number of the block whose output is taken, from 1; 0 where the model has none that transformers calls so."""
    return round(_DEPTH * len(_blocks(module)))


def _blocks(module: PreTrainedModel) -> list[nn.Module]:
    tower = text_tower(module).rstrip(".")
    return blocks(module.get_submodule(tower))


@torch.no_grad()
def hidden_states(model: LoadedModel, ids_bt: Tensor, position_ids_bt: Tensor | None = None) -> Tensor:
    """What the middle block gives out, [B, T, d], in the model's dtype. Neither the head nor the blocks above it run:
    they pass on what it gave. Of a model in shards they run, since ranks gather them in an order that is foreseen.

    ids_bt, position_ids_bt: as `infscan.model.attention.document_logits` takes them.
    """
    given: list[Tensor | tuple[Tensor, ...]] = []

    def keep(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        given.append(out)

    number, found_blocks = middle_block(model.module), _blocks(model.module)
    above = [] if model.shard_parameters < model.parameters else found_blocks[number:]
    handle = found_blocks[number - 1].register_forward_hook(keep)
    try:
        with ExitStack() as stack:
            stack.enter_context(instead_of_head(model.module, lambda h_btn, _head: h_btn[..., :1]))
            for block in above:
                stack.enter_context(_passed_by(block, given))
            document_logits(model.module, ids_bt, position_ids_bt)
    finally:
        handle.remove()
    out = given[0]
    return (out if isinstance(out, Tensor) else out[0]).reshape(*ids_bt.shape, -1)


@contextmanager
def _passed_by(block: nn.Module, given: Sequence[Any]) -> Iterator[None]:
    """While open, the block gives out the first of `given`; itself, where there is none yet."""
    before, own = block.__dict__.get("forward"), block.forward
    block.forward = lambda *args, **kwargs: given[0] if given else own(*args, **kwargs)
    try:
        yield
    finally:
        if before is None:
            del block.forward
        else:
            block.forward = before
