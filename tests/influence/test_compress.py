"""Low-rank query gradients: the best plain truncation, and the best one for the expected score."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infscan.influence.blocks import BlockDiagonal
from infscan.influence.compress import EIGENVALUE_FLOOR, clamped_roots, compress_weighted, truncate
from infscan.influence.inverse import from_core, inverse_core
from infscan.influence.layers import LayerFactors
from tests.influence.factors import make_factors, normal


def by_svd(M_qoi: Tensor, rank: int) -> Tensor:
    U, values, Vh = torch.linalg.svd(M_qoi, full_matrices=False)
    return (U[..., :rank] * values[..., None, :rank]) @ Vh[..., :rank, :]


def rebuilt(factors: tuple[Tensor, Tensor]) -> Tensor:
    U_qor, V_qir = factors
    return U_qor @ V_qir.transpose(-1, -2)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 99))
def test_truncate_is_the_truncated_svd(O: int, I: int, rank: int, seed: int) -> None:
    M_qoi = normal(seed, 2, O, I)
    U_qor, V_qir = truncate(M_qoi, rank)
    assert U_qor.shape == (2, O, min(rank, O, I))
    assert V_qir.shape == (2, I, min(rank, O, I))
    torch.testing.assert_close(rebuilt((U_qor, V_qir)), by_svd(M_qoi, rank), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("O", "I"), [(20, 8), (8, 20)])
def test_truncate_in_float32_is_as_good_as_the_svd_in_float64(O: int, I: int) -> None:
    M_qoi = normal(0, 3, O, I) * torch.logspace(0, -4, I, dtype=torch.float64)
    ours = rebuilt(tuple(part.double() for part in truncate(M_qoi.float(), 4)))  # type: ignore[arg-type]
    torch.testing.assert_close(ours, by_svd(M_qoi.float().double(), 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_a_zero_matrix_stays_zero(shape: tuple[int, int]) -> None:
    U_qor, V_qir = truncate(torch.zeros(1, *shape), 2)
    assert not U_qor.any()
    assert not V_qir.any()


@pytest.mark.parametrize(("O", "I"), [(9, 6), (6, 9)])
def test_a_matrix_of_lower_rank_is_rebuilt_whole(O: int, I: int) -> None:
    M_qoi = normal(1, 2, O, 2) @ normal(2, 2, 2, I)
    U_qor, V_qir = truncate(M_qoi, 5)
    torch.testing.assert_close(rebuilt((U_qor, V_qir)), M_qoi)
    assert torch.isfinite(U_qor).all()
    assert torch.isfinite(V_qir).all()


def literal_weighted(P_qoi: Tensor, factors: LayerFactors, rank: int) -> Tensor:
    """S^(-1/2) truncate(S^(1/2) P A^(1/2)) A^(-1/2), with matrix roots of the clamped S and A."""

    def roots(eigenvalues: Tensor, basis: BlockDiagonal) -> tuple[Tensor, Tensor]:
        Q = basis.dense()
        clamped = eigenvalues.clamp_min(EIGENVALUE_FLOOR * eigenvalues.mean())
        return (Q * clamped.sqrt()) @ Q.T, (Q / clamped.sqrt()) @ Q.T

    S_root, S_back = roots(factors.S_eigenvalues, factors.Q_S)
    A_root, A_back = roots(factors.A_eigenvalues, factors.Q_A)
    return S_back @ by_svd(S_root @ P_qoi @ A_root, rank) @ A_back


def expected_error(E_qoi: Tensor, factors: LayerFactors) -> Tensor:
    """E[(s^T E a)^2] for independent s, a with second moments S and A: tr(S E A E^T)."""
    return torch.einsum("qoi,ij,qpj,po->q", E_qoi, factors.A.dense(), E_qoi, factors.S.dense())


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("O", "I"), [(12, 7), (7, 12), (9, 9)])
def test_weighted_compression_is_the_literal_one_and_beats_the_plain_one(O: int, I: int, blocks: int) -> None:
    factors = make_factors(0, O, I, decay=1.5, blocks=blocks)
    C_qoi = inverse_core(normal(5, 4, O, I), factors, 0.01)
    P_qoi = from_core(C_qoi, factors)
    weighted = rebuilt(compress_weighted(C_qoi, factors, 3))
    torch.testing.assert_close(weighted, literal_weighted(P_qoi, factors, 3), rtol=1e-5, atol=1e-7)
    plain = rebuilt(truncate(P_qoi, 3))
    assert (expected_error(P_qoi - weighted, factors) < expected_error(P_qoi - plain, factors)).all()


def test_full_rank_is_no_approximation() -> None:
    factors = make_factors(2, 6, 4)
    C_qoi = normal(3, 2, 6, 4)
    torch.testing.assert_close(rebuilt(compress_weighted(C_qoi, factors, 4)), from_core(C_qoi, factors))


def test_a_queries_compression_does_not_depend_on_the_others() -> None:
    factors = make_factors(2, 6, 5)
    C_qoi = normal(3, 4, 6, 5)
    together = compress_weighted(C_qoi, factors, 2)
    alone = [compress_weighted(C_qoi[index : index + 1], factors, 2) for index in range(4)]
    torch.testing.assert_close(rebuilt(together), torch.cat([rebuilt(one) for one in alone]))


def test_dead_directions_are_clamped_not_divided_by() -> None:
    roots = clamped_roots(torch.tensor([-1e-9, 0.0, 4.0]))
    assert roots[2] == 2.0
    torch.testing.assert_close(roots[:2], torch.full((2,), (EIGENVALUE_FLOOR * 4 / 3) ** 0.5))
    assert torch.isfinite(1 / clamped_roots(torch.zeros(3))).all()
