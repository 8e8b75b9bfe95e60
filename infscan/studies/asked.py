"""What jobs/study.py is told: a finished run, and which study of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from infscan.config import MISSING
from infscan.errors import ConfigError


class Study(StrEnum):
    sparsity = "sparsity"
    layers = "layers"
    word_order = "word_order"
    memorisation = "memorisation"
    models = "models"
    cross_lingual = "cross_lingual"
    side_by_side = "side_by_side"
    extrapolation = "extrapolation"


@dataclass
class StudyConfig:
    """The group `study`."""

    name: Study = Study.sparsity

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""


@dataclass
class SparsityConfig(StudyConfig):
    """tail: the share of the scanned sequences that the tail's laws are fitted to, the strongest ones (G23: 0.0001);
    null: from the score on from which a power law fits best (the smallest KS distance), among the 2,000 strongest.

    least: rows that a tail must have to be fitted. shares: of the sequences, whose part of the influence is told.
    resamples: synthetic tails behind a goodness of fit.
    """

    name: Study = Study.sparsity
    tail: float | None = None
    least: int = 50
    shares: list[float] = field(default_factory=lambda: [0.001, 0.01, 0.1])
    resamples: int = 200

    def check(self) -> None:
        if self.tail is not None and not 0 < self.tail <= 1:
            raise ConfigError(f"study.tail={self.tail}: a share of the sequences, above 0 and up to 1.")
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(f"study.shares={self.shares}: shares of the sequences, each above 0 and up to 1.")
        if self.least < 10 or self.resamples < 20:
            raise ConfigError(
                f"study.least={self.least}, study.resamples={self.resamples}: a law fitted to fewer than 10 rows, or "
                "judged by fewer than 20 synthetic tails, says nothing; give more."
            )


@dataclass
class LayersConfig(StudyConfig):
    """rows: published rows per query and side whose layer margins are taken."""

    name: Study = Study.layers
    rows: int = 10
    resamples: int = 1000

    def check(self) -> None:
        if self.rows < 1 or self.resamples < 20:
            raise ConfigError(f"study.rows={self.rows}, study.resamples={self.resamples}: too few; give more.")


@dataclass
class WordOrderConfig(StudyConfig):
    """texts: of jobs/facts.py. explained: where jobs/explain.py scored them (null: <run>/explain/facts).

    runs: of other models (seeds, sizes) that were asked the same; each with the texts scored in <run>/explain/facts.
    """

    name: Study = Study.word_order
    texts: str | None = None
    explained: str | None = None
    runs: list[str] = field(default_factory=list)
    resamples: int = 2000

    def check(self) -> None:
        if self.texts is None:
            raise ConfigError(
                "study.texts: no value given; make texts of facts with jobs/facts.py, and score them with "
                "jobs/explain.py."
            )


@dataclass
class MemorisationConfig(StudyConfig):
    """rows: the strongest proponents of each query that are searched."""

    name: Study = Study.memorisation
    rows: int = 10

    def check(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"study.rows={self.rows}: search at least one row.")


@dataclass
class ModelsConfig(StudyConfig):
    """runs: finished runs of other models, with the same corpus and queries as `run`. tops: lengths of lists."""

    name: Study = Study.models
    runs: list[str] = field(default_factory=list)
    tops: list[int] = field(default_factory=lambda: [10, 100])
    resamples: int = 2000

    def check(self) -> None:
        if not self.runs:
            raise ConfigError("study.runs: no value given; give the other models' runs, study.runs=[...].")
        if min(self.tops, default=0) < 1:
            raise ConfigError(f"study.tops={self.tops}: lengths of top lists, each at least 1.")


@dataclass
class CrossLingualConfig(StudyConfig):
    """pairs: JSONL of queries and their translations (infscan/studies/cross_lingual.py). tops: lengths of lists."""

    name: Study = Study.cross_lingual
    pairs: str | None = None
    tops: list[int] = field(default_factory=lambda: [10, 100])
    resamples: int = 2000

    def check(self) -> None:
        if self.pairs is None:
            raise ConfigError("study.pairs: no value given; give a JSONL file with `query` and `translation` per line.")
        if min(self.tops, default=0) < 1:
            raise ConfigError(f"study.tops={self.tops}: lengths of top lists, each at least 1.")


@dataclass
class SideBySideConfig(StudyConfig):
    """runs: finished runs of other models, asked the same. kinds: of queries, an id without its last -part (empty:
    all). rows: proponents of each query and run."""

    name: Study = Study.side_by_side
    runs: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    rows: int = 3
    resamples: int = 2000

    def check(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"study.rows={self.rows}: read at least one row.")


@dataclass
class ExtrapolationConfig(StudyConfig):
    """filtered: a finished run over what jobs/tfidf.py kept, with the queries and factors of `run`.

    tail: the share of the unfiltered sequences, the strongest, that the power law is fitted to; least: rows at least.
    ks: whose strength is to be matched, the filter's k-th strongest.
    """

    name: Study = Study.extrapolation
    filtered: str | None = None
    tail: float = 0.01
    least: int = 50
    ks: list[int] = field(default_factory=lambda: [1, 10, 100])
    resamples: int = 1000

    def check(self) -> None:
        if self.filtered is None:
            raise ConfigError(
                "study.filtered: no value given; give a run over the filter's sequences (corpus=filtered), with this "
                "run's queries and factors.path."
            )
        if not 0 < self.tail <= 1 or self.least < 10:
            raise ConfigError(
                f"study.tail={self.tail}, study.least={self.least}: a share of the sequences, above 0 and up to 1, and "
                "at least 10 rows."
            )
        if min(self.ks, default=0) < 1:
            raise ConfigError(f"study.ks={self.ks}: ranks, each at least 1.")


@dataclass
class StudyJob:
    """run: a finished run. output: where the study goes (null: <run>/studies)."""

    run: str = MISSING
    output: str | None = None
    seed: int = 0
    study: StudyConfig = field(default_factory=StudyConfig)

    @property
    def folder(self) -> str:
        return self.output or f"{self.run.rstrip('/')}/studies"


SCHEMAS = (
    SparsityConfig,
    LayersConfig,
    WordOrderConfig,
    MemorisationConfig,
    ModelsConfig,
    CrossLingualConfig,
    SideBySideConfig,
    ExtrapolationConfig,
)
