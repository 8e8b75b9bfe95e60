"""What a validation is told, and what it would cost: a long one is refused before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from torch import Tensor

from infscan.config import Config
from infscan.errors import ConfigError
from infscan.truth.ggn import GaussNewton

T = TypeVar("T")


@dataclass
class CGConfig:
    """The reference's stopping rule, whether EK-FAC preconditions it, and iterates to judge on the way."""

    tolerance: float = 1e-3
    preconditioned: bool = True
    max_iterations: int = 40
    snapshots: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20])


@dataclass
class LissaConfig:
    """depths: where the series is judged. batch: sequences per step. scale: null = 1.5 times the largest eigenvalue
    seen over four random batches, with the largest damping."""

    depths: list[int] = field(default_factory=lambda: [10, 30, 100, 300])
    batch: int = 4
    scale: float | None = None


@dataclass
class ValidateConfig:
    """Sizes of a validation.

    curvature_sequences: what G and EK-FAC's factors are of. sequences: what is scored. queries: how many of the file's
    (a seeded sample). tokens_per_batch: padded tokens in a product with G. max_hours: a longer one is refused.
    """

    curvature_sequences: int = 96
    sequences: int = 500
    queries: int = 6
    tokens_per_batch: int = 1024
    resamples: int = 1000
    max_hours: float = 1.0
    cg: CGConfig = field(default_factory=CGConfig)
    lissa: LissaConfig = field(default_factory=LissaConfig)

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        positive: dict[str, float | None] = {
            "curvature_sequences": self.curvature_sequences,
            "sequences": self.sequences - 2,
            "queries": self.queries,
            "tokens_per_batch": self.tokens_per_batch,
            "resamples": self.resamples,
            "max_hours": self.max_hours,
            "cg.tolerance": self.cg.tolerance,
            "cg.max_iterations": self.cg.max_iterations,
            "lissa.batch": self.lissa.batch,
            "lissa.scale": self.lissa.scale,
            "lissa.depths": min(self.lissa.depths, default=0),
        }
        for key, value in positive.items():
            if value is not None and not value > 0:
                raise ConfigError(f"validate.{key}: too small to compare anything; give more (sequences: at least 3).")


@dataclass
class ValidateJob(Config):
    """What jobs/validate.py is told: a run's configuration, and `validate`."""

    validate: ValidateConfig = field(default_factory=ValidateConfig)


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
    model = ggn.rank.model.module
    table, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    # A tied table is a matrix product once, as the unembedding; an untied one is looked up.
    parameters = ggn.rank.model.parameters - (0 if output is not None and output.weight is table else table.numel())
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
