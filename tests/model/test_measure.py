"""Losses against their definition; labels follow the model and nothing else."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.model.measure import next_tokens, sample_labels, summed_losses, uniforms


def test_the_loss_is_the_sum_over_every_token_but_the_first() -> None:
    ids_bt = torch.tensor([[3, 1, 4, 1], [2, 0, 0, 0]])
    mask_bt = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=torch.bool)
    logits_btv = torch.randn(2, 4, 5, dtype=torch.float64)
    logs = logits_btv.log_softmax(-1)
    expected = [-(logs[0, 0, 1] + logs[0, 1, 4] + logs[0, 2, 1]), -logs[1, 0, 0]]
    losses_b = summed_losses(logits_btv, *next_tokens(ids_bt, mask_bt))
    torch.testing.assert_close(losses_b, torch.stack(expected))


def test_signed_weights_are_a_difference_of_log_probabilities() -> None:
    logits_btv = torch.randn(1, 3, 4, dtype=torch.float64)
    targets_bt, weights_bt = torch.tensor([[1, 2, 3]]), torch.tensor([[1.0, 0.0, -1.0]])
    logs = logits_btv.log_softmax(-1)[0]
    torch.testing.assert_close(summed_losses(logits_btv, targets_bt, weights_bt)[0], logs[2, 3] - logs[0, 1])


def test_low_precision_logits_give_wide_losses() -> None:
    logits_btv = torch.randn(1, 3, 4, dtype=torch.bfloat16)
    assert summed_losses(logits_btv, torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3)).dtype == torch.float32


@settings(max_examples=50, deadline=None)
@given(st.integers(-(2**63), 2**64 - 1), st.lists(st.integers(0, 2**62), min_size=1, max_size=6, unique=True))
def test_uniforms_are_keyed_by_seed_sequence_and_position(seed: int, ids: list[int]) -> None:
    together = uniforms(seed, np.asarray(ids, np.int64), 7)
    assert together.shape == (len(ids), 7)
    assert ((together >= 0) & (together < 1)).all()
    for row, sequence_id in enumerate(ids):
        alone = uniforms(seed, np.asarray([sequence_id], np.int64), 3)
        assert np.array_equal(together[row, :3], alone[0])
    assert len(np.unique(together)) == together.size
    assert not np.array_equal(together, uniforms(seed + 1, np.asarray(ids, np.int64), 7))


def test_uniforms_are_uniform_and_positions_are_independent() -> None:
    numbers = uniforms(0, np.arange(2000), 50)
    histogram = np.histogram(numbers, bins=20, range=(0, 1))[0] / numbers.size
    assert np.abs(histogram - 0.05).max() < 0.003
    assert abs(np.corrcoef(numbers[:, 0], numbers[:, 1])[0, 1]) < 0.1
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.1


def test_labels_follow_the_models_distribution() -> None:
    p_v = torch.tensor([0.0, 2.0, -1.0, 1.0, -30.0, float("-inf")]).softmax(-1)
    draws = 40_000
    numbers = torch.from_numpy(uniforms(3, np.arange(draws // 8), 8)).flatten()
    labels = sample_labels(p_v.expand(draws, -1), numbers)
    frequencies = torch.bincount(labels, minlength=6) / draws
    assert (frequencies - p_v).abs().max() < 0.012  # five standard deviations
    assert frequencies[5] == 0


def test_a_label_depends_on_its_row_alone() -> None:
    p_mv = torch.randn(513, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    numbers = torch.from_numpy(uniforms(1, np.arange(513), 1))[:, 0]
    labels = sample_labels(p_mv, numbers)
    assert labels.shape == (513,)
    for row in (0, 256, 512):
        assert sample_labels(p_mv[row : row + 1], numbers[row : row + 1])[0] == labels[row]


def test_the_ends_of_the_unit_interval_give_tokens_that_can_occur() -> None:
    p_mv = torch.tensor([0.0, 0.5, 0.5, 0.0]).expand(2, 4)
    numbers = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert sample_labels(p_mv, numbers).tolist() == [1, 2]
