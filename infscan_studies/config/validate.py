"""The settings of `infscan validate`: the group `truth` has a class for each ground truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from infscan.config.schema import Config, Dtype
from infscan.errors import ConfigError


@dataclass
class CGConfig:
    tolerance: float = 1e-3
    """Relative residual at which conjugate gradients stop."""
    preconditioned: bool = True
    """Precondition with EK-FAC."""
    max_iterations: int = 40
    """Iterations at most."""
    snapshots: list[int] = field(default_factory=lambda: [1, 2, 5, 10, 20])
    """Iterations whose solutions are judged on the way."""


@dataclass
class LissaConfig:
    depths: list[int] = field(default_factory=lambda: [10, 30, 100, 300])
    """Steps after which the series is judged."""
    batch: int = 4
    """Sequences per step."""
    scale: float | None = None
    """Divisor of the matrix; null is 1.5 times the largest eigenvalue of four random batches, plus the damping."""


@dataclass
class ValidateConfig:
    curvature_sequences: int = 96
    """Sequences that the Gauss-Newton matrix and EK-FAC's factors are computed on."""
    sequences: int = 500
    """Sequences that are scored."""
    queries: int = 6
    """Queries of the file, a seeded sample."""
    tokens_per_batch: int = 1024
    """Padded tokens in a product with the Gauss-Newton matrix."""
    resamples: int = 1000
    """Bootstrap resamples behind an interval."""
    max_hours: float = 1.0
    """A validation that would take longer is refused before it starts."""
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
class TruthConfig:
    """The group `truth`; cg, conjugate gradients on the damped Gauss-Newton system (validate.cg), has no keys here."""

    name: ClassVar[str] = "cg"

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""


class Optimiser(StrEnum):
    """What finds the minimum; lbfgs in the coordinates it is given."""

    adam = "adam"
    lbfgs = "lbfgs"


@dataclass
class ResponseConfig(TruthConfig):
    """A proximal Bregman response (PBRF) to each of a few training points."""

    points: int = 24
    """Training points, a seeded sample of those that the objective and EK-FAC's factors are computed on."""
    optimiser: Optimiser = Optimiser.lbfgs
    """What minimises the proximal Bregman objective."""
    tolerance: float = 0.1
    """Gradient of the objective, relative to its value at the start, at which a minimisation stops."""
    max_steps: int = 100
    """Gradients of the objective at most."""

    def check(self) -> None:
        for key, value in (("points", self.points - 2), ("tolerance", self.tolerance), ("max_steps", self.max_steps)):
            if not value > 0:
                raise ConfigError(f"truth.{key}: too small to compare anything; give more (points: at least 3).")


class CoordinateSystem(StrEnum):
    """What L-BFGS moves in. ekfac: any size. fisher: one dense matrix, far fewer gradients, few tracked parameters."""

    ekfac = "ekfac"
    fisher = "fisher"


@dataclass
class PbrfConfig(ResponseConfig):
    """The response of the configured language model to validate.curvature_sequences training points."""

    name: ClassVar[str] = "pbrf"
    dtype: Dtype = Dtype.float64
    """Dtype of the model while it responds; in less than float64, rounding hides small responses."""
    coordinates: CoordinateSystem = CoordinateSystem.ekfac
    """What L-BFGS moves in: `ekfac` for any size; `fisher` is one dense matrix, needs far fewer gradients, and fits few
    tracked parameters."""
    draws: int = 64
    """Labels drawn per position for the dense Fisher."""
    max_dense_bytes: int = 4 << 30
    """Bytes that the dense Fisher and its factor may need."""

    def check(self) -> None:
        super().check()
        if self.draws < 1:
            raise ConfigError(f"truth.draws={self.draws}: the Fisher is of drawn labels; give at least 1.")


@dataclass
class RegressionConfig(ResponseConfig):
    """The response of an MLP trained on invented data; model, corpus and queries are not read."""

    name: ClassVar[str] = "pbrf_regression"
    points: int = 500
    tolerance: float = 3e-4
    max_steps: int = 300
    rows: int = 1030
    """Rows of eight features; a tenth of them is kept for the measurements."""
    noise: float = 0.2
    """Standard deviation of the target's noise, in units of the target's own."""
    widths: list[int] = field(default_factory=lambda: [64, 64])
    """Widths of the hidden layers."""
    epochs: int = 2000
    """Full batches that the MLP is trained on."""
    learning_rate: float = 3e-3
    """Learning rate at the start; it falls along a cosine to zero."""
    queries: int = 10
    """Measurements, on rows that the MLP was not trained on."""

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
    """How much of an unfiltered scan's top the TF-IDF filter keeps; model, corpus and queries are not read."""

    name: ClassVar[str] = "coverage"
    run: str | None = None
    """A finished scan of the whole corpus."""
    filter: str | None = None
    """Output of `infscan tfidf` on the same corpus and queries."""
    tops: list[int] = field(default_factory=lambda: [10, 100])
    """Numbers of the scan's rows, per query and side, that are looked for."""
    ks: list[int] = field(default_factory=lambda: [10, 30, 100, 300, 1000, 3000, 10_000])
    """Numbers of the filter's first sequences that they are looked for among."""

    def check(self) -> None:
        if not self.run or not self.filter:
            raise ConfigError(
                f"truth.run={self.run}, truth.filter={self.filter}: give a finished scan of a whole corpus, and the "
                "output of infscan tfidf on the same corpus (corpus.path=<run>/corpus) and queries."
            )
        if min([*self.tops, *self.ks], default=0) < 1 or not self.tops or not self.ks:
            raise ConfigError(f"truth.tops={self.tops}, truth.ks={self.ks}: numbers of rows, each at least 1.")


@dataclass
class ValidateJob(Config):
    """A run's settings, a validation's, and the ground truth."""

    run: str | None = None
    """Finished run whose model, corpus, queries and settings of factors are judged, in place of presets and keys."""
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    truth: TruthConfig = field(default_factory=TruthConfig)
