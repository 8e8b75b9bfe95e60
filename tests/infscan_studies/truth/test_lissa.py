"""Laws of LiSSA: it converges to the damped inverse where the system is well conditioned, the same way every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.errors import FactorsError
from infscan.influence.astra import Estimate, drawn, largest_eigenvalue
from infscan.influence.cg import conjugate_gradients, damped
from infscan_studies.truth.lissa import lissa

N, P, LAMBDA = 12, 20, 1.0


def gradients() -> Tensor:
    return torch.randn(N, P, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def product(x_kp: Tensor, rows: NDArray[np.int64]) -> Tensor:
    g_np = gradients()[torch.from_numpy(rows)]
    return x_kp @ g_np.T @ g_np / len(rows)


def v_kp() -> Tensor:
    return torch.randn(3, P, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(batch: int, depth: int, scale: float = 60.0, seed: int = 0, snapshots: tuple[int, ...] = ()) -> Estimate:
    lambda_p = torch.full((P,), LAMBDA, dtype=torch.float64)
    return lissa(
        product, v_kp(), lambda_p, sequences=N, batch=batch, depth=depth, scale=scale, seed=seed, snapshots=snapshots
    )


def solution() -> Tensor:
    system = damped(lambda x_kp: product(x_kp, np.arange(N)), torch.full((P,), LAMBDA, dtype=torch.float64))
    return conjugate_gradients(system, v_kp(), tolerance=1e-12, max_iterations=200).x_kp


def test_on_all_sequences_it_converges_to_the_solution() -> None:
    torch.testing.assert_close(run(batch=N, depth=3000, scale=20.0).x_kp, solution(), rtol=1e-8, atol=1e-8)


def test_on_batches_it_comes_near_the_solution_with_depth() -> None:
    found, target = run(batch=6, depth=600, snapshots=(5, 50, 600)), solution()
    away = [float((found.snapshots[step] - target).norm() / target.norm()) for step in (5, 50, 600)]
    assert away[0] > away[1] > away[2]
    assert away[2] < 0.2


def test_one_seed_gives_one_answer() -> None:
    assert torch.equal(run(batch=3, depth=20).x_kp, run(batch=3, depth=20).x_kp)
    assert not torch.equal(run(batch=3, depth=20).x_kp, run(batch=3, depth=20, seed=1).x_kp)


def test_the_history_has_every_step_and_snapshots_are_shorter_runs() -> None:
    found = run(batch=3, depth=8, snapshots=(4, 8))
    assert [step.step for step in found.history] == list(range(1, 9))
    assert torch.equal(found.snapshots[4], run(batch=3, depth=4).x_kp)
    assert torch.equal(found.snapshots[8], found.x_kp)


def test_divergence_is_refused() -> None:
    with pytest.raises(FactorsError, match=r"validate\.lissa\.scale"):
        run(batch=1, depth=500, scale=1.0)


def test_the_largest_eigenvalue_of_a_batch() -> None:
    g_np = gradients()
    exact = float(torch.linalg.eigvalsh(g_np.T @ g_np / N).max())
    draw = drawn([v_kp().shape[1]], [True], v_kp())
    found = largest_eigenvalue(product, draw, sequences=N, batch=N, batches=1, steps=200, seed=0)
    assert found == pytest.approx(exact, rel=1e-6)
