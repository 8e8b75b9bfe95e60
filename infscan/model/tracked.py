"""Which layers of a module tree take part, by its structure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from infscan.errors import ModelError
from infscan.influence.layers import Layer
from infscan.model.experts import expert_layers, expert_stacks, holds_experts
from infscan.model.family import text_tower
from infscan.model.probe import Ran, runs

_ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|self_attention)([._]|$)")
# Not a block that has attention among its parts.
_ATTENTION_CLASS = re.compile(r"(attention|attn)(?!.*(Layer|Block)$)", re.IGNORECASE)
_ROUTER = re.compile(r"(^|[._])router([._]|$)|(^|\.)(gate|shared_expert_gate)$")
_IN_BLOCK = re.compile(r"\.\d+\.")
# Linear layers that a block applies to one input tensor, by the names that model families give them.
_SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
NAMED = ("mlp", "attention", "linear", "head")


def tracked_layers(module: PreTrainedModel, tracked: str, ran: Ran | None = None) -> tuple[Layer, ...]:
    """The linear layers that take part, in module order.

    `mlp`: linears of the blocks that are not attention, experts included; `attention`: the blocks' attention linears;
    `linear`: both; `head`: the output embeddings; several joined by `+`; anything else is a regular expression searched
    in module paths. Never a router or what is outside of the text tower, unless a regular expression names it.
    ran: what a forward over text runs, where that is known; the others are left out.

    Raises:
        ModelError: where no layer matches, where an expert's tokens cannot be told, or where layers share a weight.
    """
    names = linear_names(module)
    wanted = _wanted(module, tracked)
    if not wanted:
        raise ModelError(
            f"model.tracked={tracked!r} matches no linear layer; the model has "
            f"{', '.join(names[:4])}, ... ({len(names)} in all)."
        )
    used = [name for name in wanted if not _is_idle(name, names, ran)]
    if not used:
        raise ModelError(
            f"model.tracked={tracked!r} matches {wanted[0]} and {len(wanted) - 1} more, none of which the model runs "
            "on text; give another regular expression."
        )
    _refuse_shared_weights(module, used)
    return _layers(module, used, ran)


def left_out(module: PreTrainedModel, tracked: str, ran: Ran | None) -> tuple[str, ...]:
    """The linears that `tracked` means and the model does not run as modules on text."""
    names = linear_names(module)
    return tuple(name for name in _wanted(module, tracked) if _is_idle(name, names, ran))


def tied_head(module: PreTrainedModel) -> str | None:
    """The path of the output embeddings where their weight is the input's."""
    head = module.get_output_embeddings()
    if head is None or head.weight is not module.get_input_embeddings().weight:
        return None
    return head_path(module)


def head_path(module: PreTrainedModel) -> str | None:
    """The path of the output embeddings, where the model has them as a module."""
    head = module.get_output_embeddings()
    return next((name for name, child in module.named_modules() if child is head), None) if head else None


def by_block(layers: Sequence[Layer]) -> list[str]:
    """A line for every place that layers have in their blocks: where, how many, and of what shapes."""
    places: dict[tuple[str, int, int], int] = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer.name), layer.outputs, layer.inputs) for layer in layers
    )
    return [f"{name}: {count} of {outputs} x {inputs}" for (name, outputs, inputs), count in places.items()]


def linear_names(module: nn.Module) -> list[str]:
    """The paths of all linear modules, in module order."""
    return [name for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)]


def _is_idle(name: str, linears: Collection[str], ran: Ran | None) -> bool:
    return name in linears and not runs(ran, name)


def _wanted(module: PreTrainedModel, tracked: str) -> list[str]:
    """The linears and stacks of experts that are meant."""
    choices = tracked.split("+")
    if not all(choice in NAMED for choice in choices):
        return [name for name in [*linear_names(module), *expert_stacks(module)] if re.search(tracked, name)]
    kinds = block_kinds(module)
    wanted = {kind for choice in choices for kind in (("mlp", "attention") if choice == "linear" else (choice,))}
    _refuse_unknown_experts(module, kinds, wanted)
    return [name for name, kind in kinds.items() if kind in wanted]


