"""Laws of PBRF: the closed form where there is one, the damped GGN's first-order influence where there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from infscan.errors import ConfigError
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.layers import Layer, LayerFactors
from infscan.model.tracked import tracked_layers
from infscan.queries import Part, Query
from infscan_studies.truth.minimise import DenseCoordinates, LayerCoordinates, Optimiser, PbrfSettings
from infscan_studies.truth.pbrf import both_ways, respond
from infscan_studies.truth.problems import LanguageModelProblem, Problem, RegressionProblem

TIGHT = PbrfSettings(tolerance=1e-7, max_steps=5000)
LBFGS = replace(TIGHT, optimiser=Optimiser.lbfgs)
LAMBDA = 0.1
LM_LAMBDA = 1.0


def responses(
    problem: Problem, points: range, dampings: dict[str, float], settings: PbrfSettings
) -> tuple[np.ndarray, int]:
    """The mean response for eps = +1/N and -1/N of every point, [points, Q], and how many of these did not converge."""
    pairs = [both_ways(problem, point, dampings, settings) for point in points]
    means = np.array([(plus.values + minus.values) / 2 for plus, minus in pairs])
    return means, sum(not response.converged for pair in pairs for response in pair)


@pytest.fixture
def linear() -> RegressionProblem:
    """y = W x + b on 20 points, three inputs and two outputs, float64."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    module = nn.Sequential(nn.Linear(3, 2)).double()
    return RegressionProblem(module, ["0"], x, y, x[:4] + 1, y[:4])


@pytest.mark.parametrize("settings", [TIGHT, LBFGS])
def test_a_linear_models_response_is_the_closed_form(linear: RegressionProblem, settings: PbrfSettings) -> None:
    """argmin is exact: theta - theta_s = -(G + lambda + eps a a^T)^-1 eps grad L."""
    eps, point = 1 / linear.size, 5
    a_ni = torch.cat([linear.x_ni, torch.ones(20, 1, dtype=torch.float64)], dim=1)
    weight, bias = (parameter.detach().clone() for parameter in linear.tracked["0"])
    theta_s = torch.cat([weight, bias[:, None]], dim=1)
    a_i = a_ni[point]
    gradient_oi = torch.outer(theta_s @ a_i - linear.y_no[point], a_i)
    H = a_ni.T @ a_ni / 20 + LAMBDA * torch.eye(4, dtype=torch.float64) + eps * torch.outer(a_i, a_i)
    theta = theta_s - eps * torch.linalg.solve(H, gradient_oi.T).T
    tests = torch.cat([linear.test_x_qi, torch.ones(4, 1, dtype=torch.float64)], dim=1)

    def f(parameters: torch.Tensor) -> torch.Tensor:
        return -(tests @ parameters.T - linear.test_y_qo).square().sum(dim=1) / 2

    found = respond(linear, point, eps, {"0": LAMBDA}, settings)
    assert found.converged
    np.testing.assert_allclose(found.values, ((f(theta) - f(theta_s)) / eps).numpy(), rtol=1e-5)
    assert torch.equal(linear.tracked["0"][0].detach(), weight), "the parameters are left as they were"


def test_factors_change_lbfgss_path_and_not_the_minimum(linear: RegressionProblem) -> None:
    generator = torch.Generator().manual_seed(3)
    bases = [torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0] for n in (4, 2)]
    Q_A, Q_S = (BlockDiagonal((basis,)) for basis in bases)
    Lambda = 10 * torch.rand(2, 4, dtype=torch.float64, generator=generator)
    factors = {"0": LayerFactors(Q_A, Q_S, Q_A, Q_S, torch.ones(4), torch.ones(2), Lambda)}
    plain = respond(linear, 1, 0.05, {"0": LAMBDA}, LBFGS)
    scaled = respond(linear, 1, 0.05, {"0": LAMBDA}, LBFGS, LayerCoordinates(linear.tracked, {"0": LAMBDA}, factors))
    assert plain.converged
    assert scaled.converged
    assert plain.history != scaled.history
    np.testing.assert_allclose(scaled.values, plain.values, rtol=1e-5)


