"""The settings of `infscan lds`: scores judged by retraining."""

from __future__ import annotations

from dataclasses import dataclass, field

from infscan.config.schema import MISSING
from infscan_studies.config.training import Sizes, TrainingSettings


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
