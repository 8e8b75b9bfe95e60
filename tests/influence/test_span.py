"""The span of a second moment's leading eigenvectors: orthogonal, a sum over slices, at full width EK-FAC itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infscan.influence.blocks import BlockDiagonal
from infscan.influence.eigenbasis import add_squared_gradients, eigenbasis
from infscan.influence.inverse import from_core, inverse_core
from infscan.influence.layers import LayerFactors
from infscan.influence.span import (
    SpannedBasis,
    add_sketch,
    add_spanned_squares,
    for_all_outputs,
    sketch_matrix,
    spanned_eigenbasis,
    weighted_spanned_squares,
)

V, I, T, B = 24, 5, 7, 30


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    """s [B, T, V] with a falling spectrum, whose entries sum to zero as a softmax's gradient's do; a [B, T, I]."""
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(B, T, V, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, V, dtype=torch.float64)
    s = s @ torch.linalg.qr(torch.randn(V, V, dtype=torch.float64, generator=generator))[0]
    return s - s.mean(dim=-1, keepdim=True), torch.randn(B, T, I, dtype=torch.float64, generator=generator)


def sketched(s: Tensor, span: int) -> tuple[Tensor, Tensor]:
    Omega = sketch_matrix(V, span, s.dtype)
    Y, trace = torch.zeros_like(Omega), torch.zeros(1, dtype=s.dtype)
    for part in s.split(8):
        add_sketch(Y, trace, part, Omega)
    return Y, trace


def factors_of(s: Tensor, a: Tensor, span: int) -> LayerFactors:
    """With a span, or (0) with S itself."""
    A = BlockDiagonal((a.flatten(0, 1).T @ a.flatten(0, 1),))
    A_values, Q_A = eigenbasis(A, "A")
    if not span:
        S = BlockDiagonal((s.flatten(0, 1).T @ s.flatten(0, 1),))
        S_values, Q = eigenbasis(S, "S")
        Lambda = torch.zeros(V, I, dtype=s.dtype)
        add_squared_gradients(Lambda, s, a, Q, Q_A)
        return LayerFactors(A, S, Q_A, Q, A_values, S_values, Lambda / B)
    Y, trace = sketched(s, span)
    values, basis = spanned_eigenbasis(Y, float(trace), span)
    kept = torch.zeros(min(span + 1, V), I, dtype=s.dtype)
    add_spanned_squares(kept, s, a, basis, Q_A)
    if span < V:
        kept[-1] /= V - span
    return LayerFactors(A, None, Q_A, basis, A_values, for_all_outputs(values, V), for_all_outputs(kept, V) / B)


def preconditioned(s: Tensor, a: Tensor, span: int, query: Tensor) -> Tensor:
    factors = factors_of(s, a, span)
    return from_core(inverse_core(query, factors, 0.1 * float(factors.Lambda.mean())), factors)


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_reflectors_are_an_orthogonal_matrix_whose_first_columns_span_what_it_was_made_of(
    shape: tuple[int, int], seed: int
) -> None:
    n, k = shape
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator))[0]
    basis = SpannedBasis.of(U)
    Q = basis.dense()
    assert torch.allclose(Q.T @ Q, torch.eye(n, dtype=Q.dtype))
    assert torch.allclose(Q[:, :k] @ Q[:, :k].T, U @ U.T)
    x = torch.randn(3, n, 2, dtype=torch.float64, generator=generator)
    assert torch.allclose(basis @ x, Q @ x)
    assert torch.allclose(basis.T @ x, Q.T @ x)
    assert torch.allclose(x.mT @ basis, x.mT @ Q)


def test_the_whole_span_is_the_second_moment_itself() -> None:
    s, _ = tokens()
    S = s.flatten(0, 1).T @ s.flatten(0, 1)
    Y, trace = sketched(s, V)
    values, basis = spanned_eigenbasis(Y, float(trace), V)
    Q = basis.dense()
    assert torch.allclose(Q @ torch.diag(values) @ Q.T, S, atol=1e-6 * float(S.norm()))


def test_leading_eigenvalues_are_found_and_the_rest_keeps_the_trace() -> None:
    s, _ = tokens()
    S = s.flatten(0, 1).T @ s.flatten(0, 1)
    Y, trace = sketched(s, 12)
    values, _ = spanned_eigenbasis(Y, float(trace), 12)
    true = torch.linalg.eigvalsh(S).flip(0)
    assert values[:4] == pytest.approx(true[:4], rel=1e-2)
    assert float(values[:-1].sum() + (V - 12) * values[-1]) == pytest.approx(float(S.trace()))


def test_a_sketch_is_a_sum_over_slices() -> None:
    s, _ = tokens()
    Omega = sketch_matrix(V, 8, s.dtype)
    whole = s.flatten(0, 1).T @ (s.flatten(0, 1) @ Omega)
    assert torch.allclose(sketched(s, 8)[0], whole)
    # Of a larger span it is the same and more.
    assert torch.equal(sketch_matrix(V, 16, s.dtype)[:, : Omega.shape[1]], Omega)


@pytest.mark.parametrize("span", [1, 6, V])
def test_squares_are_those_of_gradients_in_the_basis(span: int) -> None:
    s, a = tokens()
    Q_A = eigenbasis(BlockDiagonal((a.flatten(0, 1).T @ a.flatten(0, 1),)), "A")[1]
    _, basis = spanned_eigenbasis(sketched(s, span)[0], float(sketched(s, span)[1]), span)
    kept = torch.zeros(min(span + 1, V), I, dtype=s.dtype)
    add_spanned_squares(kept, s, a, basis, Q_A)
    dense = ((basis.dense().T @ (s.mT @ a) @ Q_A.dense()) ** 2).sum(dim=0)
    assert torch.allclose(kept[:span], dense[:span])
    if span < V:
        assert torch.allclose(kept[span], dense[span:].sum(dim=0))
    # Weighted, sequence by sequence.
    weights = for_all_outputs(torch.rand(len(kept), I, dtype=s.dtype, generator=torch.Generator().manual_seed(2)), V)
    each = ((basis.dense().T @ (s.mT @ a) @ Q_A.dense()) ** 2 * weights).sum(dim=(1, 2))
    assert torch.allclose(weighted_spanned_squares(weights, s, a, basis, Q_A), each)


def test_more_eigenvectors_come_nearer_to_the_whole_and_all_of_them_are_it() -> None:
    s, a = tokens()
    query = torch.randn(1, V, I, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    query -= query.mean(dim=1, keepdim=True)
    exact = preconditioned(s, a, 0, query)
    errors = [float((preconditioned(s, a, span, query) - exact).norm() / exact.norm()) for span in (2, 6, 12, 18, V)]
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-6