def test_in_the_coordinates_of_the_exact_curvature_the_first_step_is_newtons(linear: RegressionProblem) -> None:
    """What is left after it is the point's own curvature, eps times a rank-one matrix."""
    a_ni = torch.cat([linear.x_ni, torch.ones(20, 1, dtype=torch.float64)], dim=1)
    G_pp = torch.block_diag(*[a_ni.T @ a_ni / 20] * 2)
    coordinates = DenseCoordinates(G_pp, torch.full((8,), LAMBDA, dtype=torch.float64))
    found = respond(linear, 1, 0.05, {"0": LAMBDA}, LBFGS, coordinates)
    plain = respond(linear, 1, 0.05, {"0": LAMBDA}, LBFGS)
    assert found.converged
    assert found.history[1] < 0.3
    assert len(found.history) < len(plain.history)
    np.testing.assert_allclose(found.values, plain.values, rtol=1e-5)


def test_lbfgs_converges_whatever_the_size_of_eps(linear: RegressionProblem) -> None:
    """Its own thresholds are absolute; a response of 1e-7 must not look like none."""
    small, smaller = (respond(linear, 2, eps, {"0": LAMBDA}, LBFGS) for eps in (1e-4, 1e-7))
    assert small.converged
    assert smaller.converged
    np.testing.assert_allclose(smaller.values, small.values, rtol=2e-3)


def test_the_gradient_falls_to_the_tolerance_or_the_response_says_not(linear: RegressionProblem) -> None:
    found = respond(linear, 0, 0.05, {"0": LAMBDA}, PbrfSettings(tolerance=1e-3))
    assert found.history[0] == pytest.approx(1)
    assert found.history[-1] <= 1e-3
    assert not respond(linear, 0, 0.05, {"0": LAMBDA}, PbrfSettings(max_steps=3)).converged


def test_strong_damping_leaves_the_gradient_dot_product(linear: RegressionProblem) -> None:
    values, stopped = responses(linear, range(6), {"0": 1e4}, replace(LBFGS, tolerance=1e-5))
    weight, bias = linear.tracked["0"]

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(value, [weight, bias])])

    test = -(linear.module(linear.test_x_qi) - linear.test_y_qo).square().sum(dim=1) / 2
    queries = torch.stack([torch.autograd.grad(f, [weight], retain_graph=True)[0].flatten() for f in test])
    biases = torch.stack([torch.autograd.grad(f, [bias], retain_graph=True)[0] for f in test])
    points = torch.stack([gradient(linear.loss(point)) for point in range(6)])
    dot_products = -points @ torch.cat([queries, biases], dim=1).T / 1e4
    np.testing.assert_allclose(values, dot_products.numpy(), rtol=1e-3, atol=1e-8)
    assert stopped == 0


@pytest.mark.parametrize(("eps", "dampings"), [(0.0, {"0": 1.0}), (0.1, {}), (0.1, {"0": 1.0, "1": 1.0})])
def test_every_layer_needs_a_damping_and_eps_a_value(
    linear: RegressionProblem, eps: float, dampings: dict[str, float]
) -> None:
    with pytest.raises(ConfigError, match="one damping for each of"):
        respond(linear, 0, eps, dampings, TIGHT)


SEQUENCES = [[(3 * row + step * (1 + row % 3)) % 11 for step in range(3 + row % 5)] for row in range(16)]
QUERIES = [
    Query("completion", (Part((1, 4, 7, 2), (2, 3)),)),
    Query("contrast", (Part((3, 5, 6), (2,)), Part((3, 5, 8), (2,), -1.0))),
]


@pytest.fixture
def tiny() -> tuple[GPTNeoXForCausalLM, tuple[Layer, ...]]:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 6}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=11, max_position_embeddings=8, **sizes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, tracked_layers(model, "mlp")


