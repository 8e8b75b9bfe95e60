"""Low-rank query gradients: the best plain truncation, and the best one for the expected score."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infscan.influence import truncation
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.compress import EIGENVALUE_FLOOR, Compressed, clamped_roots, compress, compress_weighted
from infscan.influence.inverse import from_core, inverse_core
from infscan.influence.layers import LayerFactors
from tests.influence.factors import make_factors, normal


def by_svd(M_oi: Tensor, rank: int) -> Tensor:
    U, values, Vh = torch.linalg.svd(M_oi, full_matrices=False)
    return (U[:, :rank] * values[:rank]) @ Vh[:rank]


def rebuilt(found: Compressed) -> Tensor:
    return found.U_or @ found.V_ir.T


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(0, 99))
def test_compressing_is_truncating_the_svd(O: int, I: int, rank: int, seed: int) -> None:
    M_oi = normal(seed, O, I)
    found = compress(M_oi, rank)
    assert found.U_or.shape == (O, min(rank, O, I))
    assert found.V_ir.shape == (I, min(rank, O, I))
    torch.testing.assert_close(rebuilt(found), by_svd(M_oi, rank), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.values_r, torch.linalg.svdvals(M_oi)[:rank])
    assert found.total == pytest.approx(float(M_oi.square().sum()))


@pytest.mark.parametrize(("O", "I"), [(20, 8), (8, 20)])
def test_compressing_in_float32_is_as_good_as_the_svd_in_float64(O: int, I: int) -> None:
    M_oi = (normal(0, O, I) * torch.logspace(0, -4, I, dtype=torch.float64)).float()
    found = compress(M_oi, 4)
    ours = found.U_or.double() @ found.V_ir.double().T
    torch.testing.assert_close(ours, by_svd(M_oi.double(), 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("tall", [False, True])
def test_a_zero_matrix_stays_zero(tall: bool, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truncation, "EXACT_BELOW", 0 if wide else 320)
    found = compress(torch.zeros((50, 30) if tall else (30, 50)), 2)
    assert not found.U_or.any()
    assert not found.V_ir.any()


@pytest.mark.parametrize("exact_below", [0, 320])
@pytest.mark.parametrize(("O", "I"), [(90, 60), (60, 90)])
def test_a_matrix_of_lower_rank_is_rebuilt_whole(
    O: int, I: int, exact_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truncation, "EXACT_BELOW", exact_below)
    M_oi = normal(1, O, 2) @ normal(2, 2, I)
    torch.testing.assert_close(rebuilt(compress(M_oi, 5)), M_oi)


@settings(max_examples=8, deadline=None)
@given(
    shape=st.sampled_from([(330, 400), (400, 330), (350, 350)]),
    decay=st.floats(0.0, 2.5),
    rank=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_a_wide_matrix_is_truncated_as_well_as_by_the_svd(
    shape: tuple[int, int], decay: float, rank: int, seed: int
) -> None:
    """The squared error is within 1 % of the least possible, for spectra from flat to steep."""
    Q, _ = torch.linalg.qr(normal(seed, *sorted(shape, reverse=True)))
    spectrum = torch.arange(1, Q.shape[1] + 1, dtype=torch.float64) ** -decay
    other, _ = torch.linalg.qr(normal(seed + 1, Q.shape[1], Q.shape[1]))
    M_oi = (Q * spectrum) @ other.T
    M_oi = (M_oi if shape[0] >= shape[1] else M_oi.T).float()
    found = compress(M_oi, rank)
    error = (M_oi.double() - found.U_or.double() @ found.V_ir.double().T).square().sum()
    assert error < 1.01 * spectrum[rank:].square().sum() + 1e-9


def test_a_wide_matrix_is_truncated_alike_every_time() -> None:
    M_oi = normal(3, 330, 340).float()
    first, second = compress(M_oi, 8), compress(M_oi.clone(), 8)
    assert torch.equal(first.U_or, second.U_or)
    assert torch.equal(first.V_ir, second.V_ir)


def literal_weighted(P_oi: Tensor, factors: LayerFactors, rank: int) -> Tensor:
    """S^(-1/2) truncate(S^(1/2) P A^(1/2)) A^(-1/2), with matrix roots of the clamped S and A."""

    def roots(eigenvalues: Tensor, basis: BlockDiagonal) -> tuple[Tensor, Tensor]:
        Q = basis.dense()
        clamped = eigenvalues.clamp_min(EIGENVALUE_FLOOR * eigenvalues.mean())
        return (Q * clamped.sqrt()) @ Q.T, (Q / clamped.sqrt()) @ Q.T

    S_root, S_back = roots(factors.S_eigenvalues, factors.Q_S)
    A_root, A_back = roots(factors.A_eigenvalues, factors.Q_A)
    return S_back @ by_svd(S_root @ P_oi @ A_root, rank) @ A_back


def expected_square(E_oi: Tensor, factors: LayerFactors) -> Tensor:
    """E[(s^T E a)^2] for independent s, a with second moments S and A: tr(S E A E^T)."""
    return torch.einsum("oi,ij,pj,po->", E_oi, factors.A.dense(), E_oi, factors.S.dense())


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("O", "I"), [(12, 7), (7, 12), (9, 9)])
def test_weighted_compression_is_the_literal_one_and_beats_the_plain_one(O: int, I: int, blocks: int) -> None:
    factors = make_factors(0, O, I, decay=1.5, blocks=blocks)
    C_oi = inverse_core(normal(5, O, I), factors, 0.01)
    P_oi = from_core(C_oi, factors)
    weighted = rebuilt(compress_weighted(C_oi, factors, 3))
    torch.testing.assert_close(weighted, literal_weighted(P_oi, factors, 3), rtol=1e-5, atol=1e-7)
    plain = rebuilt(compress(P_oi, 3))
    assert expected_square(P_oi - weighted, factors) < expected_square(P_oi - plain, factors)


def test_weighted_values_say_what_every_column_adds_to_the_expected_square() -> None:
    factors = make_factors(3, 8, 6)
    C_oi = inverse_core(normal(4, 8, 6), factors, 0.01)
    found = compress_weighted(C_oi, factors, 4)
    for column, value in enumerate(found.values_r):
        one = found.U_or[:, column : column + 1] @ found.V_ir[:, column : column + 1].T
        torch.testing.assert_close(expected_square(one, factors), value**2)
    assert found.total == pytest.approx(float(expected_square(from_core(C_oi, factors), factors)))


def test_full_rank_is_no_approximation() -> None:
    factors = make_factors(2, 6, 4)
    C_oi = normal(3, 6, 4)
    torch.testing.assert_close(rebuilt(compress_weighted(C_oi, factors, 4)), from_core(C_oi, factors))


def test_dead_directions_are_clamped_not_divided_by() -> None:
    roots = clamped_roots(torch.tensor([-1e-9, 0.0, 4.0]))
    assert roots[2] == 2.0
    torch.testing.assert_close(roots[:2], torch.full((2,), (EIGENVALUE_FLOOR * 4 / 3) ** 0.5))
    assert torch.isfinite(1 / clamped_roots(torch.zeros(3))).all()
