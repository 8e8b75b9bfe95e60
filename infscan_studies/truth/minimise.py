"""The minimum of PBRF's objective for one training point: Adam, or L-BFGS in coordinates that suit the curvature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from infscan.errors import ModelError
from infscan.influence.inverse import from_core, to_core
from infscan.influence.layers import LayerFactors
from infscan_studies.config import Optimiser
from infscan_studies.truth.problems import Problem, Tracked

# Growth of the learning rate at each step that brings the lowest gradient yet: what was halved too early recovers.
_RISE = 1.02
# Pairs of steps and gradients that L-BFGS remembers.
_MEMORY = 100
# Gradients that one line search may take.
_LINE_SEARCH = 25


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


class Coordinates(Protocol):
    """delta = R u, with R R^T near the inverse of the objective's curvature; they change a path, not the minimum.

    Both ways on vectors [P] over the tracked parameters: every layer's [W, b], row by row, one layer after another.
    """

    def out(self, u_p: Tensor) -> Tensor:
        """R u."""
        ...

    def into(self, gradient_p: Tensor) -> Tensor:
        """R^T g."""
        ...


class LayerCoordinates:
    """R = (G_l + lambda_l)^(-1/2) layer by layer, with EK-FAC's G_l, or lambda_l^(-1/2) for a layer without factors."""

    def __init__(
        self, tracked: Tracked, dampings: Mapping[str, float], factors: Mapping[str, LayerFactors] | None = None
    ) -> None:
        self.shapes = {name: matrix(layer).shape for name, layer in tracked.items()}
        self.dampings, self.factors = dampings, factors or {}

    def out(self, u_p: Tensor) -> Tensor:
        return self._each(u_p, forward=True)

    def into(self, gradient_p: Tensor) -> Tensor:
        return self._each(gradient_p, forward=False)

    def _each(self, x_p: Tensor, *, forward: bool) -> Tensor:
        parts = x_p.split([shape.numel() for shape in self.shapes.values()])
        done = []
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            layer, lam, x_1oi = self.factors.get(name), self.dampings[name], part.view(1, *shape)
            if layer is None:
                moved_1oi = x_1oi / math.sqrt(lam)
            elif forward:
                moved_1oi = from_core(x_1oi / (layer.Lambda + lam).sqrt(), layer)
            else:
                moved_1oi = to_core(x_1oi, layer) / (layer.Lambda + lam).sqrt()
            done.append(moved_1oi.flatten())
        return torch.cat(done)


class DenseCoordinates:
    """R = C^-T of the Cholesky factor C C^T = G + lambda of all tracked parameters together.

    G_pp: [P, P], for example `truth.fisher.sampled_fisher`; overwritten. lambda_p: [P]. Two triangular solves of P^2
    operations each per gradient.
    """

    def __init__(self, G_pp: Tensor, lambda_p: Tensor) -> None:
        G_pp.diagonal().add_(lambda_p)
        self.lower_pp = torch.linalg.cholesky(G_pp)

    def out(self, u_p: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.lower_pp.T, u_p[:, None], upper=True)[:, 0]

    def into(self, gradient_p: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.lower_pp, gradient_p[:, None], upper=False)[:, 0]