def first_order(model: GPTNeoXForCausalLM, layers: tuple[Layer, ...], points: range) -> np.ndarray:
    """-(grad f)^T (G + lambda)^-1 grad L with the dense GGN of all tracked layers together: [points, Q]."""
    names = [f"{layer.name}.{part}" for layer in layers for part in ("weight", "bias")]
    parameters = dict(model.named_parameters())
    shapes = [parameters[name].shape for name in names]
    theta = torch.cat([parameters[name].detach().flatten() for name in names])

    def logits(theta: torch.Tensor, ids: list[int]) -> torch.Tensor:
        parts = [part.view(shape) for part, shape in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]
        moved = dict(zip(names, parts, strict=True))
        return functional_call(model, moved, (), {"input_ids": torch.tensor([ids]), "use_cache": False}).logits[0]

    def f(theta: torch.Tensor, query: Query) -> torch.Tensor:
        return sum(
            part.sign * logits(theta, list(part.token_ids)).log_softmax(-1)[t - 1, part.token_ids[t]]
            for part in query.parts
            for t in part.positions
        )

    def loss(theta: torch.Tensor, ids: list[int]) -> torch.Tensor:
        return -logits(theta, ids).log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum()

    G = LM_LAMBDA * torch.eye(len(theta), dtype=torch.float64)
    for ids in SEQUENCES:
        J_tvp = jacrev(logits)(theta, ids)[:-1]
        p_tv = logits(theta, ids)[:-1].softmax(-1)
        H_tvv = torch.diag_embed(p_tv) - p_tv[:, :, None] * p_tv[:, None, :]
        G += torch.einsum("tvp,tvw,twq->pq", J_tvp, H_tvv, J_tvp) / len(SEQUENCES)
    queries_qp = torch.stack([jacrev(f)(theta, query) for query in QUERIES])
    points_mp = torch.stack([jacrev(loss)(theta, SEQUENCES[point]) for point in points])
    return -(points_mp @ torch.linalg.solve(G, queries_qp.T)).detach().numpy()


def test_a_language_models_response_follows_the_damped_ggn(
    tiny: tuple[GPTNeoXForCausalLM, tuple[Layer, ...]],
) -> None:
    model, layers = tiny
    expected = first_order(model, layers, range(3))
    problem = LanguageModelProblem(model, layers, SEQUENCES, QUERIES, batch_sequences=7)
    dampings = {layer.name: LM_LAMBDA for layer in layers}
    found, stopped = responses(problem, range(3), dampings, replace(LBFGS, tolerance=1e-2))
    assert stopped == 0
    for q in range(len(QUERIES)):
        assert np.corrcoef(found[:, q], expected[:, q])[0, 1] > 0.9
    nearly = respond(problem, 2, 1e-4, dampings, replace(LBFGS, tolerance=1e-3))
    np.testing.assert_allclose(nearly.values, expected[2], rtol=1e-2)


def test_only_tracked_parameters_move(tiny: tuple[GPTNeoXForCausalLM, tuple[Layer, ...]]) -> None:
    model, layers = tiny
    LanguageModelProblem(model, layers[:1], SEQUENCES, QUERIES)
    moving = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moving == {f"{layers[0].name}.weight", f"{layers[0].name}.bias"}


def test_weights_that_lie_transposed_are_refused() -> None:
    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).double().eval()
    with pytest.raises(ConfigError, match="Conv1D"):
        LanguageModelProblem(model, tracked_layers(model, "mlp"), SEQUENCES, QUERIES)


def test_outputs_that_do_not_fit_are_refused(tiny: tuple[GPTNeoXForCausalLM, tuple[Layer, ...]]) -> None:
    model, layers = tiny
    with pytest.raises(ConfigError, match=r"keeps the outputs of 16 sequences"):
        LanguageModelProblem(model, layers, SEQUENCES, QUERIES, max_bytes=100)
