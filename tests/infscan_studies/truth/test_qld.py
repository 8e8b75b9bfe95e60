"""Laws of QLD: the strongest go, as many at random go, and removing what matters costs more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from infscan.errors import ConfigError
from infscan.storage import Store
from infscan_studies.truth.qld import loss_rises, qld, removed, without_random, without_top
from infscan_studies.truth.retrain import Retrainer, left_out

N, Q = 100, 3
WORTH_NQ = np.random.default_rng(0).exponential(size=(N, Q))


def additive(chosen: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """A training in which every sequence adds its worth to f; the seed shifts everything alike."""
    return WORTH_NQ[chosen].sum(axis=0) + seed


@pytest.fixture
def retrainer(tmp_path: Path) -> Retrainer:
    return Retrainer(Store(str(tmp_path)), "additive", [f"q{q}" for q in range(Q)], additive)


def test_the_strongest_share_goes_and_ties_go_by_row() -> None:
    kept_qn = without_top(WORTH_NQ, 0.05)
    assert (~kept_qn).sum(axis=1).tolist() == [5] * Q
    for q in range(Q):
        assert WORTH_NQ[~kept_qn[q], q].min() > WORTH_NQ[kept_qn[q], q].max()
    assert np.flatnonzero(~without_top(np.zeros((N, 1)), 0.02)[0]).tolist() == [0, 1]


def test_a_share_removes_at_least_one_and_never_all() -> None:
    assert [removed(N, 0.01), removed(30, 0.01), removed(250, 0.01)] == [1, 1, 2]
    for share in (0.0, 1.0, 0.999):
        with pytest.raises(ConfigError, match="cannot be removed"):
            removed(N, share)


def test_as_many_go_at_random_seeded_and_apart() -> None:
    kept_dn = without_random(N, 0.05, draws=3, seed=1)
    assert (~kept_dn).sum(axis=1).tolist() == [5] * 3
    assert np.array_equal(kept_dn, without_random(N, 0.05, draws=3, seed=1))
    assert len({row.tobytes() for row in kept_dn}) == 3


def test_the_rise_is_what_the_removed_sequences_were_worth(retrainer: Retrainer) -> None:
    kept_qn, random_dn = without_top(WORTH_NQ, 0.05), without_random(N, 0.05, draws=2, seed=1)
    rises_sq = loss_rises(retrainer, kept_qn, random_dn, seeds=(0, 1))
    for q in range(Q):
        expected = WORTH_NQ[~kept_qn[q], q].sum() - np.mean([WORTH_NQ[~kept, q].sum() for kept in random_dn])
        assert rises_sq[:, q] == pytest.approx(expected)
    found = qld(rises_sq, seed=0)
    assert found.low > 0
    assert found.mean == pytest.approx(rises_sq.mean())
    assert found.low <= found.mean <= found.high


def test_opponents_removed_lower_the_loss(retrainer: Retrainer) -> None:
    rises_sq = loss_rises(retrainer, without_top(-WORTH_NQ, 0.05), without_random(N, 0.05, 2, seed=1), seeds=(0,))
    assert (rises_sq < 0).all()


def test_a_removal_of_all_of_a_fact_is_named() -> None:
    kept_qn = without_top(WORTH_NQ, 0.05)
    strongest = int(WORTH_NQ[:, 0].argmax())
    assert 0 in left_out({"q0": [strongest]}, kept_qn, np.arange(N))["q0"]


def test_a_nan_has_no_rank() -> None:
    with pytest.raises(ConfigError, match="NaN and has no rank"):
        without_top(np.full((4, 1), np.nan), 0.3)
