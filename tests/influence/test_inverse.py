"""The EK-FAC inverse against dense linear algebra, and the rules of damping."""

import copy

import pytest
import torch

from infscan.errors import FactorsError
from infscan.influence.inverse import damping, from_core, inverse_core
from tests.influence.factors import make_factors, normal, tensors_of


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize(("O", "I"), [(3, 5), (5, 3), (4, 4)])
def test_inverse_is_the_dense_kronecker_solve(O: int, I: int, blocks: int) -> None:
    """With Lambda the outer product of eigenvalues, G = S (x) A in row-major vec, and P solves (G + lambda) P = V.

    With several blocks S and A are masked: P's entries in pairs of unlike blocks are no zeros.
    """
    factors = make_factors(0, O, I, kronecker=True, blocks=blocks)
    V_qoi = normal(9, 2, O, I)
    G = torch.kron(factors.S.dense(), factors.A.dense()) + 0.03 * torch.eye(O * I, dtype=torch.float64)
    dense = torch.linalg.solve(G, V_qoi.flatten(1).T).T.view(2, O, I)
    torch.testing.assert_close(from_core(inverse_core(V_qoi, factors, 0.03), factors), dense)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_inverse_with_corrected_eigenvalues_is_the_dense_solve_in_their_basis(blocks: int) -> None:
    factors = make_factors(3, 4, 6, blocks=blocks)
    basis = torch.kron(factors.Q_S.dense(), factors.Q_A.dense())
    G = (basis * (factors.Lambda.flatten() + 0.1)) @ basis.T
    V_qoi = normal(5, 1, 4, 6)
    dense = torch.linalg.solve(G, V_qoi.flatten()).view(1, 4, 6)
    torch.testing.assert_close(from_core(inverse_core(V_qoi, factors, 0.1), factors), dense)


def test_the_inverse_changes_no_factor_and_repeats_itself() -> None:
    factors = make_factors(1, 4, 5)
    before = copy.deepcopy(tensors_of(factors))
    V_qoi = normal(2, 3, 4, 5)
    first = inverse_core(V_qoi, factors, 0.1)
    assert torch.equal(first, inverse_core(V_qoi, factors, 0.1))
    assert all(map(torch.equal, before, tensors_of(factors)))


def test_damping_is_relative_to_the_mean_unless_absolute() -> None:
    Lambda = torch.tensor([[1.0, 3.0]])
    assert damping(Lambda, 0.1, None, "l") == pytest.approx(0.2)
    assert damping(Lambda, 0.1, 1e-4, "l") == 1e-4


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_a_damping_that_is_no_positive_number_is_refused(values: list[float]) -> None:
    with pytest.raises(FactorsError, match="dead_layer: the damping comes to"):
        damping(torch.tensor([values]), 0.1, None, "dead_layer")


def test_infinite_damping_leaves_the_gradients_direction() -> None:
    factors = make_factors(4, 3, 4)
    V_qoi = normal(6, 1, 3, 4)
    torch.testing.assert_close(from_core(inverse_core(V_qoi, factors, 1e9), factors) * 1e9, V_qoi, rtol=1e-6, atol=1e-6)
