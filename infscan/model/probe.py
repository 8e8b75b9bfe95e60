"""One tiny forward and backward: which layers a model really runs, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from infscan.errors import ModelError
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.model.attention import document_logits
from infscan.model.capture import backward, capturing

# Sequences and tokens that a model is tried on: two different numbers, so that their axes are told apart.
_TRIED = (2, 3)


def uses(module: PreTrainedModel, names: Sequence[str], device: str) -> Counter[str]:
    """How often each of these modules runs in a forward over text; of the device `meta`, on shapes alone."""
    counted: Counter[str] = Counter()
    children = dict(module.named_modules())

    def count(name: str) -> object:
        def hook(_module: nn.Module, _args: object, _out: object) -> None:
            counted[name] += 1

        return children[name].register_forward_hook(hook)

    handles = [count(name) for name in names]
    try:
        with torch.no_grad():
            document_logits(module, _ids(module, device))
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    return counted


def check_tracked(module: PreTrainedModel, layers: Sequence[Layer], device: str) -> None:
    """Hold every tracked layer to being seen exactly once in a forward and backward. All ranks of a group ask together.

    Raises:
        ModelError: naming a layer that is not.
    """
    seen: Counter[str] = Counter()

    def consume(layer: Layer, _a: Tensor, _s: Tensor, _routed: Routed | None) -> None:
        seen[layer.name] += 1

    with capturing(module, layers, consume), torch.enable_grad():
        backward(document_logits(module, _ids(module, device)).sum())
    # An expert that none of a few tokens goes to is no fault.
    odd = [layer.name for layer in layers if seen[layer.name] > 1 or not (seen[layer.name] or layer.stack)]
    if odd:
        raise ModelError(
            f"{odd[0]} is seen {seen[odd[0]]} times in one forward and backward, and a tracked layer is to be seen "
            f"once ({len(odd)} of {len(layers)} are not); leave it out with model.tracked=<regex>."
        )


def _ids(module: PreTrainedModel, device: str) -> Tensor:
    B, T = _TRIED
    return (torch.arange(1, B * T + 1, device=device) % module.get_input_embeddings().num_embeddings).view(B, T)
