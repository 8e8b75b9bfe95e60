"""Laws of conjugate gradients: a dense solve's answer, row by row, faster with a good preconditioner."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from infscan.errors import FactorsError
from infscan.influence.cg import Operator, conjugate_gradients, damped

P, LAMBDA = 60, 0.05


def semidefinite(seed: int = 0) -> Tensor:
    """Eigenvalues over four orders of magnitude, and some zero."""
    basis, _ = torch.linalg.qr(torch.randn(P, P, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    values = torch.cat([torch.logspace(-2, 2, P - 10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)])
    return (basis * values) @ basis.T


def right_hand_sides(count: int = 3) -> Tensor:
    return torch.randn(count, P, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def system(G: Tensor, dtype: torch.dtype = torch.float64) -> Operator:
    return damped(lambda x_kp: x_kp @ G.to(dtype), torch.full((P,), LAMBDA, dtype=dtype))


def solved(G: Tensor, v_kp: Tensor) -> Tensor:
    return torch.linalg.solve(G + LAMBDA * torch.eye(P, dtype=torch.float64), v_kp.T).T


@pytest.mark.parametrize(("dtype", "tolerance", "close"), [(torch.float64, 1e-11, 1e-8), (torch.float32, 1e-5, 1e-2)])
def test_it_equals_a_dense_solve(dtype: torch.dtype, tolerance: float, close: float) -> None:
    G, v_kp = semidefinite(), right_hand_sides()
    found = conjugate_gradients(system(G, dtype), v_kp.to(dtype), tolerance=tolerance, max_iterations=500)
    assert bool(found.converged_k.all())
    assert found.x_kp.dtype == dtype
    torch.testing.assert_close(found.x_kp.double(), solved(G, v_kp), rtol=close, atol=close)


def test_the_residuals_are_those_of_the_solution() -> None:
    G, v_kp = semidefinite(), right_hand_sides()
    found = conjugate_gradients(system(G), v_kp, tolerance=1e-6, max_iterations=500)
    left = (v_kp - system(G)(found.x_kp)).norm(dim=1) / v_kp.norm(dim=1)
    torch.testing.assert_close(found.residuals[-1], left, rtol=1e-3, atol=1e-10)
    assert bool((left <= 1e-6).all())
    assert len(found.residuals) == len(found.seconds) == int(found.iterations_k.max()) + 1


def test_a_preconditioner_saves_iterations_and_changes_no_answer() -> None:
    G, v_kp = semidefinite(), right_hand_sides()
    values, vectors = torch.linalg.eigh(G)
    rough = (vectors / (values * torch.linspace(0.5, 2, P, dtype=torch.float64) + LAMBDA)) @ vectors.T
    plain = conjugate_gradients(system(G), v_kp, tolerance=1e-8, max_iterations=500)
    helped = conjugate_gradients(
        system(G), v_kp, tolerance=1e-8, max_iterations=500, preconditioner=lambda r_kp: r_kp @ rough
    )
    assert bool((helped.iterations_k < plain.iterations_k / 2).all())
    torch.testing.assert_close(helped.x_kp, plain.x_kp, rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_the_others() -> None:
    G, v_kp = semidefinite(), right_hand_sides()
    # The second stops at once, the third needs more products than the first.
    v_kp[1] = 0
    together = conjugate_gradients(system(G), v_kp, tolerance=1e-8, max_iterations=500)
    for row in range(len(v_kp)):
        alone = conjugate_gradients(system(G), v_kp[row : row + 1], tolerance=1e-8, max_iterations=500)
        torch.testing.assert_close(together.x_kp[row], alone.x_kp[0], rtol=1e-6, atol=1e-8)
        assert abs(int(together.iterations_k[row]) - int(alone.iterations_k[0])) <= 1
    assert int(together.iterations_k[1]) == 0
    assert float(together.x_kp[1].abs().max()) == 0


def test_the_limit_of_iterations_holds_and_is_told() -> None:
    seen: list[int] = []
    found = conjugate_gradients(
        system(semidefinite()),
        right_hand_sides(),
        tolerance=1e-10,
        max_iterations=3,
        on_iteration=lambda iteration, seconds, residual_k, x_kp: seen.append(iteration),
    )
    assert seen == [1, 2, 3]
    assert not bool(found.converged_k.any())


def test_negative_curvature_is_refused() -> None:
    with pytest.raises(FactorsError, match=r"float64|damping"):
        conjugate_gradients(lambda x_kp: -x_kp, right_hand_sides(), tolerance=1e-3, max_iterations=5)
