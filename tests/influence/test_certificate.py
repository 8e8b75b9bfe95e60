"""Laws of the certificate: exact limits, the truth is seldom above them, thin evidence claims nothing, a broken
assumption is noticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from infscan.influence.certificate import (
    Audit,
    Certificate,
    Evidence,
    _negative_binomial_upper,
    binomial_interval,
    certify,
    certify_together,
    hypergeometric_upper,
)

N, C, TOP = 4_000, 400, 40


def search(seed: int, audited: int, *, queries: int = 1, seen: float = 0.7) -> tuple[list[Evidence], Audit, float]:
    """Heavy-tailed scores, of which a sieve sees a part; the evidence, and the true recall of the top."""
    rng = np.random.default_rng(seed)
    relevance_qn, noise_qn = rng.standard_t(3, (2, queries, N))
    exact, sieve = relevance_qn + (1 - seen) * noise_qn, relevance_qn
    rows = rng.choice(N, audited, replace=False)
    return (
        [evidence(e, s, rows) for e, s in zip(exact, sieve, strict=True)],
        Audit(N, audited),
        truth(exact, sieve),
    )


def evidence(exact: np.ndarray, sieve: np.ndarray, rows: np.ndarray) -> Evidence:
    found = np.zeros(N, np.bool_)
    found[np.argsort(-sieve)[:C]] = True
    return Evidence(exact[found], np.flatnonzero(found), exact[rows], found[rows])


def truth(exact_qn: np.ndarray, sieve_qn: np.ndarray) -> float:
    """The share of the true top that is among the candidates."""
    pairs = zip(np.argsort(-exact_qn)[:, :TOP], np.argsort(-sieve_qn)[:, :C], strict=True)
    return float(np.mean([np.isin(best, found).mean() for best, found in pairs]))


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_the_limit_of_a_finite_population_is_exact(data: st.DataObject) -> None:
    rows = data.draw(st.integers(2, 3_000))
    sampled = data.draw(st.integers(1, rows))
    x = data.draw(st.integers(0, sampled))
    found = hypergeometric_upper(rows, sampled, x, 0.05)
    assert stats.hypergeom.cdf(x, rows, found, sampled) >= 0.05 - 1e-9
    assert found == rows - (sampled - x) or stats.hypergeom.cdf(x, rows, found + 1, sampled) < 0.05 + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_interval_of_a_share_is_clopper_and_pearsons(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 200))
    x = data.draw(st.integers(0, n))
    known = stats.binomtest(x, n).proportion_ci(0.95, "exact")
    assert binomial_interval(x, n) == pytest.approx((known.low, known.high), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 500), st.floats(0.01, 500))
def test_a_prediction_is_the_negative_binomials(shape: float, mean: float) -> None:
    y, known = _negative_binomial_upper(shape, mean, 0.05), stats.nbinom(shape, shape / (shape + mean))
    assert known.cdf(y) >= 0.95 - 1e-9
    assert y == 0 or known.cdf(y - 1) < 0.95 + 1e-9


@pytest.mark.parametrize("audited", [200, 800, 2_000])
def test_where_nothing_is_missed_the_limit_is_the_exact_one(audited: int) -> None:
    # Rows beyond the weakest candidate are all candidates.
    exact = np.sort(np.random.default_rng(0).standard_t(3, N))
    found = certify(evidence(exact, exact, np.arange(0, N, N // audited)), Audit(N, audited), C)
    hidden = hypergeometric_upper(N, audited, 0, 0.05)
    assert found.recall is None or found.recall == pytest.approx(C / (C + hidden), abs=2 / C)
    assert found.without_assumption == pytest.approx(1 - hidden / C)


def test_the_same_query_twice_is_no_more_evidence_than_once() -> None:
    for seed in range(5):
        columns, audit, _ = search(seed, 800)
        once, twice = certify(columns[0], audit, TOP, 2), certify_together([columns[0]] * 2, audit, TOP)
        assert once.recall is not None
        assert twice.recall is not None
        assert twice.recall <= once.recall + 0.02
        assert twice.without_assumption <= once.without_assumption


@pytest.mark.parametrize("queries", [1, 5])
def test_the_truth_is_seldom_below_what_is_stated(queries: int) -> None:
    stated, wrong = 0, 0
    for seed in range(40):
        columns, audit, true = search(seed, 400, queries=queries)
        found = certify_together(columns, audit, TOP)
        stated += found.recall is not None
        wrong += found.recall is not None and found.recall > true
        assert found.without_assumption <= true
    assert stated >= 35
    assert wrong <= 2


def test_more_evidence_says_more() -> None:
    few, many = (certify(columns[0], audit, TOP) for columns, audit, _ in (search(1, 400), search(1, 3_000)))
    assert few.recall is not None
    assert many.recall is not None
    assert few.recall < many.recall
    together = certify_together(*search(1, 400, queries=8)[:2], TOP)
    assert together.recall is not None
    assert few.recall < together.recall
    assert together.top == 8 * TOP
    assert together.level is not None
    assert together.level.tail_fraction < 2 * C / N


def test_when_every_row_is_audited_the_limits_are_the_truth() -> None:
    columns, audit, true = search(3, N)
    found = certify(columns[0], audit, TOP)
    assert found.without_assumption <= true
    # M counts rows beyond the k-th published one, which lies no further out than the k-th strongest.
    assert found.level is not None
    assert found.recall == pytest.approx(found.level.detected)
    assert found.recall is not None
    assert true - found.recall < 0.05


@pytest.mark.parametrize("audited", [1, 5, 20])
def test_thin_evidence_claims_nothing(audited: int) -> None:
    found = certify(search(0, audited)[0][0], Audit(N, audited), TOP)
    assert found.recall is None
    assert found.at_least is None
    assert "too few" in found.reason


def test_strong_rows_that_are_missed_withdraw_the_statement() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_t(3, N)
    sieve = exact.copy()
    sieve[np.argsort(-exact)[: 2 * TOP]] = 0
    found = certify(evidence(exact, sieve, rng.choice(N, 600, replace=False)), Audit(N, 600), TOP)
    assert found.p_monotone < 0.05
    assert found.recall is None
    assert "missed more often" in found.reason


def test_the_statement_is_a_count() -> None:
    certificate = Certificate(100, 9, 0.9601, 0.0, None, (), 1.0)
    assert certificate.at_least == 97
    assert Certificate(100, 9, 0.96, 0.0, None, (), 1.0).at_least == 96


def test_nothing_found_is_nothing_certified() -> None:
    nothing = Evidence(np.array([-1.0]), np.array([3]), np.zeros(5), np.zeros(5, np.bool_))
    assert certify(nothing, Audit(10, 5), TOP).recall is None
