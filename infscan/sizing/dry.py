"""Running torch code on shapes alone: the bytes that would be live at once, and the multiply-adds that would be done.

Tensors are on the device `meta`, so nothing is allocated and nothing computed; every operation is seen as it is
dispatched. What kernels allocate within themselves is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu


class Dry(TorchDispatchMode):
    """What ran within `dry()`.

    live, peak: bytes of tensors made there that are, or at most were, alive at once. flop: floating-point operations
    of matrix products and attention, a multiply-add as two; attention is counted whole, as if it were not causal. own:
    of them, what was done within `owned`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flop = self.own = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default:
            # Models ask whether masks are all true, to leave them out.
            return True
        # What comes in and was not made here (weights, queries) is no part of what is counted.
        self._known.update(_key(tensor) for tensor in _tensors((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        self.flop += _flop(func, args, out)
        for tensor in _tensors(out):
            self._made(tensor)
        return out

    @contextmanager
    def owned(self) -> Iterator[None]:
        """What is done within is a pass's own, beside the model's forward and backward."""
        before = self.flop
        yield
        self.own += self.flop - before

    def _made(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class _Flash(TorchFunctionMode):
    """Attention by a fused kernel, as on a CPU or GPU; on `meta` torch would choose the one that keeps [T, T]."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **given)
        q, k, v = args[:3]
        if given.get("enable_gqa"):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        fused: Callable[..., tuple[Tensor, Tensor]] = _ATTENTION
        return fused(
            q, k, v, 0.0, given.get("is_causal", False), attn_mask=given.get("attn_mask"), scale=given.get("scale")
        )[0]


@contextmanager
def dry() -> Iterator[Dry]:
    """Within it, torch code on meta tensors is weighed and counted."""
    seen = Dry()
    with torch.device("meta"), _Flash(), seen:
        yield seen


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _flop(func: Any, args: Any, out: Any) -> int:
    packet = func.overloadpacket
    if packet is _ATTENTION:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if packet is _ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    name = packet.__name__
    # In place or not, the product is the same.
    counted = flop_registry.get(getattr(_ATEN, name.removesuffix("_"), packet)) if name != "_" else None
    return int(counted(*args, out_val=out)) if counted else 0
