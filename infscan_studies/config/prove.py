"""The settings of `infscan prove`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from infscan.config.schema import MISSING, ClusterConfig, Sides
from infscan.errors import ConfigError


class StepOptimizer(StrEnum):
    """What takes a training step."""

    sgd = "sgd"
    adamw = "adamw"


@dataclass
class ProveJob:
    """Training steps on rows of a finished run and on controls, on a copy of the model in memory."""

    run: str = MISSING
    """A finished run: folder or URI."""
    output: str | None = None
    """Folder or URI of the table; null is <run>/prove."""
    query_ids: list[str] = field(default_factory=list)
    """Queries of the run; all where empty."""
    sides: Sides = Sides.both
    """Sides whose published rows are trained on."""
    rows: int = 5
    """Strongest published rows per query and side."""
    controls: int = 5
    """Control sequences per query: random ones, as long as the proponents, and those that BM25 puts first."""
    dot_product: str | None = None
    """A run over the same corpus and queries with factors=identity, whose proponents are a further control."""
    bm25_sequences: int = 50_000
    """Sequences that BM25 chooses among: the whole corpus, or a uniform sample of so many."""
    optimizer: StepOptimizer = StepOptimizer.adamw
    """What takes the steps, from a state of its own and without weight decay."""
    steps: int = 1
    """Training steps on a sequence."""
    also_after: list[int] = field(default_factory=list)
    """Counts below `steps` after which the completion is measured too, on the way: the column `steps` tells them
    apart."""
    learning_rate: float | None = None
    """Of every step; null is the smallest of 1e-8, 3.2e-8, ... at which a sequence's own loss falls by `fall`."""
    fall: float = 0.05
    """Share by which the own loss of half of eight random sequences falls at the learning rate that is looked for."""
    resamples: int = 2000
    """Bootstrap resamples behind an interval."""
    max_hours: float = 2.0
    """A proof that would take longer, by the time of its first steps, is refused."""
    plan: bool = False
    """Say what it would cost, by the time of its first steps, and stop."""
    seed: int = 0
    """Seed of the random controls and of what is resampled."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        for name in ("rows", "controls", "steps", "bm25_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1.")
        if self.resamples < 20:
            raise ConfigError(f"resamples={self.resamples}: give at least 20; an interval of fewer says nothing.")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ConfigError(f"learning_rate={self.learning_rate}: give a number above 0, or null.")
        if not 0 < self.fall < 1:
            raise ConfigError(f"fall={self.fall}: a share of a loss, between 0 and 1.")
        if any(not 0 < count < self.steps for count in self.also_after):
            raise ConfigError(
                f"also_after={self.also_after}: counts of steps on the way to steps={self.steps}, each from 1 to below "
                "it; give more steps, or other counts."
            )

    @property
    def counts(self) -> tuple[int, ...]:
        """The counts of steps after which the completion is measured, ascending."""
        return (*sorted(set(self.also_after)), self.steps)

    @property
    def folder(self) -> str:
        return self.output or f"{self.run.rstrip('/')}/prove"
