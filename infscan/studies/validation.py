"""What a validation is told, and what it would cost: a long one is refused before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

import numpy as np
from torch import Tensor

from infscan.config import Config, Dtype
from infscan.errors import ConfigError
from infscan.model.gauss_newton import GaussNewton
from infscan.truth.minimise import Optimiser, PbrfSettings

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


class Truth(StrEnum):
    """What the methods are judged by. retraining has a job of its own, jobs/lds.py: a scan stands between its steps."""

    cg = "cg"
    pbrf = "pbrf"
    pbrf_regression = "pbrf_regression"
    retraining = "retraining"
    coverage = "coverage"


@dataclass
class TruthConfig:
    """The group `truth`."""

    name: Truth = Truth.cg

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        if self.name is Truth.retraining:
            raise ConfigError(
                "truth=retraining: the model that is retrained must be scanned in between, so this truth has a job of "
                "its own, in two steps: python jobs/lds.py corpus.path=... output=... (LDS and QLD)."
            )


@dataclass
class ResponseConfig(TruthConfig):
    """PBRF. points: training points, a seeded sample of the N that the objective and EK-FAC's factors are of.

    optimiser, tolerance, max_steps: as in `infscan.truth.minimise.PbrfSettings`.
    """

    points: int = 24
    optimiser: Optimiser = Optimiser.lbfgs
    tolerance: float = 0.1
    max_steps: int = 100

    def check(self) -> None:
        for key, value in (("points", self.points - 2), ("tolerance", self.tolerance), ("max_steps", self.max_steps)):
            if not value > 0:
                raise ConfigError(f"truth.{key}: too small to compare anything; give more (points: at least 3).")

    @property
    def settings(self) -> PbrfSettings:
        return PbrfSettings(self.optimiser, tolerance=self.tolerance, max_steps=self.max_steps)


class CoordinateSystem(StrEnum):
    """What L-BFGS moves in. ekfac: any size. fisher: one dense matrix, far fewer gradients, few tracked parameters."""

    ekfac = "ekfac"
    fisher = "fisher"


@dataclass
class PbrfConfig(ResponseConfig):
    """The configured language model; N is validate.curvature_sequences.

    dtype: of the model while it responds; in less than float64, small responses drown in rounding.
    draws: labels per position for the dense Fisher. max_dense_bytes: what it and its factor may need.
    """

    name: Truth = Truth.pbrf
    dtype: Dtype = Dtype.float64
    coordinates: CoordinateSystem = CoordinateSystem.ekfac
    draws: int = 64
    max_dense_bytes: int = 4 << 30

    def check(self) -> None:
        super().check()
        if self.draws < 1:
            raise ConfigError(f"truth.draws={self.draws}: the Fisher is of drawn labels; give at least 1.")


@dataclass
class RegressionConfig(ResponseConfig):
    """An MLP trained on invented data: `rows` of eight features, a tenth of them kept for the measurements.

    queries: measurements, on rows not trained on. epochs: of full batches; widths: of the hidden layers.
    noise: standard deviation of the target's, in units of the target's own.
    """

    name: Truth = Truth.pbrf_regression
    points: int = 500
    tolerance: float = 3e-4
    max_steps: int = 300
    rows: int = 1030
    noise: float = 0.2
    widths: list[int] = field(default_factory=lambda: [64, 64])
    epochs: int = 2000
    learning_rate: float = 3e-3
    queries: int = 10

    def check(self) -> None:
        super().check()
        smallest = min([*self.widths, self.epochs, self.queries], default=0)
        if smallest < 1 or not self.widths or self.points > self.trained or self.queries > self.rows - self.trained:
            raise ConfigError(
                f"truth.rows={self.rows} are {self.trained} training points and {self.rows - self.trained} to measure "
                f"on: not enough for points={self.points} and queries={self.queries}, or one of widths={self.widths}, "
                f"epochs={self.epochs} is below 1."
            )

    @property
    def trained(self) -> int:
        """N: the rows that are trained on."""
        return self.rows - self.rows // 10


@dataclass
class CoverageConfig(TruthConfig):
    """How much of an unfiltered scan's top the TF-IDF filter keeps; model, corpus and queries are not read.

    run: a finished scan of the whole corpus. filter: what jobs/tfidf.py made of the same corpus and queries. tops: how
    many of the scan's rows per query and side are looked for, among the filter's first `ks`.
    """

    name: Truth = Truth.coverage
    run: str | None = None
    filter: str | None = None
    tops: list[int] = field(default_factory=lambda: [10, 100])
    ks: list[int] = field(default_factory=lambda: [10, 30, 100, 300, 1000, 3000, 10_000])

    def check(self) -> None:
        if not self.run or not self.filter:
            raise ConfigError(
                f"truth.run={self.run}, truth.filter={self.filter}: give a finished scan of a whole corpus, and the "
                "output of jobs/tfidf.py on the same corpus (corpus.path=<run>/corpus) and queries."
            )
        if min([*self.tops, *self.ks], default=0) < 1 or not self.tops or not self.ks:
            raise ConfigError(f"truth.tops={self.tops}, truth.ks={self.ks}: numbers of rows, each at least 1.")


@dataclass
class ValidateJob(Config):
    """What jobs/validate.py is told: a run's configuration, `validate`, and the ground truth."""

    validate: ValidateConfig = field(default_factory=ValidateConfig)
    truth: TruthConfig = field(default_factory=TruthConfig)


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
