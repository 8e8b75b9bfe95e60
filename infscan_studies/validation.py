"""What a validation would cost: a long one is refused before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch import Tensor

from infscan.errors import ConfigError
from infscan.model.gauss_newton import GaussNewton
from infscan_studies.config import ValidateConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """What a validation's products with G come to at most.

    flops: about 4 (N + N_tracked) per token and vector (forward and reverse mode through the model, and the tracked
    layers' own part of each), for every product there may be. seconds: by the time that single products took.
    """

    flops: float
    seconds: float

    @property
    def hours(self) -> float:
        return self.seconds / 3600

    def refuse_above(self, max_hours: float) -> None:
        """Raises ConfigError where it would run for longer."""
        if self.hours > max_hours:
            raise ConfigError(
                f"This validation would take up to {self.hours:.2g} hours ({self.flops:.2g} FLOP at "
                f"{self.flops / self.seconds / 1e9:.3g} GFLOP/s), more than validate.max_hours={max_hours:g}. Lower "
                "validate.curvature_sequences, .queries, .cg.max_iterations or .lissa.depths, or raise max_hours."
            )


def estimate(ggn: GaussNewton, v_kp: Tensor, settings: ValidateConfig) -> Cost:
    """The cost of all products: CG's from the time of one over a full batch, LiSSA's from that of one of its steps."""
    lengths = np.asarray([len(one) for one in ggn.sequences])
    model = ggn.worker.model.module
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    # A tied table is a matrix product once, as the unembedding; an untied one is looked up.
    parameters = ggn.worker.model.parameters - (0 if output is not None and output.weight is table else table.numel())
    per_token = 4.0 * (parameters + ggn.size) * len(v_kp)
    batch = min(settings.lissa.batch, len(lengths))
    full = np.arange(max(1, int((np.cumsum(lengths) <= settings.tokens_per_batch).sum())))
    ggn.product(v_kp, np.arange(batch))  # the first one sets things up
    _, step_seconds = timed(lambda: ggn.product(v_kp, np.arange(batch)))
    _, full_seconds = timed(lambda: ggn.product(v_kp, full))
    steps, iterations = max(settings.lissa.depths), settings.cg.max_iterations
    tokens = iterations * float(lengths.sum()) + steps * batch * float(lengths.mean())
    seconds = steps * step_seconds + iterations * full_seconds * float(lengths.sum() / lengths[full].sum())
    return Cost(per_token * tokens, seconds)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its seconds."""
    started = time.perf_counter()
    return call(), time.perf_counter() - started
