"""Attention whose derivatives need no T x T matrix: some rows of queries at a time, made again where they are needed.

PyTorch's fused kernels have neither a forward-mode derivative nor a second one; its plain operations have both, and
keep the attention weights of all pairs of positions, for every head. Here a block of rows c x T exists at a time: in a
forward-mode pass (nothing is kept), in a backward, and in the backward of a backward (made again from q, k and v, as in
Chen et al. 2016 and Dao et al. 2022, arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

# Attention weights of a block: 64 MiB in float32. What has fewer is one block, and is left to plain operations.
BLOCK = 1 << 24


class TwiceDifferentiable(TorchFunctionMode):
    """While open, scaled dot-product attention has every derivative: in plain operations, or in blocks of rows.

    block: attention weights that may exist at once, over sequences and heads.
    """

    def __init__(self, block: int | None = None) -> None:
        super().__init__()
        self.block = block or BLOCK
        self._open = ExitStack()

    def __enter__(self) -> TwiceDifferentiable:
        self._open.enter_context(sdpa_kernel(SDPBackend.MATH))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        return _attention(self.block, func, *args, **kwargs)


def _attention(
    block: int,
    plain: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """[..., T, D] from q [..., T, D], k and v [..., S, D]."""
    T, S = query.shape[-2], key.shape[-2]
    rows = max(16, block // (query[..., 0, 0].numel() * S))
    if rows >= T:
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        shared = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    parts = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        # Of a causal block, the keys that one of its rows sees.
        seen = min(stop, S) if is_causal else S
        mask: Tensor | None
        if is_causal:
            mask = torch.ones(stop - start, seen, dtype=torch.bool, device=query.device).tril(start)
        else:
            mask = attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask[..., start:stop, :]
        inputs = query[..., start:stop, :], key[..., :seen, :], value[..., :seen, :]
        run = _Rows.apply if torch.is_grad_enabled() else _rows
        parts.append(run(*inputs, mask, scale))
    return torch.cat(parts, dim=-2)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T + mask), [..., c, S], float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * scale
    if mask is not None:
        # The smallest number and not -inf: a row that sees nothing, which counts nowhere, stays finite.
        is_bool = mask.dtype is torch.bool
        scores = scores.masked_fill(~mask, torch.finfo(wide).min) if is_bool else scores + mask.to(wide)
    return torch.softmax(scores, dim=-1)


def _rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    w = _weights(q, k, mask, scale)
    return (w @ v.to(w.dtype)).to(q.dtype)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of <g, rows> with respect to q, k and v."""
    w = _weights(q, k, mask, scale)
    q_w, k_w, v_w, g_w = (x.to(w.dtype) for x in (q, k, v, g))
    by_w = g_w @ v_w.transpose(-2, -1)
    by_score = w * (by_w - (w * by_w).sum(dim=-1, keepdim=True)) * scale
    found = by_score @ k_w, by_score.transpose(-2, -1) @ q_w, w.transpose(-2, -1) @ g_w
    return found[0].to(q.dtype), found[1].to(k.dtype), found[2].to(v.dtype)


class _Rows(torch.autograd.Function):
    """`_rows`, of which q, k and v are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return _rows(q, k, v, mask, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, mask = ctx.saved_tensors
        # Only a recorded backward needs a derivative of its own; several gradients at once go through plain operations.
        run = _RowsBackward.apply if torch.is_grad_enabled() else _gradients
        return *run(q, k, v, gradients[0], mask, ctx.scale), None, None


class _RowsBackward(torch.autograd.Function):
    """`_gradients`, of which its inputs are kept."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, g, mask)
        ctx.scale = scale
        return _gradients(q, k, v, g, mask, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None, None]:
        *inputs, mask = ctx.saved_tensors
        with torch.enable_grad():
            q, k, v, g = (x.detach().requires_grad_(True) for x in inputs)
            found = _gradients(q, k, v, g, mask, ctx.scale)
            by_q, by_k, by_v, by_g = torch.autograd.grad(found, (q, k, v, g), gradients)
            return by_q, by_k, by_v, by_g, None, None
