"""The proximal Bregman response function (PBRF; Bae et al. 2022; docs/method.md#ground-truths).

theta*(eps) = argmin (1/N) sum_i D_L(h(theta, x_i), h(theta_s, x_i)) + eps L(z_m, theta)
                     + sum_l lambda_l/2 |theta_l - theta_s,l|^2

over the tracked parameters, the others fixed, started at theta_s. What influence functions estimate to first order:
[f(theta*(eps)) - f(theta_s)] / eps -> -(grad f)^T (G + lambda)^-1 grad L(z_m), infscan's score, for eps -> 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from infscan.errors import ConfigError
from infscan.influence.inverse import damping
from infscan.influence.layers import LayerFactors
from infscan_studies.config import Optimiser
from infscan_studies.truth.minimise import Coordinates, LayerCoordinates, Objective, PbrfSettings, adam, lbfgs
from infscan_studies.truth.problems import Problem


@dataclass(frozen=True)
class Response:
    """[f(theta*) - f(theta_s)] / eps of every measurement, [Q], and how the optimiser came there.

    history: the relative gradient norm at each step. converged: whether it came below the tolerance.
    """

    values: NDArray[np.float64]
    converged: bool
    history: list[float] = field(repr=False)


def respond(
    problem: Problem,
    point: int,
    eps: float,
    dampings: Mapping[str, float],
    settings: PbrfSettings,
    coordinates: Coordinates | None = None,
) -> Response:
    """Minimise the objective for one training point and leave the parameters at theta_s again.

    dampings: lambda_l by tracked layer, the estimator's. coordinates: L-BFGS's; without them, it scales by lambda_l
    alone. Parameters should be float64: in less, small responses drown in rounding.

    Raises:
        ConfigError: for eps = 0, or a tracked layer without a damping.
        ModelError: where the objective's gradient stops being finite.
    """
    if eps == 0 or set(dampings) != set(problem.tracked):
        raise ConfigError(
            f"PBRF needs eps other than 0 (eps={eps}) and one damping for each of {sorted(problem.tracked)}; "
            f"dampings are given for {sorted(dampings)}."
        )
    before = problem.measure()
    objective = Objective(problem, point, eps, dampings)
    try:
        if objective.scale == 0:
            converged, history = True, [0.0]
        elif settings.optimiser is Optimiser.adam:
            converged, history = adam(objective, settings)
        else:
            coordinates = coordinates or LayerCoordinates(problem.tracked, dampings)
            converged, history = lbfgs(objective, settings, coordinates)
        after = problem.measure()
    finally:
        objective.leave()
    return Response((after - before) / eps, converged, history)


def both_ways(
    problem: Problem,
    point: int,
    dampings: Mapping[str, float],
    settings: PbrfSettings,
    coordinates: Coordinates | None = None,
) -> tuple[Response, Response]:
    """The responses to eps = +1/N and -1/N; how far they differ says how far they are from first order."""
    plus, minus = (respond(problem, point, sign / problem.size, dampings, settings, coordinates) for sign in (1, -1))
    return plus, minus


def dampings_of(
    factors: Mapping[str, LayerFactors], relative: float = 0.1, absolute: float | None = None
) -> dict[str, float]:
    """lambda_l of fitted factors, as the estimator has it."""
    return {name: damping(each.Lambda, relative, absolute, name, each.stack_mean) for name, each in factors.items()}
