"""Laws of the automatic damping: it scales with the loss, and where the best one is known, that is found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infscan.influence.even_damping import GRID, even_damping


def moments(seed: int) -> Tensor:
    """Second moments over five decades, [20, 30]."""
    return 10 ** (5 * torch.rand(20, 30, generator=torch.Generator().manual_seed(seed)) - 3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), scale=st.floats(1e-8, 1e8), other=st.floats(1e-8, 1e8))
def test_a_scaled_loss_scales_the_damping_with_lambda(seed: int, scale: float, other: float) -> None:
    """Gradients times c make Lambda and the moments c^2 times as large; the multiple of Lambda's mean stays."""
    v = moments(seed)
    Lambda = (v * (0.5 + torch.rand(20, 30, generator=torch.Generator().manual_seed(seed + 1)))).clamp_min(1e-2)
    assert even_damping(Lambda, v) == even_damping(scale * Lambda, other * v)


@pytest.mark.parametrize("relative", [1e-3, 1e-2, 0.1, 1.0])
def test_a_part_that_lambda_lacks_is_what_is_found(relative: float) -> None:
    """Moments are Lambda and a constant in every direction: with that constant the spread is perfectly even."""
    Lambda = moments(3)
    v = 0.6 * (Lambda + relative * Lambda.mean())
    found = even_damping(Lambda, v)
    assert found is not None
    assert relative / 2 < found < relative * 2


def test_an_exact_lambda_needs_no_damping_and_a_blind_one_needs_much() -> None:
    v = moments(4)
    exact, blind = even_damping(v, v), even_damping(torch.where(v < v.median(), 1e-9 * v, v), v)
    assert exact is not None
    assert blind is not None
    # Alike within a percent: far below the moments that most entries have.
    assert exact * v.mean() < v.median() / 10
    assert blind > 3 * exact


def test_an_order_of_entries_says_nothing() -> None:
    v, order = moments(5).flatten(), torch.randperm(600, generator=torch.Generator().manual_seed(0))
    Lambda = v.sqrt()
    assert even_damping(Lambda.view(20, 30), v.view(20, 30)) == even_damping(
        Lambda[order].view(20, 30), v[order].view(20, 30)
    )


def test_a_row_that_stands_for_several_is_as_all_of_them() -> None:
    v, times = moments(7), torch.ones(20)
    Lambda, times[-1] = v.sqrt(), 5
    every = torch.cat([v, v[-1:].expand(4, -1)])
    assert even_damping(Lambda, v, times) == even_damping(every.sqrt(), every)


def test_where_nothing_can_be_said_there_is_none() -> None:
    v = moments(6)
    assert even_damping(torch.zeros_like(v), v) is None
    assert even_damping(v, torch.zeros_like(v)) is None
    assert even_damping(v, v * float("inf")) is None
    assert even_damping(v, v) in GRID