def block_kinds(module: PreTrainedModel) -> dict[str, str]:
    """What every linear and every stack of experts of the text tower is: `mlp`, `attention` or `head`.

    Routers, and linears outside of numbered blocks, have no kind.
    """
    tower, head = text_tower(module), module.get_output_embeddings()
    modules = dict(module.named_modules())
    stacks = expert_stacks(module)
    names = [name for name, child in modules.items() if isinstance(child, nn.Linear | Conv1D)]
    found = {}
    for name in [*names, *stacks]:
        if modules.get(name) is head and head is not None:
            found[name] = "head"
        elif name.startswith(tower) and _IN_BLOCK.search(name) and not _ROUTER.search(name):
            found[name] = "attention" if is_attention(name, modules) else "mlp"
    return found


def is_attention(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a path leads through attention: by its names, or by the class of a module inside the innermost block."""
    if _ATTENTION.search(name):
        return True
    parts = name.split(".")
    block = max(index for index, part in enumerate(parts) if part.isdigit()) if "." in name else 0
    inside = [".".join(parts[:end]) for end in range(block + 2, len(parts))]
    return any(_ATTENTION_CLASS.search(type(modules[path]).__name__) for path in inside if path in modules)


def _layers(module: PreTrainedModel, used: Collection[str], ran: Ran | None) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    stacks = [stack for stack in expert_stacks(module) if stack in used]
    for name, child in module.named_modules():
        if name in used:
            O, I = _shape(child)
            bias = child.bias is not None
            layers.append(Layer(name, O, I + bias, bias, _input_of(name, bias, layers, ran)))
        for stack in stacks:
            if stack.rpartition(".")[0] == name:
                layers += expert_layers(child, stack)
    return tuple(layers)


def _shape(linear: nn.Module) -> tuple[int, int]:
    weight: Any = linear.weight
    # DeepSpeed leaves a partitioned parameter empty and keeps its shape beside it.
    first, second = getattr(weight, "ds_shape", weight.shape)
    return (second, first) if isinstance(linear, Conv1D) else (first, second)


def _input_of(name: str, bias: bool, before: list[Layer], ran: Ran | None) -> str:
    """The first tracked layer with the same input: a sibling that the model's family feeds the same tensor."""
    parent, _, leaf = name.rpartition(".")
    siblings = next((group for group in _SHARED_INPUTS if leaf in group), ())
    for layer in before:
        sibling_parent, _, sibling = layer.name.rpartition(".")
        alike = sibling_parent == parent and sibling in siblings and layer.bias == bias
        if alike and (ran is None or ran.inputs[layer.input_of] == ran.inputs[name]):
            return layer.input_of
    return name


def _refuse_shared_weights(module: nn.Module, used: Collection[str]) -> None:
    """A weight that several tracked layers have is one parameter, whose gradient is the sum over all of them."""
    first: dict[int, str] = {}
    for name, child in module.named_modules():
        if name in used and first.setdefault(id(child.weight), name) != name:
            raise ModelError(
                f"{name} and {first[id(child.weight)]} are one weight, used in several blocks, and tracking each by "
                "itself would be wrong; leave them out with model.tracked=<regex>."
            )


def _refuse_unknown_experts(module: PreTrainedModel, kinds: Mapping[str, str], wanted: Collection[str]) -> None:
    """Experts in layouts that are not known: their inputs and gradients are not seen per expert."""
    tower = text_tower(module)
    for path, owner in module.named_modules():
        if not path.startswith(tower) or isinstance(owner, nn.Linear | Conv1D) or holds_experts(owner):
            continue
        if "expert" not in f"{path} {type(owner).__name__}".lower():
            continue
        kind = "attention" if _ATTENTION.search(path) else "mlp"
        if kind in wanted and any(parameter.dim() >= 2 for parameter in owner.parameters(recurse=False)):
            other = "<regex>" if kind == "attention" else "attention or a regex"
            raise ModelError(
                f"{path} ({type(owner).__name__}) holds its experts in a layout that infscan does not run expert by "
                f"expert; leave the mixture out with model.tracked={other}."
            )
