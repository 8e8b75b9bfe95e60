"""The settings of `infscan bank`: what is trained, and what is judged by it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from infscan.errors import ConfigError
from infscan_studies.config.retraining import LdsCorpus, LdsQueries
from infscan_studies.config.training import Sizes, TrainingSettings


@dataclass
class BankRecipe:
    """A size and a way of training it, under a name."""

    name: str = "adamw"
    """What its models are called: a folder of the output, and a column of the tables."""
    model: Sizes = field(default_factory=Sizes)
    training: TrainingSettings = field(default_factory=TrainingSettings)


class BankMethod(StrEnum):
    """How a bank's full models score sequences: EK-FAC, K-FAC (its eigenvalues uncorrected), the gradient dot product,
    BM25, the whitened cosine of hidden states, and the iterated inverses."""

    ekfac = "ekfac"
    kfac = "kfac"
    identity = "identity"
    bm25 = "bm25"
    cosine = "cosine"
    cg = "cg"
    astra = "astra"


@dataclass
class SweepConfig:
    """What is judged by the bank."""

    methods: list[BankMethod] = field(default_factory=list)
    """Of ekfac, kfac, identity, bm25, cosine, cg and astra; none where the bank is only trained."""
    damping: list[float] = field(default_factory=lambda: [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
    """Values of factors.damping.relative, for ekfac and kfac."""
    auto: bool = True
    """Judge ekfac with factors.damping.auto as well."""
    tracked: list[str] = field(
        default_factory=lambda: ["mlp", "mlp+attention", "head", "mlp+head", "last", "last+head"]
    )
    """Sets of layers: of mlp, attention, head and `last` (the last block's MLP), several joined by +."""
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
    resamples: int = 2000
    """Bootstrap resamples, over queries, behind an interval."""

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        parts = {part for one in [*self.tracked, *self.iterated] for part in one.split("+")}
        unknown = parts - {"mlp", "attention", "head", "last"}
        if unknown:
            raise ConfigError(
                f"sweep.tracked: {', '.join(sorted(unknown))} is unknown; join mlp, attention, head and last by +."
            )
        if min([*self.damping, *self.iterated_damping], default=1) <= 0:
            raise ConfigError(f"sweep.damping={self.damping}: every value has to be above 0.")
        counts = [*self.steps, *self.epochs, self.removed_queries, self.removal_seeds, self.models]
        if min(counts) < 1 or min(self.iterated_sequences, default=0) < 0 or self.resamples < 20:
            names = "steps", "epochs", "iterated_sequences", "removed_queries", "removal_seeds", "models", "resamples"
            said = ", ".join(f"sweep.{name}={getattr(self, name)}" for name in names)
            raise ConfigError(f"{said}: give at least 1 (iterated_sequences: or 0, all), and 20 resamples.")


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
