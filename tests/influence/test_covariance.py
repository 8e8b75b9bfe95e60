"""Second moments: padding adds nothing, a bias adds its 1, and sums over batches are sums over tokens."""

import pytest
import torch

from infscan.influence.covariance import add_second_moment, with_ones
from tests.influence.factors import normal


@pytest.mark.parametrize("bias", [False, True])
def test_second_moment_is_the_sum_over_real_tokens(bias: bool) -> None:
    a_bti = normal(0, 3, 5, 4)
    mask_bt = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    total = torch.zeros(4 + bias, 4 + bias, dtype=torch.float64)
    a_bti[~mask_bt] = torch.inf  # what a model makes of padding is nobody's business
    add_second_moment(total, with_ones(a_bti, mask_bt, bias=bias))
    literal = torch.zeros_like(total)
    for a_i in a_bti[mask_bt]:
        token = torch.cat([a_i, torch.ones(int(bias), dtype=a_i.dtype)])
        literal += torch.outer(token, token)
    torch.testing.assert_close(total, literal)
    if bias:
        assert total[-1, -1] == mask_bt.sum()


def test_batches_add_up() -> None:
    x_btn = normal(1, 6, 4, 3)
    whole, parts = torch.zeros(2, 3, 3, dtype=torch.float64)
    add_second_moment(whole, x_btn)
    for batch in x_btn.split([1, 3, 2]):
        add_second_moment(parts, batch)
    torch.testing.assert_close(whole, parts)


def test_low_precision_inputs_are_summed_in_the_totals_dtype() -> None:
    x_btn = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    total = torch.zeros(1, 1)
    add_second_moment(total, x_btn)
    assert total.item() == 4096
