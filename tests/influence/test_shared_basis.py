"""One basis pair for all queries: whole where everything is kept, and never worse than what was allowed to go."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infscan.influence.compress import clamped_roots
from infscan.influence.layers import LayerFactors
from infscan.influence.layout import SharedBasis
from infscan.influence.shared_basis import shared_basis
from tests.influence.factors import make_factors, normal

O, I, T = 12, 9, 64
ANY = 1 << 40


def columns(seed: int, ranks: list[int], decay: float = 1.0) -> tuple[Tensor, Tensor]:
    """Queries with much in common: their columns lean to the same few directions."""
    lean_o, lean_i = (torch.arange(1, n + 1, dtype=torch.float64) ** -decay for n in (O, I))
    return normal(seed, sum(ranks), O) * lean_o, normal(seed + 1, sum(ranks), I) * lean_i


def products(U_xo: Tensor, V_xi: Tensor, ranks: list[int]) -> Tensor:
    return torch.stack([u.T @ v for u, v in zip(U_xo.split(ranks), V_xi.split(ranks), strict=True)])


def rebuilt(found: SharedBasis[Tensor] | None) -> Tensor:
    assert found is not None
    P_qoi = found.K_qmn if found.B_mo is None else found.B_mo.T @ found.K_qmn
    return P_qoi if found.B_ni is None else P_qoi @ found.B_ni


def weighted(P_qoi: Tensor, factors: LayerFactors | None) -> Tensor:
    """S^(1/2) P A^(1/2), in the eigenbases."""
    if factors is None:
        return P_qoi
    S_roots, A_roots = clamped_roots(factors.S_eigenvalues), clamped_roots(factors.A_eigenvalues)
    return S_roots[:, None] * (factors.Q_S.T @ P_qoi @ factors.Q_A) * A_roots


@pytest.mark.parametrize("blocks", [None, 1, 2])
def test_with_everything_kept_nothing_changes(blocks: int | None) -> None:
    ranks = [2, 1, 3]
    factors = None if blocks is None else make_factors(5, O, I, blocks=blocks)
    U_xo, V_xi = columns(0, ranks)
    found = shared_basis(U_xo, V_xi, ranks, factors, torch.ones(3), 1.0, T, ANY)
    torch.testing.assert_close(rebuilt(found), products(U_xo, V_xi, ranks))


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    kept=st.floats(0.3, 1.0),
    decay=st.floats(0.0, 3.0),
    bare=st.booleans(),
    tokens=st.sampled_from([1, 4, 64, 4096]),
    seed=st.integers(0, 99),
)
def test_no_more_is_left_out_than_allowed(
    ranks: list[int], kept: float, decay: float, bare: bool, tokens: int, seed: int
) -> None:
    factors = None if bare else make_factors(seed + 2, O, I)
    U_xo, V_xi = columns(seed, ranks, decay)
    M_qoi = weighted(products(U_xo, V_xi, ranks), factors)
    squares_q = M_qoi.square().sum(dim=(1, 2))
    found = shared_basis(U_xo, V_xi, ranks, factors, 1 / squares_q, kept, tokens, ANY)
    lost_q = (M_qoi - weighted(rebuilt(found), factors)).square().sum(dim=(1, 2))
    assert float((lost_q / squares_q).mean()) <= 1 - kept + 1e-9


def test_a_query_counts_by_its_share_whatever_its_scale() -> None:
    ranks = [3] * 6
    U_xo, V_xi = columns(3, ranks)
    squares_q = products(U_xo, V_xi, ranks).square().sum(dim=(1, 2))
    scale_q = torch.logspace(-3, 3, 6, dtype=torch.float64)
    plain = shared_basis(U_xo, V_xi, ranks, None, 1 / squares_q, 0.9, T, ANY)
    U_scaled, weights_q = U_xo * scale_q.repeat_interleave(3)[:, None], 1 / (squares_q * scale_q**2)
    scaled = shared_basis(U_scaled, V_xi, ranks, None, weights_q, 0.9, T, ANY)
    torch.testing.assert_close(rebuilt(scaled), rebuilt(plain) * scale_q[:, None, None])


def test_many_queries_with_much_in_common_share_a_small_basis() -> None:
    U, V = normal(1, 4, O), normal(2, 4, I)
    ranks = [2] * 50
    U_xo, V_xi = normal(3, 100, 4) @ U, normal(4, 100, 4) @ V
    found = shared_basis(U_xo, V_xi, ranks, make_factors(7, O, I), torch.ones(50), 1 - 1e-12, T, ANY)
    assert found is not None
    assert found.K_qmn.shape == (50, 4, 4)


def test_a_side_that_is_not_worth_projecting_keeps_its_coordinates() -> None:
    """Inputs lie in two directions, outputs everywhere: projecting outputs would cost more than it saves."""
    ranks = [1] * 3
    U_xo, V_xi = normal(1, 3, O), normal(2, 3, 2) @ normal(3, 2, I)
    found = shared_basis(U_xo, V_xi, ranks, make_factors(4, O, I), torch.ones(3), 1 - 1e-12, 4096, ANY)
    assert found is not None
    assert found.B_mo is None
    assert found.K_qmn.shape == (3, O, 2)
    torch.testing.assert_close(rebuilt(found), products(U_xo, V_xi, ranks))


def test_cores_have_the_entries_given_at_most_or_there_are_none() -> None:
    ranks = [2] * 20
    U_xo, V_xi = columns(0, ranks, 2.0)

    def size(entries: int, kept: float) -> int | None:
        found = shared_basis(U_xo, V_xi, ranks, None, torch.ones(20), kept, 4096, entries)
        return None if found is None else found.K_qmn.numel()

    free = size(ANY, 0.9)
    assert free is not None
    assert size(free, 0.9) == free
    smaller = size(free - 1, 0.9)
    assert smaller is None or smaller < free
    assert size(20 * 2, 1.0) is None