class Objective:
    """(1/N) sum_i D_L + eps L(z_m) + sum_l lambda_l/2 |theta_l - theta_s,l|^2 at a problem's present parameters.

    Made at theta_s. `value` and `scale` are the value and the gradient's norm there, those of eps L alone, as the
    divergence and the proximal term are at their minimum; that gradient is left in `grad`, for the optimisers.
    """

    def __init__(self, problem: Problem, point: int, eps: float, dampings: Mapping[str, float]) -> None:
        self.problem, self.point, self.eps, self.dampings = problem, point, eps, dampings
        self.start = {name: tuple(p.detach().clone() for p in layer) for name, layer in problem.tracked.items()}
        loss = eps * problem.loss(point)
        loss.backward()
        self.value, self.scale = float(loss.detach()), self.norm()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for layer in self.problem.tracked.values() for parameter in layer]

    def norm(self) -> float:
        """Of the parameters' `grad`."""
        return norm(self.parameters)

    def gradient(self) -> Tensor:
        """The parameters' `grad`: [P]."""
        layers = self.problem.tracked.values()
        return torch.cat([matrix([p.grad for p in layer if p.grad is not None]).flatten() for layer in layers])

    def evaluate(self) -> float:
        """The value; the gradient is left in the parameters' `grad`."""
        for parameter in self.parameters:
            parameter.grad = None
        value = 0.0
        for divergence in self.problem.divergences():
            divergence.backward()
            value += float(divergence.detach())
        loss = self.eps * self.problem.loss(self.point)
        loss.backward()
        value += float(loss.detach())
        with torch.no_grad():
            for name, layer in self.problem.tracked.items():
                for parameter, initial in zip(layer, self.start[name], strict=True):
                    assert parameter.grad is not None, f"{name} takes no part in the divergence"
                    moved = parameter - initial
                    parameter.grad.add_(moved, alpha=self.dampings[name])
                    value += self.dampings[name] / 2 * float(moved.double().square().sum())
        return value

    @torch.no_grad()
    def place(self, delta_p: Tensor) -> None:
        """Set the tracked parameters to theta_s + delta."""
        shapes = [matrix(layer).shape for layer in self.problem.tracked.values()]
        parts = delta_p.split([shape.numel() for shape in shapes])
        for (name, layer), shape, part in zip(self.problem.tracked.items(), shapes, parts, strict=True):
            moved_oi = part.view(shape)
            pieces = [moved_oi[:, : layer[0].numel() // len(moved_oi)], moved_oi[:, -1]]
            for parameter, initial, move in zip(layer, self.start[name], pieces, strict=False):
                parameter.copy_(initial + move.reshape_as(parameter))

    @torch.no_grad()
    def leave(self) -> None:
        """Back to theta_s."""
        for name, layer in self.problem.tracked.items():
            for parameter, initial in zip(layer, self.start[name], strict=True):
                parameter.copy_(initial)
                parameter.grad = None


def adam(objective: Objective, settings: PbrfSettings) -> tuple[bool, list[float]]:
    """Adam until the relative gradient norm is below the tolerance; whether it came there, and the norms on the way.

    Raises:
        ModelError: where the gradient stops being finite.
    """
    groups = []
    for name, layer in objective.problem.tracked.items():
        entries = sum(parameter.numel() for parameter in layer)
        rms, lam = norm(layer) / math.sqrt(entries), objective.dampings[name]
        groups.append({"params": list(layer), "lr": settings.learning_rate * rms / lam, "eps": 1e-8 * rms or 1e-30})
    optimiser = torch.optim.Adam(groups, betas=(settings.beta1, settings.beta2))
    history: list[float] = []
    lowest, since = math.inf, 0
    for _ in range(settings.max_steps):
        objective.evaluate()
        history.append(objective.norm() / objective.scale)
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


def lbfgs(objective: Objective, settings: PbrfSettings, coordinates: Coordinates) -> tuple[bool, list[float]]:
    """L-BFGS over u, theta = theta_s + c R u; what `adam` returns.

    c makes the gradient 1 long at the start, for an objective in units of c^2: L-BFGS's own thresholds are absolute.
    The first step tried is one of length 1 along the gradient, Newton's own where R R^T is the inverse curvature.
    Bounded in gradients rather than steps: each of a line search's costs as much as any other.

    Raises:
        ModelError: where the gradient stops being finite.
    """
    first_p = coordinates.into(objective.gradient())
    unit = float(first_p.norm())
    u = torch.zeros_like(first_p, requires_grad=True)
    seen = [_Seen(u.detach().clone(), objective.value / unit**2, first_p / unit, 1.0)]
    evaluations = 1

    def found() -> _Seen | None:
        """The evaluation at u, of those since the last step began."""
        return next((one for one in seen if torch.equal(one.u_p, u)), None)

    def closure() -> float:
        nonlocal evaluations
        known = found()
        if known is None:  # a step asks again for the value at which the last one ended
            evaluations += 1
            objective.place(unit * coordinates.out(u.detach()))
            value = objective.evaluate()
            gradient_p = coordinates.into(objective.gradient())
            known = _Seen(u.detach().clone(), value / unit**2, gradient_p / unit, objective.norm() / objective.scale)
            seen.append(known)
        u.grad = known.gradient_p.clone()
        return known.value

    optimiser = torch.optim.LBFGS(
        [u],
        # Its first step is this rate over the gradient's 1-norm, the later ones are of the rate alone.
        lr=max(1.0, float(first_p.abs().sum()) / unit),
        max_iter=1,
        max_eval=_LINE_SEARCH,
        history_size=_MEMORY,
        line_search_fn="strong_wolfe",
        tolerance_grad=0,
        tolerance_change=0,
    )
    history = [1.0]
    while True:
        before = evaluations
        optimiser.step(closure)
        optimiser.param_groups[0]["lr"] = 1.0
        closure()
        here = found()
        assert here is not None
        seen[:] = [here]
        history.append(here.norm)
        if not math.isfinite(here.norm):
            raise ModelError(f"PBRF's gradient is {here.norm} after {evaluations} evaluations: raise the damping.")
        # Without a new evaluation the line search has come to what rounding can tell apart.
        if here.norm <= settings.tolerance or evaluations == before or evaluations >= settings.max_steps:
            objective.place(unit * coordinates.out(u.detach()))
            return here.norm <= settings.tolerance, history


@dataclass(frozen=True)
class _Seen:
    """The objective at u_p: its value, its gradient in u's coordinates, the parameters' relative gradient norm."""

    u_p: Tensor
    value: float
    gradient_p: Tensor
    norm: float


def matrix(layer: Sequence[Tensor]) -> Tensor:
    """[W, b], or W: [O, I]."""
    weight_oi, *bias = layer
    return torch.cat([weight_oi, *(b[:, None] for b in bias)], dim=1)


def norm(parameters: Sequence[nn.Parameter]) -> float:
    """Of their `grad`."""
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))
