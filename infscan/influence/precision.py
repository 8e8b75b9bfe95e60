"""How a GPU multiplies: float32 exactly or in TF32, bfloat16 into float32 sums; a CPU multiplies as it always does.

TF32 keeps 10 bits of every operand's fraction (float32 has 23, bfloat16 7), multiplies these exactly and adds in
float32: a product's relative error is at most 2^-10, and on tensor cores it takes an eighth of the time. A bfloat16
operand loses nothing by it. torch's default keeps float32 exact, and allows bfloat16 products whose inner dimension is
split to add the parts in bfloat16, which is never wanted here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Multiply = Literal["exact", "tf32"]
_SWITCHES = (
    "allow_tf32",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
)


@contextmanager
def multiplying(matmul: Multiply) -> Iterator[None]:
    """Within it, float32 products on a GPU are exact or in TF32, and sums of bfloat16 and float16 products are never
    rounded in between. What was set before is set again afterwards, whatever happens within. A step's function has it
    as a decorator."""
    # The older of torch's two ways to say it: every version has it, and reading it after the newer one is an error.
    cuda = torch.backends.cuda.matmul
    before = [getattr(cuda, switch) for switch in _SWITCHES]
    for switch, value in zip(_SWITCHES, (matmul == "tf32", False, False), strict=True):
        setattr(cuda, switch, value)
    try:
        yield
    finally:
        for switch, value in zip(_SWITCHES, before, strict=True):
            setattr(cuda, switch, value)


def operand(x: Tensor, total: Tensor) -> Tensor:
    """x as `add_product` takes it: as it is where the device multiplies it into total's dtype, else in that dtype."""
    return x if _widened(x, total.dtype) else x.to(total.dtype)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in total's dtype. left, right: of `operand`.

    Products of bfloat16 are exact in float32: nothing is lost against casting the operands first.
    """
    if left.dtype is total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)


def batched_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right, matrix by matrix, [p, q, c] in `dtype`: summed in it where the device can, else cast to it."""
    if _widened(left, dtype):
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left, right).to(dtype)


def _widened(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the device multiplies x into sums of this wider dtype."""
    return x.is_cuda and x.dtype is torch.bfloat16 and dtype is torch.float32 and _widens()


@cache
def _widens() -> bool:
    """Whether torch has `mm(..., out_dtype=)` (2.8 and later)."""
    return any("dtype" in name for name in torch.ops.aten.mm.overloads())
