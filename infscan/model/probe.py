"""One tiny forward and backward: which layers a model really runs, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from infscan.errors import ModelError
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.model.attention import document_logits
from infscan.model.capture import backward, capturing

# Sequences and tokens that a model is tried on: two different numbers, so that their axes are told apart.
_TRIED = (2, 3)


@dataclass(frozen=True)
class Ran:
    """What a forward over text ran: how often each module, and which memory it was last given."""

    times: Counter[str]
    inputs: Mapping[str, int]


class _Shapes(TorchDispatchMode):
    """Answers a family's code that asks for a value, where there are shapes alone: it asks whether masks are true."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True
        return func(*args, **(kwargs or {}))


def run_on_shapes(module: PreTrainedModel, names: Sequence[str]) -> Ran | None:
    """A forward of a model on the meta device, watching these modules; None where the family's code needs values."""
    times: Counter[str] = Counter()
    given: dict[str, Tensor] = {}
    children = dict(module.named_modules())

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], _out: object) -> None:
            times[name] += 1
            if args:
                given[name] = args[0]

        return children[name].register_forward_hook(hook)

    handles = [watch(name) for name in dict.fromkeys(names)]
    try:
        with torch.no_grad(), torch.device("meta"), _Shapes():
            document_logits(module.eval(), _ids(module, "meta"))
    except Exception:  # a family's own code may do what it likes
        return None
    finally:
        for handle in handles:
            handle.remove()
    return Ran(times, {name: tensor.untyped_storage()._cdata for name, tensor in given.items()})


def runs(ran: Ran | None, name: str) -> bool:
    """Whether a module runs, as far as is known."""
    return ran is None or ran.times[name] > 0


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
