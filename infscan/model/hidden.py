"""Hidden states of a middle block, by a forward alone."""

from __future__ import annotations

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
    """What the middle block gives out, [B, T, d], in the model's dtype. The head is not run.

    ids_bt, position_ids_bt: as `infscan.model.attention.document_logits` takes them.
    """
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        found.append(out if isinstance(out, Tensor) else out[0])

    block = _blocks(model.module)[middle_block(model.module) - 1]
    handle = block.register_forward_hook(keep)
    try:
        with instead_of_head(model.module, lambda h_btn, _head: h_btn[..., :1]):
            document_logits(model.module, ids_bt, position_ids_bt)
    finally:
        handle.remove()
    return found[0].reshape(*ids_bt.shape, -1)
