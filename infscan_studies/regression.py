"""PBRF of an MLP regression on invented data, the size of the Concrete set: small enough for the exact damped GGN.

A row is a sequence of one token. L = |h(x) - y|^2 / 2 is the negative log-likelihood of y ~ N(h, 1), so pseudo-targets
are h + noise of unit variance, H = 1, and G = (1/N) sum of J_n^T J_n with J_n = s_n a_n^T by layer, s = dh/dy_l.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from infscan.config import fingerprint, plain
from infscan.influence.agreement import random_scores
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.covariance import add_second_moment, mirror
from infscan.influence.eigenbasis import add_squared_gradients, eigenbasis
from infscan.influence.layers import Layer, LayerFactors
from infscan.model.gauss_newton import damping_vector, join
from infscan.results.tensor_files import read_tensors, write_tensors
from infscan.steps.solve import ekfac_inverse
from infscan.storage import Store
from infscan_studies.against_cg import by_lissa
from infscan_studies.against_pbrf import Responder, concluded, sampled_points, settings_of
from infscan_studies.comparison import DOT, EKFAC, RANDOM, Comparison, Scored
from infscan_studies.config import RegressionConfig, ValidateJob
from infscan_studies.truth.pbrf import dampings_of
from infscan_studies.truth.problems import RegressionProblem
from infscan_studies.validation import timed

GGN = "damped GGN, exact"
FEATURES = 8
_WIDE = torch.float64


@dataclass(frozen=True)
class Data:
    """Standardised rows. x_ni, y_n1: trained on; test_x_qi, test_y_q1: measured on."""

    x_ni: Tensor
    y_n1: Tensor
    test_x_qi: Tensor
    test_y_q1: Tensor


def invent(truth: RegressionConfig, seed: int) -> Data:
    """Correlated features, a smooth target of them that is far from linear, and noise; float64."""
    rng = np.random.default_rng([seed, 0])
    mixed = rng.standard_normal((truth.rows, FEATURES)) @ (
        np.eye(FEATURES) + 0.3 * rng.standard_normal((FEATURES, FEATURES))
    )
    x = (mixed - mixed.mean(axis=0)) / mixed.std(axis=0)
    y = np.sin(2 * x[:, 0]) * x[:, 1] + np.tanh(x[:, 2] + x[:, 3]) + 0.5 * x[:, 4] ** 2 + 0.3 * x[:, 5] * x[:, 6]
    y = (y - y.mean()) / y.std() + truth.noise * rng.standard_normal(truth.rows)
    y = ((y - y.mean()) / y.std())[:, None]
    N, Q = truth.trained, truth.queries
    x_ri, y_r1 = torch.from_numpy(x), torch.from_numpy(y)
    return Data(x_ri[:N], y_r1[:N], x_ri[N : N + Q], y_r1[N : N + Q])


def build(truth: RegressionConfig, seed: int) -> nn.Sequential:
    """Linear layers named 0, 2, 4, ... with tanh between them, so that the response is smooth."""
    sizes = [FEATURES, *truth.widths, 1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = [part for I, O in itertools.pairwise(sizes) for part in (nn.Linear(I, O), nn.Tanh())]
    return nn.Sequential(*modules[:-1]).to(_WIDE)


def train(model: nn.Sequential, data: Data, truth: RegressionConfig) -> float:
    """Adam on full batches along a cosine to zero; returns the mean squared error that is left."""
    optimiser = torch.optim.Adam(model.parameters(), lr=truth.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, truth.epochs)
    for _ in range(truth.epochs):
        optimiser.zero_grad(set_to_none=True)
        nn.functional.mse_loss(model(data.x_ni), data.y_n1).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(data.x_ni), data.y_n1))


def layers_of(model: nn.Sequential) -> tuple[Layer, ...]:
    return tuple(
        Layer(name, child.out_features, child.in_features + 1, True, name)
        for name, child in model.named_children()
        if isinstance(child, nn.Linear)
    )


def tokens(model: nn.Sequential, x_ni: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer, s_no = dh/dy_l (for one output h) and a_ni with the bias's 1: J_n = s_n a_n^T."""
    inputs, outputs = {}, {}
    h = x_ni
    for name, child in model.named_children():
        linear = isinstance(child, nn.Linear)
        if linear:
            inputs[name] = torch.cat([h.detach(), h.new_ones(len(h), 1)], dim=1)
        h = child(h)
        if linear:
            outputs[name] = h
    s = torch.autograd.grad(h.sum(), list(outputs.values()))
    return {name: (s_no, inputs[name]) for name, s_no in zip(outputs, s, strict=True)}


