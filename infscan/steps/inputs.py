"""A run's inputs at one stage: checked before any worker starts, identified by their content and not by their paths."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from infscan.config import Config, Dtype, Matmul, ModelConfig, fingerprint, stage_output
from infscan.corpus.tokenizer import Tokenizer, load_tokenizer
from infscan.engine.executor import RankMemory
from infscan.influence.layers import Layer
from infscan.influence.precision import Multiply
from infscan.model.architecture import (
    Architecture,
    check_agree,
    describe,
    load_config,
)
from infscan.model.folder import model_folder
from infscan.model.load import resolve_dtype
from infscan.model.suffix import last_blocks
from infscan.queries import Query, queries_fingerprint, read_queries
from infscan.steps.corpus_inputs import bos_of, input_files, separated, settings_for, wants_bos
from infscan.storage import Identity

log = logging.getLogger("infscan")
_CHECKED = "config.json and weights: whole files up to 256 MiB, sizes and spread samples of larger ones"


@dataclass(frozen=True)
class Inputs:
    """The configuration at a stage, and what it names."""

    config: Config
    architecture: Architecture
    tokenizer: Tokenizer | None
    # Sorted by id: the tables are, and nothing depends on the order of the file.
    queries: tuple[Query, ...] = ()
    # What ranks hold the model on: `cpu` or `cuda`.
    device: str = "cpu"
    # What a rank has on a GPU; None for a CPU, or where the cluster does not say.
    memory: RankMemory | None = None
    # Fingerprints of the models of the stages after this one, in order.
    later_models: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.architecture.layers

    @property
    def query_ids(self) -> tuple[str, ...]:
        return tuple(query.id for query in self.queries)

    @cached_property
    def dtype(self) -> str:
        """The dtype the model runs in, `auto` resolved: part of what factors are fitted for."""
        return self.resolved(self.config.model.dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of a parameter."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found.itemsize

    @property
    def matmul(self) -> Multiply:
        """How ranks multiply float32: a CPU exactly, whatever is asked for."""
        return "tf32" if self.device == "cuda" and self.config.factors.matmul is Matmul.tf32 else "exact"

    @cached_property
    def refine_dtype(self) -> str:
        """The dtype that candidates are scored again in, `auto` resolved."""
        return self.resolved(self.config.refine_dtype)

    @property
    def query_dtype(self) -> torch.dtype:
        """The dtype that queries are laid out in, as on every rank."""
        return in_dtype(self.config.scan.query_dtype, getattr(torch, self.dtype))

    def resolved(self, dtype: Dtype) -> str:
        """A dtype's name, `auto` resolved for this model and device."""
        if dtype is not Dtype.auto:
            return dtype.value
        config = load_config(model_folder(self.architecture.folder))
        return str(resolve_dtype(dtype, config, self.device)).removeprefix("torch.")

    @property
    def model(self) -> ModelConfig:
        """What ranks load: a hub id at the revision that this process resolved it to."""
        model = self.config.model
        return replace(model, revision=self.model_identity.revision)

    @property
    def model_identity(self) -> Identity:
        path, known = self.config.model.path, self.architecture
        return Identity("model", path, known.fingerprint, _CHECKED, known.revision)

    def fingerprints(self) -> dict[str, str | None]:
        """Of the inputs by content: what a path leads to, not the path."""
        return {
            "model": self.architecture.fingerprint,
            "tokenizer": self.tokenizer.digest if self.tokenizer else None,
            "queries": queries_fingerprint(list(self.queries)),
            # The models that come after, the last of which is asked.
            **({"stages": fingerprint(list(self.later_models))} if self.later_models else {}),
        }


def in_dtype(dtype: Dtype | None, model: torch.dtype) -> torch.dtype:
    """What queries are laid out in (`scan.query_dtype`): the model's dtype, where nothing else is asked for."""
    if dtype is None or dtype is Dtype.auto:
        return model
    found: torch.dtype = getattr(torch, dtype.value)
    return found


def open_inputs(config: Config) -> Inputs:
    """Model, tokenizer and corpora of a configuration, without its queries.

    Raises:
        InfscanError: for anything wrong with them.
    """
    architecture = describe(
        config.model.path,
        config.model.tracked,
        attention=config.model.attention_implementation,
        revision=config.model.revision,
    ).with_span(config.factors.span, config.factors.span_from)
    if isinstance(config.scan.sieve, int):
        last_blocks(architecture.layers, config.scan.sieve)
    tokenizer = load_tokenizer(architecture.folder)
    for corpus in (config.corpus, config.factors.corpus):
        input_files(corpus)
        settings_for(corpus, architecture, tokenizer)
    if config.corpus.bos is None and wants_bos(config.corpus, tokenizer):
        log.info("texts       begin with BOS, as the tokenizer has it; corpus.bos=false leaves it out")
    elif separated(config.corpus, tokenizer) and bos_of(config.corpus, architecture, tokenizer) is not None:
        log.info("texts       begin with EOS, which training has between documents; corpus.bos=false leaves it out")
    return Inputs(config, architecture, tokenizer)


def later_configs(config: Config) -> list[Config]:
    """The configuration at every stage after the one that is scanned, in order, each with an output of its own."""
    numbers = range(config.scan.stage + 1, len(config.stages) + 1)
    return [replace(config.at_stage(number), output=stage_output(config.output, number)) for number in numbers]


def check_stages_agree(scanned: Inputs, later: Sequence[Inputs]) -> None:
    """Hold every later stage's model against the scanned one's.

    Raises:
        ModelError: where they are not of one architecture.
    """
    first = scanned.config.scan.stage
    for number, stage in enumerate(later, start=first):
        check_agree(scanned.architecture, stage.architecture, f"stages.{first - 1}", f"stages.{number}")


def read_measured_queries(inputs: Inputs) -> tuple[Query, ...]:
    """The query file, read with the tokenizer of the model that is asked."""
    config, architecture = inputs.config, inputs.architecture
    queries = read_queries(
        config.queries,
        inputs.tokenizer,
        vocab_size=architecture.vocab_size,
        context=architecture.context,
        bos_id=bos_of(config.corpus, architecture, inputs.tokenizer),
    )
    return tuple(sorted(queries, key=lambda query: query.id))
