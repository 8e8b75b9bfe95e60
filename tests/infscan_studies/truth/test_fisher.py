"""The dense Fisher of drawn labels: near the Gauss-Newton matrix it estimates, whatever the batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from infscan.errors import ConfigError
from infscan.model.gauss_newton import GaussNewton
from infscan_studies.truth.fisher import check_size, sampled_fisher
from tests.model.test_gauss_newton import double_rank, some_sequences


def test_the_mean_over_draws_comes_to_the_gauss_newton_matrix(tmp_path: Path) -> None:
    """Whose products count the last position too: a token that is not predicted from is added to make up for it."""
    rank = double_rank(tmp_path, "gpt_neox", r"layers\.0\.mlp\.dense_4h_to_h")
    sequences = some_sequences((2,))
    found = sampled_fisher(rank, sequences, draws=300, seed=0, tokens_per_batch=64)
    shortened = [type(sequences[0])(0, sequences[0].token_ids[:1], (), 0, "")]
    size = len(found)
    exact = GaussNewton(rank, shortened, 64).product(torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(found, found.T)
    assert (found - exact).norm() < 0.25 * exact.norm()


def test_draws_depend_on_the_sequence_and_not_on_its_batch(tmp_path: Path) -> None:
    rank = double_rank(tmp_path, "gpt_neox", "mlp")
    together, apart = (
        sampled_fisher(rank, some_sequences(), draws=2, seed=0, tokens_per_batch=tokens) for tokens in (64, 5)
    )
    torch.testing.assert_close(together, apart)


def test_a_matrix_that_does_not_fit_is_refused_with_its_size() -> None:
    check_size(1000, 16_000_000)
    with pytest.raises(ConfigError, match=r"100,000 tracked parameters .* 149\.0 GiB, more than 4\.0; .*=ekfac"):
        check_size(100_000, 4 << 30)
