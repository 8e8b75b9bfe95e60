"""The proximal Bregman response function (PBRF; Bae et al. 2022, arXiv 2209.05364; METHOD: ground truths).

theta*(eps) = argmin (1/N) sum_i D_L(h(theta, x_i), h(theta_s, x_i)) + eps L(z_m, theta)
                     + sum_l lambda_l/2 |theta_l - theta_s,l|^2

over the tracked parameters, the others fixed, started at theta_s. What influence functions estimate to first order:
[f(theta*(eps)) - f(theta_s)] / eps -> -(grad f)^T (G + lambda)^-1 grad L(z_m), infscan's score, for eps -> 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from infscan.corpus.batches import pad
from infscan.errors import ConfigError, ModelError
from infscan.influence.inverse import damping, from_core, to_core
from infscan.influence.layers import Layer, LayerFactors
from infscan.model.measure import next_tokens, summed_losses
from infscan.queries import Query
from infscan.truth.retrain import measure_queries

# Growth of the learning rate at each step that brings the lowest gradient yet: what was halved too early recovers.
_RISE = 1.02
# Pairs of steps and gradients that L-BFGS remembers.
_MEMORY = 100
# Gradients that one line search may take.
_LINE_SEARCH = 25

Tracked = Mapping[str, tuple[nn.Parameter, ...]]


class Optimiser(StrEnum):
    """What finds the minimum. lbfgs: in coordinates scaled by EK-FAC's factors, or by lambda_l alone without them."""

    adam = "adam"
    lbfgs = "lbfgs"


@dataclass(frozen=True)
class PbrfSettings:
    """How to find the minimum, and when to stop.

    learning_rate (Adam): the first step of a layer, in units of the farthest that its parameters typically go,
    |eps| rms(grad L) / lambda_l; halved whenever the gradient has found no new low for `patience` steps, and raised
    by 2 % at each new low.
    tolerance: |gradient of the objective| over |eps grad L(z_m, theta_s)|, its value at the start, at which to stop.
    max_steps: gradients of the objective, at most.
    """

    optimiser: Optimiser = Optimiser.adam
    learning_rate: float = 0.03
    beta1: float = 0.9
    beta2: float = 0.99
    tolerance: float = 1e-3
    max_steps: int = 2000
    patience: int = 25


@dataclass(frozen=True)
class Response:
    """[f(theta*) - f(theta_s)] / eps of every measurement, [Q], and how the optimiser came there.

    history: the relative gradient norm at each step. converged: whether it came below the tolerance.
    """

    values: NDArray[np.float64]
    converged: bool
    history: list[float] = field(repr=False)


class Problem(Protocol):
    """A model at theta_s whose tracked parameters may move, on N training points."""

    tracked: Tracked
    size: int

    def divergences(self) -> Iterator[Tensor]:
        """Scalars with a graph each, to be used one after another; their sum is (1/N) sum_i D_L."""
        ...

    def loss(self, point: int) -> Tensor:
        """L(z, theta) of a training point."""
        ...

    def measure(self) -> NDArray[np.float64]:
        """f of every measurement at the present parameters, [Q]."""
        ...


def respond(
    problem: Problem,
    point: int,
    eps: float,
    dampings: Mapping[str, float],
    settings: PbrfSettings,
    factors: Mapping[str, LayerFactors] | None = None,
) -> Response:
    """Minimise the objective for one training point and leave the parameters at theta_s again.

    dampings: lambda_l by tracked layer, the estimator's. factors: what L-BFGS's coordinates are scaled by; without
    them, by lambda_l alone. They change its path, not the minimum. Parameters should be float64: in less, small
    responses drown in rounding.

    Raises:
        ConfigError: for eps = 0, or a tracked layer without a damping.
        ModelError: where the objective's gradient stops being finite.
    """
    if eps == 0 or set(dampings) != set(problem.tracked):
        raise ConfigError(
            f"PBRF needs eps other than 0 (eps={eps}) and one damping for each of {sorted(problem.tracked)}; "
            f"dampings are given for {sorted(dampings)}."
        )
    start = {name: tuple(p.detach().clone() for p in layer) for name, layer in problem.tracked.items()}
    before = problem.measure()
    try:
        scale = _start_norm(problem, point, eps)
        if scale == 0:
            converged, history = True, [0.0]
        elif settings.optimiser is Optimiser.adam:
            converged, history = _adam(problem, point, eps, dampings, start, scale, settings)
        else:
            converged, history = _lbfgs(problem, point, eps, dampings, start, scale, settings, factors or {})
        after = problem.measure()
    finally:
        with torch.no_grad():
            for name, layer in problem.tracked.items():
                for parameter, initial in zip(layer, start[name], strict=True):
                    parameter.copy_(initial)
                    parameter.grad = None
    return Response((after - before) / eps, converged, history)