def jacobian(layers: tuple[Layer, ...], found: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """J [N, P] of the tracked parameters, laid out as `join` has them."""
    return join(layers, {name: s_no[:, :, None] * a_ni[:, None, :] for name, (s_no, a_ni) in found.items()})


def fit(found: Mapping[str, tuple[Tensor, Tensor]], seed: int) -> dict[str, LayerFactors]:
    """EK-FAC's factors with pseudo-targets h + noise: a pseudo-gradient is the noise times dh/dy."""
    rows = len(next(iter(found.values()))[0])
    noise_n1 = torch.from_numpy(np.random.default_rng([seed, 1]).standard_normal((rows, 1)))
    factors = {}
    for name, (s_no, a_ni) in found.items():
        a_n1i, s_n1o = a_ni[:, None], (noise_n1 * s_no)[:, None]
        moments = {}
        for kind, x_n1k in (("A", a_n1i), ("S", s_n1o)):
            total = BlockDiagonal.zeros(x_n1k.shape[-1], 1, dtype=_WIDE)
            add_second_moment(total, x_n1k)
            moments[kind] = BlockDiagonal((mirror(total).blocks[0] / rows,))
        A_eigenvalues, Q_A = eigenbasis(moments["A"], f"A of {name}")
        S_eigenvalues, Q_S = eigenbasis(moments["S"], f"S of {name}")
        Lambda = torch.zeros(s_no.shape[1], a_ni.shape[1], dtype=_WIDE)
        add_squared_gradients(Lambda, s_n1o, a_n1i, Q_S, Q_A)
        factors[name] = LayerFactors(moments["A"], moments["S"], Q_A, Q_S, A_eigenvalues, S_eigenvalues, Lambda / rows)
    return factors


def solve_exactly(J_np: Tensor, lambda_p: Tensor, v_kp: Tensor) -> Tensor:
    """(J^T J / N + lambda)^-1 v by the Woodbury identity: one N x N system, whatever P is."""
    N = len(J_np)
    scaled_np = J_np / lambda_p
    inner_nn = N * torch.eye(N, dtype=J_np.dtype) + scaled_np @ J_np.T
    return v_kp / lambda_p - torch.linalg.solve(inner_nn, scaled_np @ v_kp.T).T @ scaled_np


def validate(config: ValidateJob, log: Callable[[str], None]) -> tuple[Comparison, pa.Table, dict[str, Any]]:
    """The whole study; the table goes to <output>/validate/against_pbrf_regression.parquet.

    Raises:
        InfscanError: for settings that cannot work, or a validation that would take too long.
    """
    truth, seed = config.truth, config.seed
    assert isinstance(truth, RegressionConfig)
    config.validate.check()
    torch.set_num_threads(config.cluster.cpus_per_rank)
    store = Store(config.output) / "validate"
    points, data = sampled_points(truth, truth.trained, seed), invent(truth, seed)
    model = trained(truth, data, seed, store, log)
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    layers, found = layers_of(model), tokens(model, data.x_ni)
    factors, fit_seconds = timed(lambda: fit(found, seed))
    relative, absolute = config.factors.damping.relative, config.factors.damping.absolute
    dampings = dampings_of(factors, relative, absolute)
    query_ids = [f"row-{truth.trained + row}" for row in range(truth.queries)]
    problem = RegressionProblem(
        model, [layer.name for layer in layers], data.x_ni, data.y_n1, data.test_x_qi, data.test_y_q1
    )
    # Without EK-FAC's factors: L-BFGS comes to the tolerance sooner here, and owes them nothing.
    recipe = {"weights": weights, "data": [truth.rows, truth.noise, seed], "damping": plain(config.factors.damping)}
    responder = Responder(problem, query_ids, dampings, settings_of(truth), None, store / "responses", recipe)
    hours = responder.check_affordable(points, config.validate.max_hours)
    log(f"PBRF: {len(points)} of {problem.size} training points, at most {hours * 60:.1f} minutes")
    scored = methods(model, data, points, factors, dampings, config)
    recorded = responder.record(points, log)
    with torch.no_grad():
        errors = [
            float(nn.functional.mse_loss(model(x), y))
            for x, y in ((data.x_ni, data.y_n1), (data.test_x_qi, data.test_y_q1))
        ]
    extra = {"damping": plain(config.factors.damping), "weights": weights, "mean_squared_errors": errors}
    return concluded(config, query_ids, scored, recorded, fit_seconds, extra, "against_pbrf_regression")


def trained(truth: RegressionConfig, data: Data, seed: int, store: Store, log: Callable[[str], None]) -> nn.Sequential:
    """The trained MLP, from storage where it was trained before."""
    model = build(truth, seed)
    recipe = [truth.rows, truth.noise, truth.widths, truth.epochs, truth.learning_rate, seed]
    path = f"regression-{fingerprint(recipe)[:16]}.safetensors"
    if not store.exists(path):
        started = time.perf_counter()
        error = train(model, data, truth)
        log(f"trained in {time.perf_counter() - started:.0f} s, mean squared error {error:.3g}")
        write_tensors(store, path, model.state_dict())
    model.load_state_dict(read_tensors(store, path))
    return model


def methods(
    model: nn.Sequential,
    data: Data,
    points: list[int],
    factors: Mapping[str, LayerFactors],
    dampings: Mapping[str, float],
    config: ValidateJob,
) -> list[Scored]:
    """Every method's scores of the points, [Q, M]: <x, grad L(z)> with its own x = (G + lambda)^-1 grad(-f)."""
    layers = layers_of(model)
    J_np = jacobian(layers, tokens(model, data.x_ni))
    with torch.no_grad():
        residuals_n1 = model(data.x_ni) - data.y_n1
        test_q1 = model(data.test_x_qi) - data.test_y_q1
    # -f is the test row's loss: both gradients are (h - y) dh.
    v_kp = test_q1 * jacobian(layers, tokens(model, data.test_x_qi))
    gradients_mp = (residuals_n1 * J_np)[points]
    lambda_p = damping_vector(layers, dampings, v_kp)

    ekfac = ekfac_inverse(layers, {name: (one, dampings[name]) for name, one in factors.items()})

    def product(x_kp: Tensor, rows: NDArray[np.int64]) -> Tensor:
        J_rp = J_np[rows]
        return x_kp @ J_rp.T @ J_rp / len(rows)

    solutions = {
        EKFAC: timed(lambda: ekfac(v_kp)),
        DOT: (v_kp, 0.0),
        GGN: timed(lambda: solve_exactly(J_np, lambda_p, v_kp)),
    }
    solutions |= by_lissa(product, v_kp, lambda_p, len(J_np), config.validate.lissa, config.seed)[0]
    scored = [Scored(name, (x_kp @ gradients_mp.T).numpy(), seconds) for name, (x_kp, seconds) in solutions.items()]
    return [*scored, Scored(RANDOM, random_scores(len(v_kp), len(points), config.seed), 0.0)]
