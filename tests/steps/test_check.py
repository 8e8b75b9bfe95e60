"""What a run says of its own approximation: correlation and recall per query, with intervals, or null and why."""

from __future__ import annotations

import numpy as np
import pytest

from infscan.steps.check import compared, judged


def scores(Q: int, N: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(Q, N))
    return exact, exact + 0.3 * rng.normal(size=(Q, N))


@pytest.mark.parametrize(("n", "top", "candidates"), [(2000, 10, 40), (1999, 9, 36), (256, 1, 4), (200, 1, 4)])
def test_recall_is_of_the_top_ten_in_forty_or_as_many_as_two_percent_allow(n: int, top: int, candidates: int) -> None:
    report = judged(["a", "b"], *scores(2, n), seed=0)
    assert (report["recall"]["top"], report["recall"]["candidates"]) == (top, candidates)
    assert candidates <= 0.02 * n
    assert 0 <= report["recall"]["low"] <= report["recall"]["mean"] <= report["recall"]["high"] <= 1
    for row in report["queries"].values():
        assert row["low"] < row["pearson"] < row["high"]
        assert row["recall_low"] <= row["recall"] <= row["recall_high"]


def test_a_row_or_ten_that_are_found_are_no_proof_that_all_are() -> None:
    exact, _ = scores(2, 256)
    report = judged(["a", "b"], exact, exact, seed=0)
    assert [report["queries"]["a"][f"recall{end}"] for end in ("", "_low", "_high")] == [1, 0.025, 1]
    assert (report["recall"]["mean"], report["recall"]["high"]) == (1, 1)
    assert report["recall"]["low"] == pytest.approx(0.025**0.5, abs=1e-6)
    exact, _ = scores(1, 2000)
    assert judged(["a"], exact, exact, seed=0)["recall"]["low"] == pytest.approx(0.691503, abs=1e-6)


def test_too_few_sequences_give_no_recall_but_the_reason() -> None:
    report = judged(["a", "b"], *scores(2, 199), seed=0)
    assert report["recall"]["mean"] is None
    assert "scan.check_sequences" in report["recall"]["reason"]
    assert {row["recall"] for row in report["queries"].values()} == {None}
    assert report["pearson"]["min"] > 0.9


def test_a_query_that_does_not_vary_has_null_and_leaves_the_average_alone() -> None:
    exact, approximate = scores(2, 2000)
    approximate[1] = 0
    report = judged(["a", "b"], exact, approximate, seed=0)
    assert set(report["queries"]["b"].values()) == {None}
    assert report["pearson"]["mean"] == report["queries"]["a"]["pearson"] == report["pearson"]["min"]
    assert judged(["a"], exact[:1], np.zeros((1, 2000)), seed=0)["pearson"]["mean"] is None


def test_queries_in_many_groups_are_a_sample() -> None:
    assert compared([range(500)], 0) == [0]
    one_by_one = [range(query, query + 1) for query in range(100)]
    assert len(set(compared(one_by_one, 0))) == 8
    assert compared(one_by_one, 0) == compared(one_by_one, 0) != compared(one_by_one, 1)
    assert len(compared([range(5), range(5, 10), range(10, 12)], 0)) in (2, 3)