def responses(
    problem: Problem,
    points: Sequence[int],
    dampings: Mapping[str, float],
    settings: PbrfSettings,
    factors: Mapping[str, LayerFactors] | None = None,
) -> tuple[NDArray[np.float64], int]:
    """The mean response for eps = +1/N and -1/N of every point, [points, Q], and how many of these did not converge."""
    rows, stopped = [], 0
    for point in points:
        pair = both_ways(problem, point, dampings, settings, factors)
        rows.append((pair[0].values + pair[1].values) / 2)
        stopped += sum(not response.converged for response in pair)
    return np.array(rows), stopped


def both_ways(
    problem: Problem,
    point: int,
    dampings: Mapping[str, float],
    settings: PbrfSettings,
    factors: Mapping[str, LayerFactors] | None = None,
) -> tuple[Response, Response]:
    """The responses to eps = +1/N and -1/N; how far they differ says how far they are from first order."""
    plus, minus = (respond(problem, point, sign / problem.size, dampings, settings, factors) for sign in (1, -1))
    return plus, minus


def dampings_of(
    factors: Mapping[str, LayerFactors], relative: float = 0.1, absolute: float | None = None
) -> dict[str, float]:
    """lambda_l of fitted factors, as the estimator has it."""
    return {name: damping(layer.Lambda, relative, absolute, name) for name, layer in factors.items()}


def _adam(
    problem: Problem,
    point: int,
    eps: float,
    dampings: Mapping[str, float],
    start: Mapping[str, tuple[Tensor, ...]],
    scale: float,
    settings: PbrfSettings,
) -> tuple[bool, list[float]]:
    """Adam until the relative gradient norm is below the tolerance; whether it came there, and the norms on the way.

    scale: the norm at the start, whose gradient still stands in the parameters' `grad`.
    """
    parameters = _parameters(problem)
    groups = []
    for name, layer in problem.tracked.items():
        entries = sum(parameter.numel() for parameter in layer)
        rms = _norm(layer) / math.sqrt(entries)
        groups.append(
            {"params": list(layer), "lr": settings.learning_rate * rms / dampings[name], "eps": 1e-8 * rms or 1e-30}
        )
    optimiser = torch.optim.Adam(groups, betas=(settings.beta1, settings.beta2))
    history: list[float] = []
    lowest, since = math.inf, 0
    for _ in range(settings.max_steps):
        _objective(problem, point, eps, dampings, start)
        history.append(_norm(parameters) / scale)
        if not math.isfinite(history[-1]):
            raise ModelError(
                f"PBRF's gradient is {history[-1]} after {len(history)} steps: lower learning_rate="
                f"{settings.learning_rate}."
            )
        if history[-1] <= settings.tolerance:
            return True, history
        factor = 1.0
        if history[-1] < lowest:
            lowest, since, factor = history[-1], 0, _RISE
        else:
            since += 1
            if since == settings.patience:
                since, factor = 0, 0.5
        for group in optimiser.param_groups:
            group["lr"] *= factor
        optimiser.step()
    return False, history


