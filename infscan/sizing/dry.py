"""Running torch code on shapes alone: the bytes that would be live at once, and the multiply-adds that would be done.

Tensors are on the device `meta`, so nothing is allocated and nothing computed; every operation is seen as it is
dispatched. What kernels allocate within themselves is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_ATEN = torch.ops.aten
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu
_EMPTY, _META = _ATEN.empty_strided.default, torch.device("meta")


class Dry(TorchDispatchMode):
    """What ran within `dry()`.

    live, peak: bytes of tensors made there that are, or at most were, alive at once. flop: floating-point operations
    of matrix products and attention, a multiply-add as two; attention is counted whole, as if it were not causal. own:
    of them, what was done within `owned`.
    """

    def __init__(self, results: Results | None = None) -> None:
        super().__init__()
        self.live = self.peak = self.flop = self.own = 0
        self._known: set[int] = set()
        self._results: Results = {} if results is None else results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default:
            # Models ask whether masks are all true, to leave them out.
            return True
        # What comes in and was not made here (weights, queries) is no part of what is counted.
        kwargs = kwargs or {}
        given: list[Tensor] = []
        key = (func, _described(args, given), _described(kwargs, given) if kwargs else None)
        self._known.update(map(_key, given))
        before = self._results.get(key)
        if before is not None:
            out: Any = args[0] if before.in_place else before.again()
            self.flop += before.flop
        else:
            out = func(*args, **kwargs)
            flop = _flop(func, args, out)
            self.flop += flop
            if key not in self._results:
                after = (func, _described(args, []), _described(kwargs, []) if kwargs else None)
                plain = key == after and all(one.is_meta for one in given)
                in_place = plain and func._schema.is_mutable and bool(args) and out is args[0]
                self._results[key] = Result((), False, flop, True) if in_place else Result.of(func, given, out, flop)
        if isinstance(out, Tensor):
            self._made(out)
        else:
            for tensor in _tensors(out):
                self._made(tensor)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled within: torch need not load its compiler to keep out of this, for every operation."""
        return False

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


# What operations made of such arguments, by both; None for one that is asked anew each time. Blocks and passes are
# alike, and torch's Python takes long to find the shapes of a result.
Results = dict[Hashable, "Result | None"]


@contextmanager
def dry(results: Results | None = None) -> Iterator[Dry]:
    """Within it, torch code on meta tensors is weighed and counted. results: of earlier runs, and then of this one."""
    seen = Dry(results)
    with torch.device("meta"), _Flash(), seen:
        yield seen


@dataclass(frozen=True)
class Result:
    """An operation's new tensors, by (shape, strides, dtype), and its floating-point operations. alone: one tensor, not
    a tuple. in_place: none, but its first argument, changed."""

    tensors: tuple[tuple[Any, ...], ...]
    alone: bool
    flop: int
    in_place: bool = False

    @staticmethod
    def of(func: Any, given: Sequence[Tensor], out: Any, flop: int) -> Result | None:
        """None for what cannot be made again by its description: views, what is changed in place, what has content."""
        made = (out,) if isinstance(out, Tensor) else out
        plain = isinstance(made, tuple) and made and all(isinstance(one, Tensor) and one.is_meta for one in made)
        if not plain or func._schema.is_mutable or any(one.alias_info for one in func._schema.returns):
            return None
        found = Result(tuple((one.shape, one.stride(), one.dtype) for one in made), isinstance(out, Tensor), flop)
        keys = [_key(one) for one in made]
        apart = len({*keys, *map(_key, given)}) == len(keys) + len({*map(_key, given)})
        again = (found.again(),) if found.alone else found.again()
        same = all(
            a.untyped_storage().nbytes() == b.untyped_storage().nbytes() for a, b in zip(again, made, strict=True)
        )
        return found if apart and same else None

    def again(self) -> Any:
        made = tuple(_EMPTY(shape, strides, dtype=dtype, device=_META) for shape, strides, dtype in self.tensors)
        return made[0] if self.alone else made


def _described(tree: Any, tensors: list[Tensor]) -> Hashable:
    """Arguments by their kinds and shapes; their tensors are added to `tensors`."""
    if isinstance(tree, Tensor):
        tensors.append(tree)
        return tree.device, tree.dtype, tree.shape, tree.stride()
    if isinstance(tree, list | tuple):
        return tuple([_described(one, tensors) for one in tree])
    if isinstance(tree, dict):
        return tuple([(key, _described(one, tensors)) for key, one in tree.items()])
    return type(tree), tree


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for one in tree:
            yield from _tensors(one)
    elif isinstance(tree, dict):
        yield from _tensors(tuple(tree.values()))


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
