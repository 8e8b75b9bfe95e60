"""How often the host would wait for a GPU, told on a CPU: by the operations that bring something back to it."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
# Kernels that bring a number to the host: a value itself, or the size of what they give.
_WAITING = {
    _ATEN._local_scalar_dense, _ATEN.is_nonzero, _ATEN.equal, _ATEN.nonzero, _ATEN.masked_select, _ATEN.bincount,
    _ATEN._unique2, _ATEN.unique_dim, _ATEN.unique_consecutive, _ATEN.linalg_eigh, _ATEN._linalg_eigh,
}  # fmt: skip
# With a tensor of bools among their indices, these look for what is true first.
_INDEXING = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_}
# What copies to the host, and what makes a tensor by memory that is not pinned: a CPU does it without any kernel.
_COPYING = ((Tensor, "cpu"), (Tensor, "numpy"), (Tensor, "tolist"), (Tensor, "__array__"), (Tensor, "to"))
_MAKING = ((torch, "tensor"), (torch, "as_tensor"))


@dataclass
class Waits:
    """where: of every wait, the operation, and the line of this project's or of a model's code."""

    where: list[str] = field(default_factory=list)

    def add(self, what: object) -> None:
        name = getattr(what, "__name__", str(what))
        ours = [one for one in traceback.extract_stack() if "/torch/" not in one.filename and __file__ != one.filename]
        at = ours[-1] if ours else None
        self.where.append(name if at is None else f"{name} at {Path(at.filename).name}:{at.lineno}")

    def __len__(self) -> int:
        return len(self.where)


class _Kernels(TorchDispatchMode):
    def __init__(self, seen: Waits) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        sized_by_values = packet is _ATEN.repeat_interleave and "output_size" not in (kwargs or {})
        if packet in _WAITING or (packet in _INDEXING and _has_bools(args[1])) or sized_by_values:
            self.seen.add(packet)
        return func(*args, **(kwargs or {}))


def _has_bools(indices: Any) -> bool:
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in indices)


@contextmanager
def counted() -> Iterator[Waits]:
    """Within it, what runs on tensors of a CPU is watched. Code that asks whether it is on a GPU goes a CPU's way."""
    seen = Waits()
    # By their names: torch's mode for functions is not there in hooks of a backward pass.
    with ExitStack() as stack:
        for owner, name in (*_COPYING, *_MAKING):
            stack.enter_context(mock.patch.object(owner, name, _watching(getattr(owner, name), name, seen)))
        stack.enter_context(_Kernels(seen))
        yield seen


def _watching(function: Any, name: str, seen: Waits) -> Any:
    def watched(*args: Any, **kwargs: Any) -> Any:
        if _waits(name, args, kwargs):
            seen.add(name)
        return function(*args, **kwargs)

    return watched


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    if name == "to":
        # To the host by its name: a model's `.to(x.device)` stays where it is.
        return any(isinstance(one, str) and one == "cpu" for one in (*args[1:], *kwargs.values()))
    if name in ("tensor", "as_tensor"):
        return kwargs.get("device") is not None and not isinstance(args[0], Tensor)
    return True