def _lbfgs(
    problem: Problem,
    point: int,
    eps: float,
    dampings: Mapping[str, float],
    start: Mapping[str, tuple[Tensor, ...]],
    scale: float,
    settings: PbrfSettings,
    factors: Mapping[str, LayerFactors],
) -> tuple[bool, list[float]]:
    """L-BFGS over u, theta_l = theta_s,l + c (G_l + lambda_l)^(-1/2) u_l with EK-FAC's G_l; what `_adam` returns.

    c makes the gradient 1 long at the start, for an objective in units of c^2: L-BFGS's own thresholds are absolute.
    Bounded in gradients rather than steps: each of a line search's costs as much as any other.
    """
    parameters = _parameters(problem)
    shapes = {name: _matrix(layer).shape for name, layer in problem.tracked.items()}
    sizes = [shape.numel() for shape in shapes.values()]
    u = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device, requires_grad=True)
    seen: list[_Seen] = []
    evaluations = 0

    def rooted(name: str, matrix_oi: Tensor, *, forward: bool) -> Tensor:
        """(G_l + lambda_l)^(-1/2) in EK-FAC's eigenbases: out of u (forward), or of a gradient into u's coordinates."""
        layer, lam = factors.get(name), dampings[name]
        if layer is None:
            return matrix_oi / math.sqrt(lam)
        root_oi = (layer.Lambda + lam).sqrt()
        return (
            from_core(matrix_oi[None] / root_oi, layer)[0] if forward else to_core(matrix_oi[None], layer)[0] / root_oi
        )

    def gradient() -> Tensor:
        """What stands in the parameters' `grad`, in u's coordinates but for c."""
        parts = [
            rooted(name, _matrix([p.grad for p in layer if p.grad is not None]), forward=False).flatten()
            for name, layer in problem.tracked.items()
        ]
        return torch.cat(parts)

    unit = float(gradient().norm())

    @torch.no_grad()
    def place(u_p: Tensor) -> None:
        for (name, layer), part in zip(problem.tracked.items(), u_p.split(sizes), strict=True):
            moved_oi = unit * rooted(name, part.view(shapes[name]), forward=True)
            parts = [moved_oi[:, : layer[0].numel() // len(moved_oi)], moved_oi[:, -1]]
            for parameter, initial, move in zip(layer, start[name], parts, strict=False):
                parameter.copy_(initial + move.reshape_as(parameter))

    def found() -> _Seen | None:
        """The evaluation at u, of those since the last step began."""
        return next((one for one in seen if torch.equal(one.u_p, u)), None)

    def closure() -> float:
        nonlocal evaluations
        known = found()
        if known is None:  # a step asks again for the value at which the last one ended
            evaluations += 1
            place(u.detach())
            value = _objective(problem, point, eps, dampings, start)
            known = _Seen(u.detach().clone(), value / unit**2, gradient() / unit, _norm(parameters) / scale)
            seen.append(known)
        u.grad = known.gradient_p.clone()
        return known.value

    optimiser = torch.optim.LBFGS(
        [u],
        lr=1.0,
        max_iter=1,
        max_eval=_LINE_SEARCH,
        history_size=_MEMORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )
    history: list[float] = []
    while True:
        before = evaluations
        optimiser.step(closure)
        closure()
        here = found()
        assert here is not None
        seen[:] = [here]
        history.append(here.norm)
        if not math.isfinite(here.norm):
            raise ModelError(f"PBRF's gradient is {here.norm} after {evaluations} evaluations: raise the damping.")
        # Without a new evaluation the line search has come to what rounding can tell apart.
        if here.norm <= settings.tolerance or evaluations == before or evaluations >= settings.max_steps:
            place(u.detach())
            return here.norm <= settings.tolerance, history


@dataclass(frozen=True)
class _Seen:
    """The objective at u_p: its value, its gradient in u's coordinates, the parameters' relative gradient norm."""

    u_p: Tensor
    value: float
    gradient_p: Tensor
    norm: float


def _objective(
    problem: Problem,
    point: int,
    eps: float,
    dampings: Mapping[str, float],
    start: Mapping[str, tuple[Tensor, ...]],
) -> float:
    """The objective at the present parameters; its gradient is left in their `grad`."""
    for parameter in _parameters(problem):
        parameter.grad = None
    value = 0.0
    for divergence in problem.divergences():
        divergence.backward()
        value += float(divergence.detach())
    loss = eps * problem.loss(point)
    loss.backward()
    value += float(loss.detach())
    with torch.no_grad():
        for name, layer in problem.tracked.items():
            for parameter, initial in zip(layer, start[name], strict=True):
                assert parameter.grad is not None, f"{name} takes no part in the divergence"
                moved = parameter - initial
                parameter.grad.add_(moved, alpha=dampings[name])
                value += dampings[name] / 2 * float(moved.double().square().sum())
    return value


def _start_norm(problem: Problem, point: int, eps: float) -> float:
    """|gradient| at theta_s, where the divergence and the proximal term are at their minimum: that of eps L alone.

    The gradient is left in the parameters' `grad`, where the optimisers take their units from it.
    """
    (eps * problem.loss(point)).backward()
    return _norm(_parameters(problem))


def _parameters(problem: Problem) -> list[nn.Parameter]:
    return [parameter for layer in problem.tracked.values() for parameter in layer]


def _matrix(layer: Sequence[Tensor]) -> Tensor:
    """[W, b], or W: [O, I]."""
    weight_oi, *bias = layer
    return torch.cat([weight_oi, *(b[:, None] for b in bias)], dim=1)


def _norm(parameters: Sequence[nn.Parameter]) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))


