"""Mixtures of experts: every expert is a layer of its own, which sees the tokens that are routed to it.

transformers keeps a mixture's experts stacked in one parameter for each of their linear maps. A loaded model's stacks
are run expert by expert here, over tokens sorted by expert, so that no token is computed or kept for an expert that it
did not go to; and whoever listens (`listening`) is handed a stack's inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from infscan.influence.layers import Layer


@dataclass(frozen=True)
class Stacked:
    """One linear map of all experts, as it is run: inputs [S, I] and outputs [S, O] of routed tokens, sorted by expert.

    tokens_s: int64 [S], the token's place in the flattened micro-batch, ascending for each expert. bounds: where each
    expert's tokens begin, and the last one's end.
    """

    a_si: Tensor
    out_so: Tensor
    tokens_s: Tensor
    bounds: tuple[int, ...]


# Given a stack's path and what it computed; what it returns, if anything, takes the place of the outputs.
Listener = Callable[[str, Stacked], Tensor | None]


def holds_experts(module: nn.Module) -> bool:
    """Whether a module's parameters are experts in a layout that is run expert by expert."""
    # Those of transformers' own common layout say so.
    return isinstance(module, Llama4TextExperts | LongcatFlashExperts) or hasattr(module, "_is_expert_parallel")


def _maps(module: Any) -> tuple[str, str]:
    """The parameters of an expert's two linear maps."""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")


def is_transposed(module: Any) -> bool:
    """Whether a stack is [E, I, O], and not [E, O, I]."""
    return isinstance(module, Llama4TextExperts) or getattr(module, "is_transposed", False)


def _has_bias(module: Any) -> bool:
    return getattr(module, "has_bias", False)


def expert_stacks(module: nn.Module) -> dict[str, nn.Module]:
    """The experts' module by the path of each of its stacks, in module order."""
    return {
        f"{path}.{name}": child
        for path, child in module.named_modules()
        if holds_experts(child)
        for name in _maps(child)
    }


def expert_layers(module: Any, stack: str) -> list[Layer]:
    """A stack's experts: `<stack>.<number>`, each with inputs of its own."""
    weight = getattr(module, stack.rpartition(".")[2])
    E = _experts(module)
    _, first, second = getattr(weight, "ds_shape", weight.shape)
    O, I = (second, first) if is_transposed(module) else (first, second)
    bias = _has_bias(module)
    names = [f"{stack}.{number}" for number in range(E)]
    share = _routed_share(module, E)
    return [Layer(name, O, I + bias, bias, name, stack, share) for name in names]


def _routed_share(module: Any, E: int) -> float:
    """The part of all tokens that an expert sees where all are used alike."""
    config = getattr(module, "config", None)
    names = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_k", "num_experts_per_token")
    found = (getattr(config, name, None) for name in names)
    return min(1.0, next((value for value in found if isinstance(value, int)), 1) / E)


def run_by_expert(module: PreTrainedModel) -> None:
    """Have a model's experts run expert by expert, whatever way transformers would choose."""
    for path, child in module.named_modules():
        if holds_experts(child):
            forward = next((run for kind, run in _OTHERS.items() if isinstance(child, kind)), _run_experts)
            child.forward = MethodType(forward, child)
            child.__dict__["_stacks"] = tuple(f"{path}.{name}" for name in _maps(child))


@contextmanager
def listening(module: nn.Module, listener: Listener) -> Iterator[None]:
    """While open, every stack that is run is announced."""
    holders = [child for child in module.modules() if holds_experts(child)]
    for child in holders:
        child.__dict__["_listener"] = listener
    try:
        yield
    finally:
        for child in holders:
            child.__dict__.pop("_listener", None)


