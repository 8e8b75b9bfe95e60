"""The settings of `infscan study`: the group `study` has a class for each study."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from infscan.config.schema import MISSING
from infscan.errors import ConfigError

PLANTED = "infscan://demo/planted.jsonl"


@dataclass
class StudyConfig:
    """The group `study`. name: of the study, and of the files that it writes."""

    name: ClassVar[str]

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""


@dataclass
class SparsityConfig(StudyConfig):
    """How sparse influence is: the tail of every query's scores (needs scan.scores=all)."""

    name: ClassVar[str] = "sparsity"
    tail: float | None = None
    """Share of the scanned sequences, the strongest ones, that laws are fitted to (Grosse et al. 2023: 0.0001); null
    starts at the score from which a power law fits best (smallest KS distance), among the 2,000 strongest."""
    least: int = 50
    """Rows that a tail needs to be fitted."""
    shares: list[float] = field(default_factory=lambda: [0.001, 0.01, 0.1])
    """Shares of the sequences, the strongest ones, whose part of the influence is reported."""
    resamples: int = 200
    """Synthetic tails behind a goodness of fit."""

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
    """Which layers carry influence: the published rows' layer margins, by block and third."""

    name: ClassVar[str] = "layers"
    rows: int = 10
    """Published rows per query and side whose layer margins are averaged."""
    resamples: int = 1000
    """Bootstrap resamples behind an interval."""

    def check(self) -> None:
        if self.rows < 1 or self.resamples < 20:
            raise ConfigError(f"study.rows={self.rows}, study.resamples={self.resamples}: too few; give more.")


@dataclass
class WordOrderConfig(StudyConfig):
    """Whether a text counts that states the fact backwards: of planted documents that were scanned, or of texts that
    `infscan explain` scored (study.texts)."""

    name: ClassVar[str] = "word_order"
    texts: str | None = None
    """JSONL file of texts that `infscan facts` wrote and `infscan explain` scored; null studies planted documents."""
    explained: str | None = None
    """Folder of the explanation of study.texts; null is <run>/explain/facts."""
    runs: list[str] = field(default_factory=list)
    """Runs of other models (seeds, sizes), same queries, with study.texts explained in <run>/explain/facts."""
    planted: str = PLANTED
    """JSONL file of the planted documents in the scanned corpus: rows of `id`, `fact` and `partition`."""
    dot_product: str | None = None
    """Run over the same corpus with factors=identity, to compare with; null compares with TF-IDF alone."""
    question: str | None = None
    """Query whose strongest documents are printed; null is the first fact's, on its first token."""
    resamples: int = 2000
    """Bootstrap resamples behind an interval."""

    def check(self) -> None:
        if self.texts is None and (self.explained or self.runs):
            raise ConfigError(
                "study.texts: no value given; make texts of facts with infscan facts, and score them with infscan "
                "explain (study.explained and study.runs are about them)."
            )
        if self.texts is not None and self.dot_product:
            raise ConfigError("study.dot_product is about planted documents; leave study.texts out, or it.")


@dataclass
class MemorisationConfig(StudyConfig):
    """Which of the strongest rows contain the completion word for word."""

    name: ClassVar[str] = "memorisation"
    rows: int = 10
    """Proponents of each query that are searched, the strongest ones."""

    def check(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"study.rows={self.rows}: search at least one row.")


@dataclass
class ModelsConfig(StudyConfig):
    """How several models' top lists differ: what they share, and the words that rows share with their query."""

    name: ClassVar[str] = "models"
    runs: list[str] = field(default_factory=list)
    """Finished runs of other models, with the corpus and the queries of `run`."""
    tops: list[int] = field(default_factory=lambda: [10, 100])
    """Lengths of the lists that are compared."""
    resamples: int = 2000
    """Bootstrap resamples behind an interval."""

    def check(self) -> None:
        if not self.runs:
            raise ConfigError("study.runs: no value given; give the other models' runs, study.runs=[...].")
        if min(self.tops, default=0) < 1:
            raise ConfigError(f"study.tops={self.tops}: lengths of top lists, each at least 1.")


@dataclass
class CrossLingualConfig(StudyConfig):
    """What a query's top list shares with its translation's."""

    name: ClassVar[str] = "cross_lingual"
    pairs: str | None = None
    """JSONL file of queries and their translations: rows of `query` and `translation` (their ids) and,
    optionally, `query_document` and `translation_document`."""
    tops: list[int] = field(default_factory=lambda: [10, 100])
    """Lengths of the lists that are compared."""
    resamples: int = 2000
    """Bootstrap resamples behind an interval."""

    def check(self) -> None:
        if self.pairs is None:
            raise ConfigError("study.pairs: no value given; give a JSONL file with `query` and `translation` per line.")
        if min(self.tops, default=0) < 1:
            raise ConfigError(f"study.tops={self.tops}: lengths of top lists, each at least 1.")


@dataclass
class SideBySideConfig(StudyConfig):
    """Queries of several kinds and models side by side: a page to read, shared words and numbers, layers."""

    name: ClassVar[str] = "side_by_side"
    runs: list[str] = field(default_factory=list)
    """Finished runs of other models, with the same queries."""
    kinds: list[str] = field(default_factory=list)
    """Kinds of queries: an id without its last -part; all where empty."""
    rows: int = 3
    """Proponents of each query and run on the page."""
    resamples: int = 2000
    """Bootstrap resamples behind an interval."""

    def check(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"study.rows={self.rows}: read at least one row.")


@dataclass
class ExtrapolationConfig(StudyConfig):
    """How many sequences an unfiltered scan needs to match the TF-IDF filter's rows, by the tail's power law."""

    name: ClassVar[str] = "extrapolation"
    filtered: str | None = None
    """Finished run over the sequences that `infscan tfidf` kept, with the queries and the factors of `run`."""
    tail: float = 0.0001
    """Share of the unfiltered sequences, the strongest ones, that the power law is fitted to (Grosse et al. 2023:
    0.0001); a larger tail narrows the interval, and is less like a power law."""
    least: int = 50
    """Rows that the tail has at least."""
    ks: list[int] = field(default_factory=lambda: [1, 10, 100])
    """Ranks in the filtered run whose score is to be matched."""
    resamples: int = 1000
    """Bootstrap resamples behind an interval."""

    def check(self) -> None:
        if self.filtered is None:
            raise ConfigError(
                "study.filtered: no value given; give a run over the filter's sequences (corpus.path=<its output>), "
                "with this run's queries and factors.path."
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
    """A study of a finished run."""

    run: str = MISSING
    """A finished run: folder or URI."""
    output: str | None = None
    """Folder or URI of the study's table and figures; null is <run>/studies."""
    seed: int = 0
    """Seed of what is resampled."""
    study: StudyConfig = field(default_factory=StudyConfig)

    @property
    def folder(self) -> str:
        return self.output or f"{self.run.rstrip('/')}/studies"