def _track(module: nn.Module, layers: Sequence[str]) -> dict[str, tuple[nn.Parameter, ...]]:
    """Let only these layers' weights and biases move."""
    module.requires_grad_(False).eval()
    children = dict(module.named_modules())
    tracked = {name: tuple(children[name].parameters(recurse=False)) for name in layers}
    for parameter in (parameter for layer in tracked.values() for parameter in layer):
        parameter.requires_grad_(True)
    return tracked


class LanguageModelProblem:
    """A causal LM: D_L is KL(p(theta_s) | p(theta)), summed over the positions that L sums over; f as queries have it.

    sequences: the N training points, token ids of at least two tokens each. Positions that predict nothing take no part
    in D_L, as in L (EK-FAC's pseudo-gradients have the last one too). Outputs at theta_s are kept in memory.

    Raises:
        ConfigError: where they would need more than `max_bytes`.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        layers: Sequence[Layer],
        sequences: Sequence[Sequence[int]],
        queries: Sequence[Query],
        *,
        batch_sequences: int = 32,
        max_bytes: int = 4 << 30,
    ) -> None:
        self.module, self.queries, self.size = module, queries, len(sequences)
        self.sequences = [np.asarray(ids, np.int64) for ids in sequences]
        self.tracked: Tracked = _track(module, [layer.name for layer in layers])
        weight = next(module.parameters())
        entries = sum(len(ids) - 1 for ids in self.sequences) * module.get_input_embeddings().num_embeddings
        if entries * weight.element_size() > max_bytes:
            raise ConfigError(
                f"PBRF keeps the outputs of {self.size} sequences, {entries * weight.element_size() / 2**30:.1f} GiB, "
                f"more than max_bytes={max_bytes}; take fewer or shorter sequences, or raise it."
            )
        by_length = sorted(range(self.size), key=lambda row: len(self.sequences[row]))
        self._batches = [by_length[i : i + batch_sequences] for i in range(0, self.size, batch_sequences)]
        with torch.no_grad():
            self._log_p_s = [self._log_p(batch) for batch in self._batches]

    def _padded(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """ids_bt and the mask of real tokens."""
        ids, mask = pad([self.sequences[row] for row in rows])
        device = next(self.module.parameters()).device
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

    def _log_p(self, rows: Sequence[int]) -> Tensor:
        """log p at every position that predicts a token: [positions, V]."""
        ids_bt, mask_bt = self._padded(rows)
        predicts_bt = next_tokens(ids_bt, mask_bt)[1]
        logits_btv = self.module(input_ids=ids_bt, use_cache=False).logits
        return torch.log_softmax(logits_btv[predicts_bt], dim=-1)

    def divergences(self) -> Iterator[Tensor]:
        for rows, log_p_s in zip(self._batches, self._log_p_s, strict=True):
            yield nn.functional.kl_div(self._log_p(rows), log_p_s, reduction="sum", log_target=True) / self.size

    def loss(self, point: int) -> Tensor:
        ids_bt, mask_bt = self._padded([point])
        logits_btv = self.module(input_ids=ids_bt, use_cache=False).logits
        return summed_losses(logits_btv, *next_tokens(ids_bt, mask_bt)).sum()

    def measure(self) -> NDArray[np.float64]:
        return measure_queries(self.module, self.queries)


class RegressionProblem:
    """Any module on vectors with L = |h(x) - y|^2 / 2, so that D_L = |h(theta, x) - h(theta_s, x)|^2 / 2.

    x_ni, y_no: the N training points. A measurement is f = -|h(x) - y|^2 / 2 of a test point (test_x_qi, test_y_qo).
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[str],
        x_ni: Tensor,
        y_no: Tensor,
        test_x_qi: Tensor,
        test_y_qo: Tensor,
    ) -> None:
        self.module, self.size = module, len(x_ni)
        self.x_ni, self.y_no, self.test_x_qi, self.test_y_qo = x_ni, y_no, test_x_qi, test_y_qo
        self.tracked: Tracked = _track(module, layers)
        with torch.no_grad():
            self._h_s_no = module(x_ni)

    def divergences(self) -> Iterator[Tensor]:
        yield (self.module(self.x_ni) - self._h_s_no).square().sum() / (2 * self.size)

    def loss(self, point: int) -> Tensor:
        return (self.module(self.x_ni[point]) - self.y_no[point]).square().sum() / 2

    @torch.no_grad()
    def measure(self) -> NDArray[np.float64]:
        values: NDArray[np.float64] = (
            -(self.module(self.test_x_qi) - self.test_y_qo).square().sum(dim=1).double().div(2).cpu().numpy()
        )
        return values
