"""Attention in blocks of rows is attention, with all its derivatives, and keeps nothing of the size T x T."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from infscan.model.attention_blocks import TwiceDifferentiable

B, H, T, D = 2, 4, 40, 8
# Blocks of 16 rows, the fewest: three of them.
SMALL = 1


def inputs(heads: int = H) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = (B, H, T, D), (B, heads, T, D), (B, heads, T, D)
    q, k, v = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    return q, k, v


def masks() -> dict[str, dict[str, Any]]:
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    apart = causal.clone()
    apart[20:, :20] = False
    bias = torch.linspace(-1, 1, T, dtype=torch.float64).expand(1, H, T, T).masked_fill(~causal, -1e30)
    return {
        "causal": {"is_causal": True},
        "documents": {"attn_mask": apart[None, None]},
        "biased": {"attn_mask": bias, "scale": 0.3},
        "both ways": {},
        "keys": {"attn_mask": torch.ones(B, 1, 1, T, dtype=torch.bool)},
    }


def both(function: Callable[[], Any]) -> tuple[Any, Any]:
    """In plain operations, and in blocks."""
    with sdpa_kernel(SDPBackend.MATH):
        plain = function()
    with TwiceDifferentiable(SMALL):
        return plain, function()


@pytest.mark.parametrize("name", masks())
def test_forward_mode_is_that_of_plain_operations(name: str) -> None:
    q, k, v = inputs()
    direction = torch.randn(3, *q.shape, dtype=torch.float64)

    def attend(*tensors: Tensor) -> Tensor:
        return scaled_dot_product_attention(*tensors, **masks()[name])

    @torch.no_grad()
    def run() -> Tensor:
        return vmap(lambda d: jvp(attend, (q, k, v), (d, d, d))[1])(direction)

    torch.testing.assert_close(*both(run))


@pytest.mark.parametrize("heads", [H, 2])
@pytest.mark.parametrize("name", masks())
def test_first_and_second_derivatives_are_those_of_plain_operations(name: str, heads: int) -> None:
    settings = masks()[name] | {"enable_gqa": heads != H}

    def run() -> list[Tensor]:
        tensors = [tensor.requires_grad_(True) for tensor in inputs(heads)]
        out = scaled_dot_product_attention(*tensors, **settings)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out).requires_grad_(True)
        first = torch.autograd.grad((out * weights).sum(), tensors, create_graph=True)
        second = torch.autograd.grad(sum((one**2).sum() for one in first), [*tensors, weights])
        many = torch.autograd.grad(
            scaled_dot_product_attention(*tensors, **settings), tensors, torch.stack([out, -out]).detach(),
            is_grads_batched=True,
        )  # fmt: skip
        return [out, *first, *second, *many]

    for plain, blocks in zip(*both(run), strict=True):
        torch.testing.assert_close(blocks, plain)


def test_half_precision_is_that_of_float32_rounded() -> None:
    q, k, v = (tensor.bfloat16() for tensor in inputs())
    with TwiceDifferentiable(SMALL):
        found = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert found.dtype is torch.bfloat16
    expected = scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


class Largest(TorchDispatchMode):
    """The most entries that one tensor has."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor):
                self.entries = max(self.entries, each.numel())
        return out


@pytest.mark.parametrize("in_blocks", [True, False])
def test_no_tensor_has_an_entry_for_every_pair(in_blocks: bool) -> None:
    """Not in a second derivative either; in plain operations there is one."""
    tensors = [tensor.requires_grad_(True) for tensor in inputs()]
    with Largest() as seen, TwiceDifferentiable(SMALL) if in_blocks else sdpa_kernel(SDPBackend.MATH):
        out = scaled_dot_product_attention(*tensors, is_causal=True)
        first = torch.autograd.grad(out.sum(), tensors, create_graph=True)
        torch.autograd.grad(sum((one**2).sum() for one in first), tensors)
    assert seen.entries <= B * H * 16 * T if in_blocks else seen.entries == B * H * T * T
