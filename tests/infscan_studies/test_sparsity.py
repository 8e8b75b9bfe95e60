"""The tail of the scores: a planted law is found again, shares are shares, and what cannot be fitted is said."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.errors import ConfigError
from infscan_studies.config import SparsityConfig
from infscan_studies.sparsity import RIVALS, SCHEMA, exponent_of, fit_tail, sparsity, words


def pareto(exponent: float, threshold: float, count: int, seed: int = 0) -> np.ndarray:
    """Draws of p(x) ~ x^-exponent from `threshold` on, descending."""
    draws = threshold * (1 - np.random.default_rng(seed).random(count)) ** (-1 / (exponent - 1))
    return np.sort(draws)[::-1]


@settings(max_examples=15, deadline=None)
@given(exponent=st.floats(1.5, 4), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 999))
def test_a_planted_exponent_is_found_within_its_error(exponent: float, scale: float, seed: int) -> None:
    found = exponent_of(pareto(exponent, scale, 4000, seed), scale)
    assert abs(found - exponent) < 5 * (exponent - 1) / np.sqrt(4000)


def test_a_pareto_tail_is_a_power_law_from_its_threshold_on() -> None:
    """Its start lies in the bulk of other scores; rivals that are no power law fit worse, or no better."""
    bulk = np.random.default_rng(1).uniform(0, 2, 300)
    tail = fit_tail(np.sort(np.concatenate([bulk, pareto(2.5, 2, 300)]))[::-1], 50, 200, seed=0)
    assert 1.8 < tail.threshold < 4
    assert abs(tail.exponent - 2.5) < 4 * tail.error
    assert tail.fit > 0.1
    ratios = {law: (ratio, p) for law, ratio, p in tail.rivals}
    assert set(ratios) == set(RIVALS)
    assert ratios["exponential"][0] > 0
    assert ratios["exponential"][1] < 0.01
    assert not any(ratio < 0 and p < 0.1 for ratio, p in ratios.values())


def test_an_exponential_tail_is_no_power_law() -> None:
    tail = fit_tail(np.sort(5 + np.random.default_rng(0).exponential(1, 400))[::-1], 400, 200, seed=0)
    assert tail.fit < 0.05
    ratios = {law: (ratio, p) for law, ratio, p in tail.rivals}
    assert ratios["exponential"][0] < 0
    assert ratios["exponential"][1] < 0.01


def table(**scores: np.ndarray) -> pa.Table:
    count = len(next(iter(scores.values())))
    columns = {f"score_{name}": pa.array(values, pa.float32()) for name, values in scores.items()}
    return pa.table({"sequence_id": range(count), "document_id": [str(n) for n in range(count)], **columns})


def test_shares_count_the_strongest_of_all_scanned_sequences() -> None:
    values = np.asarray([60.0, 20, 10, 10, -5, -15, 0, 0, 0, np.nan])
    found = sparsity(table(q=values), SparsityConfig(shares=[0.1, 0.3, 1]), seed=0)
    assert found.schema == SCHEMA
    plus, minus = found.to_pylist()
    # Of nine finite scores: one, three, all.
    assert [(one["rows"], round(one["part"], 6)) for one in plus["shares"]] == [(1, 0.6), (3, 0.9), (9, 1.0)]
    assert [round(one["part"], 6) for one in minus["shares"]] == [0.75, 1.0, 1.0]
    assert (plus["on_side"], minus["on_side"], plus["total"], minus["total"]) == (4, 2, 100, 20)
    assert plus["exponent"] is None
    assert plus["reason"] == "4 rows, and study.least=50"
    assert any("too few rows" in line for line in words(found))


def test_equal_scores_hold_their_share_and_no_sign_is_lost() -> None:
    """Scores and their opposites trade sides."""
    values = pareto(2.2, 1, 300)
    one, other = (
        sparsity(table(q=sign * values), SparsityConfig(resamples=20), seed=0).to_pylist() for sign in (1, -1)
    )
    assert {**one[0], "side": "opponent"} == other[1]
    flat = sparsity(table(q=np.ones(200)), SparsityConfig(tail=0.01, least=10), seed=0).to_pylist()[0]
    assert [row["part"] for row in flat["shares"]] == pytest.approx([0.005, 0.01, 0.1])


@pytest.mark.parametrize("wrong", [{"tail": 0.0}, {"tail": 2.0}, {"shares": []}, {"least": 3}, {"resamples": 1}])
def test_settings_that_say_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="study"):
        SparsityConfig(**wrong).check()  # type: ignore[arg-type]
