"""The modes of a GPU's products are set where they are asked for and put back; a CPU's products do not know of them."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from infscan.influence.blocks import BlockDiagonal
from infscan.influence.eigenbasis import add_squared_gradients
from infscan.influence.precision import Multiply, add_product, multiplying, operand
from infscan.influence.score import score_tokens
from tests.gpu.kit.agreement import TF32, relative

CUDA = torch.backends.cuda.matmul


def modes() -> tuple[bool, bool, bool]:
    return (
        CUDA.allow_tf32,
        CUDA.allow_bf16_reduced_precision_reduction,
        CUDA.allow_fp16_reduced_precision_reduction,
    )


@given(st.lists(st.sampled_from(["exact", "tf32"]), max_size=4), st.booleans())
def test_modes_are_set_within_and_put_back_after(nested: list[Multiply], breaks: bool) -> None:
    before = modes()
    with contextlib.suppress(ZeroDivisionError), contextlib.ExitStack() as stack:
        for matmul in nested:
            stack.enter_context(multiplying(matmul))
            assert modes() == (matmul == "tf32", False, False)
        if breaks:
            raise ZeroDivisionError
    assert modes() == before


def test_a_decorated_function_has_its_mode_in_every_call() -> None:
    seen = multiplying("tf32")(modes)
    assert [seen(), modes()[0], seen()] == [(True, False, False), False, (True, False, False)]


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_a_cpus_sum_is_the_casts_to_the_last_bit(dtype: torch.dtype, wide: torch.dtype) -> None:
    x_mn = torch.randn(50, 7).to(dtype)
    total = torch.randn(7, 7, dtype=wide)
    known = total.addmm(x_mn.T.to(wide), x_mn.to(wide))
    add_product(total, operand(x_mn, total).T, operand(x_mn, total))
    assert torch.equal(total, known)


def rounded(x: Tensor) -> Tensor:
    """float32 with the ten bits of a fraction that TF32 keeps, to nearest."""
    return ((x.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def test_ten_bits_are_within_the_limits_that_the_kit_holds_a_gpu_to() -> None:
    made = torch.Generator().manual_seed(0)
    s_bto, a_bti = (torch.randn(4, 200, n, generator=made) for n in (96, 160))
    P_oi = torch.randn(96, 160, generator=made)
    # Its own product and sum are float32's: what is rounded is what goes into products.
    low = ((rounded(s_bto) @ rounded(P_oi)) * a_bti).sum(dim=-1)
    assert 1e-5 < relative(low, score_tokens(s_bto.double(), a_bti.double(), P_oi.double())) < TF32
    Q_S, Q_A = (torch.linalg.qr(torch.randn(n, n, generator=made))[0] for n in (96, 160))
    known = squares(s_bto.double(), a_bti.double(), Q_S.double(), Q_A.double())
    turned = (rounded(rounded(x) @ rounded(Q)) for x, Q in ((s_bto, Q_S), (a_bti, Q_A)))
    low = squares(*turned, torch.eye(96), torch.eye(160))
    assert 1e-5 < relative(low, known) < TF32


def squares(s_bto: Tensor, a_bti: Tensor, Q_S: Tensor, Q_A: Tensor) -> Tensor:
    total = torch.zeros(s_bto.shape[-1], a_bti.shape[-1], dtype=s_bto.dtype)
    add_squared_gradients(total, s_bto, a_bti, BlockDiagonal((Q_S,)), BlockDiagonal((Q_A,)))
    return total