def _run_experts(self: Any, hidden_mh: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers' own forward gives: sum over a token's experts of weight * down(gate(up(h))), [M, H]."""
    order_s, bounds = _by_expert(top_k_index.reshape(-1), _experts(self))
    tokens_s = order_s // top_k_index.shape[-1]
    inner_si = _stack(self, 0, hidden_mh[tokens_s], tokens_s, bounds)
    if hasattr(self, "_apply_gate") and getattr(self, "has_gate", False):
        inner_si = self._apply_gate(inner_si)
    elif getattr(self, "has_gate", True):
        gate_si, up_si = inner_si.chunk(2, dim=-1)
        inner_si = self.act_fn(gate_si) * up_si
    else:
        inner_si = self.act_fn(inner_si)
    out_sh = _stack(self, 1, inner_si, tokens_s, bounds)
    if getattr(self, "has_post_expert_norm", False):
        out_sh = self.post_expert_norm(out_sh)
    out_sh = out_sh * top_k_weights.reshape(-1)[order_s].unsqueeze(-1)
    return torch.zeros_like(hidden_mh).index_add(0, tokens_s, out_sh.to(hidden_mh.dtype))


def _run_longcat(self: Any, hidden_mh: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """LongCat's: experts from a number on give back what they get."""
    identity_m = top_k_weights.masked_fill(top_k_index < _experts(self), 0).sum(dim=-1, keepdim=True)
    return _run_experts(self, hidden_mh, top_k_index, top_k_weights) + identity_m.to(hidden_mh.dtype) * hidden_mh


def _run_llama4(self: Any, routed_xh: Tensor) -> Tensor:
    """Llama 4's: inputs [E * M, H], scaled by the router and zero for experts that a token does not go to."""
    E = _experts(self)
    M = len(routed_xh) // E
    if routed_xh.device.type == "meta":
        at_s, bounds = torch.arange(M, device="meta"), _even(M, E)
    else:
        at_s = routed_xh.detach().ne(0).any(dim=-1).nonzero().squeeze(-1)
        counts = torch.bincount(at_s // M, minlength=E).tolist()
        bounds = _cumulated(counts)
    tokens_s = at_s % M
    gate_si, up_si = _stack(self, 0, routed_xh[at_s], tokens_s, bounds).chunk(2, dim=-1)
    out_sh = _stack(self, 1, up_si * self.act_fn(gate_si), tokens_s, bounds)
    return torch.zeros_like(routed_xh).index_copy(0, at_s, out_sh)


def _experts(self: Any) -> int:
    """E; of LongCat's gate and up more are stored than are used."""
    weight = getattr(self, _maps(self)[1])
    return int(getattr(weight, "ds_shape", weight.shape)[0])


# Layouts that are not transformers' common one.
_OTHERS: dict[type[nn.Module], Callable[..., Tensor]] = {
    Llama4TextExperts: _run_llama4,
    LongcatFlashExperts: _run_longcat,
}


def _by_expert(index_x: Tensor, E: int) -> tuple[Tensor, tuple[int, ...]]:
    """The choices sorted by expert (stable, so that tokens ascend), and every expert's bounds; numbers from E on are of
    no expert and are left out."""
    if index_x.device.type == "meta":
        # Shapes alone: as if all experts were chosen alike.
        return torch.arange(len(index_x), device="meta"), _even(len(index_x), E)
    order_x = torch.argsort(index_x, stable=True)
    bounds = _cumulated(torch.bincount(index_x.clamp(max=E), minlength=E + 1)[:E].tolist())
    return order_x[: bounds[-1]], bounds


def _even(count: int, E: int) -> tuple[int, ...]:
    return tuple(count * number // E for number in range(E + 1))


def _cumulated(counts: Sequence[int]) -> tuple[int, ...]:
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return tuple(bounds)


def _stack(self: Any, which: int, a_si: Tensor, tokens_s: Tensor, bounds: tuple[int, ...]) -> Tensor:
    """One linear map of every expert over its own tokens, announced to whoever listens: [S, O]."""
    name = _maps(self)[which]
    weight, transposed = getattr(self, name), is_transposed(self)
    bias = getattr(self, f"{name}_bias") if _has_bias(self) else None
    # A pass without a backward keeps nothing, and forward-mode differentiation goes through plain operations.
    if hasattr(weight, "ds_id") and torch.is_grad_enabled():
        out_so = _Gathered.apply(a_si, weight, bias, bounds, transposed)
    else:
        out_so = _linear(a_si, weight, bias, bounds, transposed)
    listener: Listener | None = self.__dict__.get("_listener")
    if listener is None:
        return out_so
    instead = listener(self._stacks[which], Stacked(a_si, out_so, tokens_s, bounds))
    return out_so if instead is None else instead


def _linear(a_si: Tensor, weight: Tensor, bias: Tensor | None, bounds: tuple[int, ...], transposed: bool) -> Tensor:
    """W_e a (+ b_e) for every expert's tokens; `transposed`: the stack is [E, I, O]."""
    parts = []
    for expert, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        W_io = weight[expert] if transposed else weight[expert].T
        out_mo = a_si[start:stop] @ W_io
        parts.append(out_mo if bias is None else out_mo + bias[expert])
    if not parts:
        return a_si.new_zeros(0, weight.shape[2 if transposed else 1])
    return torch.cat(parts)


class _Gathered(torch.autograd.Function):
    """`_linear` with a weight that DeepSpeed gathers for a forward, and again for its backward.

    Autograd would keep what was gathered until then; here the parameter is looked at anew.
    """

    @staticmethod
    def forward(
        ctx: Any, a_si: Tensor, weight: Tensor, bias: Tensor | None, bounds: tuple[int, ...], transposed: bool
    ) -> Tensor:
        ctx.weight, ctx.bounds, ctx.transposed = weight, bounds, transposed
        return _linear(a_si, weight.detach(), None if bias is None else bias.detach(), bounds, transposed)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _linear(gradients[0], ctx.weight.detach(), None, ctx.bounds, not ctx.transposed), None, None, None, None
