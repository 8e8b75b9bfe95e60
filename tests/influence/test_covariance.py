"""Second moments: padding adds nothing, a bias adds its 1, and sums over batches are sums over tokens."""

import pytest
import torch

from infscan.influence.blocks import BlockDiagonal
from infscan.influence.covariance import add_second_moment, mirror, with_ones
from tests.influence.factors import diagonal_blocks, normal


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_second_moment_is_the_sum_over_real_tokens(bias: bool, blocks: int) -> None:
    a_bti = normal(0, 3, 5, 4)
    mask_bt = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    total = BlockDiagonal.zeros(4 + bias, blocks, dtype=torch.float64)
    a_bti[~mask_bt] = torch.inf  # what a model makes of padding is nobody's business
    add_second_moment(total, with_ones(a_bti, mask_bt, bias=bias))
    literal = torch.zeros(4 + bias, 4 + bias, dtype=torch.float64)
    for a_i in a_bti[mask_bt]:
        token = torch.cat([a_i, torch.ones(int(bias), dtype=a_i.dtype)])
        literal += torch.outer(token, token)
    torch.testing.assert_close(mirror(total).dense(), diagonal_blocks(literal, blocks).dense())
    if bias:
        assert mirror(total).dense()[-1, -1] == mask_bt.sum()


@pytest.mark.parametrize("n", [2, 4, 401])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_a_1_left_out_is_a_1_appended(n: int, blocks: int) -> None:
    a_bti = normal(3, 3, 5, n)
    mask_bt = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    blocks = min(blocks, n + 1)
    appended, left_out = (BlockDiagonal.zeros(n + 1, blocks, dtype=torch.float64) for _ in range(2))
    for _ in range(2):
        add_second_moment(appended, with_ones(a_bti, mask_bt, bias=True))
        add_second_moment(left_out, with_ones(a_bti, mask_bt, bias=False), mask_bt)
    torch.testing.assert_close(mirror(left_out).dense(), mirror(appended).dense())


@pytest.mark.parametrize("bias", [False, True])
def test_without_padding_nothing_is_zeroed(bias: bool) -> None:
    a_bti, mask_bt = normal(2, 3, 5, 4), torch.ones(3, 5, dtype=torch.bool)
    found = with_ones(a_bti, mask_bt, bias=bias, padded=False)
    torch.testing.assert_close(found, with_ones(a_bti, mask_bt, bias=bias), rtol=0, atol=0)
    assert (found.data_ptr() == a_bti.data_ptr()) == (not bias), "what has no bias and no padding is not copied"


def test_batches_add_up() -> None:
    x_btn = normal(1, 6, 4, 3)
    whole, parts = (BlockDiagonal.zeros(3, 1, dtype=torch.float64) for _ in range(2))
    add_second_moment(whole, x_btn)
    for batch in x_btn.split([1, 3, 2]):
        add_second_moment(parts, batch)
    torch.testing.assert_close(mirror(whole).dense(), mirror(parts).dense())


def test_low_precision_inputs_are_summed_in_the_totals_dtype() -> None:
    x_btn = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    total = BlockDiagonal.zeros(1, 1, dtype=torch.float32)
    add_second_moment(total, x_btn)
    assert total.dense().item() == 4096


@pytest.mark.parametrize("n", [191, 400, 1601])
def test_wide_sums_made_in_panels_are_the_whole_product(n: int) -> None:
    x_btn = normal(2, 1, 7, n)
    total = BlockDiagonal.zeros(n, 1, dtype=torch.float64)
    add_second_moment(total, x_btn)
    torch.testing.assert_close(mirror(total).dense(), x_btn[0].T @ x_btn[0])
    assert torch.equal(mirror(total).dense(), mirror(total).dense().T)
