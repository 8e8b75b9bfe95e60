"""The settings of commands that take more than a run's, or look at what is finished. No torch, no Ray."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePath
from typing import Any

from infscan.config.schema import MISSING, Backend, ClusterConfig, Config, Measure, Sides
from infscan.errors import ConfigError


@dataclass
class TfidfConfig:
    top_k: int = 10_000
    """Sequences kept per query (as Grosse et al. 2023)."""
    idf_sequences: int | None = None
    """Sequences of a uniform sample that the IDF is computed on; null is every sequence."""
    slice_sequences: int | None = None
    """Sequences per task; null is 16,384, more where that would make above 4,096 tasks. No row depends on it."""


@dataclass
class TfidfJob(Config):
    """A run's settings, and the filter's."""

    tfidf: TfidfConfig = field(default_factory=TfidfConfig)


class IndexCode(StrEnum):
    """What an index keeps of a whitened gradient (docs/index-ask.md)."""

    projected = "projected"
    sketched = "sketched"


@dataclass
class IndexConfig:
    code: IndexCode = IndexCode.projected
    """What is kept of a layer's whitened gradient: `projected` (two-sided random projections of its tokens; no gradient
    is formed), or `sketched` (CountSketch of the gradient, whitened exactly)."""
    width: int = 64
    """A projection is width x width at most in every layer; a sketch has width^2 cells."""
    bits: int = 1
    """Bits of a coordinate: 1, its sign, or 8."""
    layers: str | None = None
    """Regular expression over the names of tracked layers: those that have codes; null is all."""
    gradient_norm: bool = False
    """Keep the norm of every sequence's gradient too: T (O + I) more products a token and layer."""
    seed: int = 0
    """Seed of the projections."""

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        if not 1 <= self.width <= 256:
            raise ConfigError(f"index.width={self.width}: a width from 1 to 256.")
        if self.bits not in (1, 8):
            raise ConfigError(f"index.bits={self.bits}: a coordinate has 1 bit or 8.")
        try:
            re.compile(self.layers or "")
        except re.error as error:
            raise ConfigError(f"index.layers={self.layers!r} is not a regular expression ({error}).") from None


@dataclass
class IndexJob(Config):
    """A run's settings, and what an index keeps."""

    index: IndexConfig = field(default_factory=IndexConfig)

    @property
    def asks(self) -> bool:
        """Whether there are queries too, which the same pass answers."""
        return self.queries.path not in ("", MISSING) or self.queries.prompt is not None

    def check_index(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        self.index.check()
        if self.asks and self.searches:
            raise ConfigError(
                "scan.sieve and scan.candidates_from scan some sequences in full, and an index is of all; leave them "
                "out, or leave the queries out and ask the index."
            )
        if self.stages and self.asks:
            raise ConfigError("stages: an index with queries is of one stage of training; leave the queries out.")


@dataclass
class AskJob:
    """New questions to an index."""

    index: Any = MISSING
    """A finished index, folder or URI; or a list of several with the same factors, asked as one:
    `index=[runs/a,runs/b]`."""
    queries: str | None = None
    """Query file, as `queries.path` of a scan has it."""
    prompt: str | None = None
    """One query's prompt, in place of a file."""
    completion: str | None = None
    """That query's completion."""
    contrast: str | None = None
    """Another completion: the difference of the two log-probabilities is measured."""
    measure: Measure = Measure.completion
    """What is measured of a completion: all of it, its `first` token, or each of its `tokens` apart."""
    top_k: int = 100
    """Published rows per query and side."""
    candidates: int | None = None
    """Rows per query and side that the index chooses, to be scored exactly; null is 4 x top_k."""
    audit_sequences: int | None = 256
    """Sequences drawn at random that are scored exactly too: they say how far rows stand out, and what the index
    missed; 0 leaves it out, and null is 1 % of the index."""
    sides: Sides = Sides.both
    """Sides that are kept: `proponents` raise the completion's probability, `opponents` lower it."""
    model: str | None = None
    """Where the model is now; null is where the index found it."""
    corpus: str | None = None
    """Where the corpus is now; null is where the index found it."""
    factors: str | None = None
    """Where the factors are now; null is where the index found them."""
    output: str = "runs/ask"
    """Folder or URI of the run that the answer becomes."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def indexes(self) -> list[str]:
        """Addresses of the indexes.

        Raises:
            ConfigError: where one is none.
        """
        found = self.index if isinstance(self.index, list) else [self.index]
        if not found or not all(isinstance(one, str | PurePath) and str(one) for one in found):
            raise ConfigError(f"index={self.index}: give a finished index, folder or URI, or a list of several.")
        return [str(one) for one in found]


@dataclass
class DuplicatesJob:
    """Near-duplicates in gradient space, from an index alone."""

    index: str = MISSING
    """A finished index, folder or URI."""
    similar: float = 0.9
    """Cosine of two sequences' whitened gradients, as their codes estimate it, from which they count as alike."""
    output: str | None = None
    """Parquet file to write; null is <index>/duplicates.parquet."""
    seed: int = 0
    """Seed of what is compared."""

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        if not 0.7 <= self.similar <= 1:
            raise ConfigError(f"similar={self.similar}: a cosine from 0.7 to 1; most pairs below that are not found.")

    @property
    def path(self) -> str:
        return self.output or f"{self.index.rstrip('/')}/duplicates.parquet"


@dataclass
class ServeJob:
    """A server over an index."""

    index: Any = MISSING
    """A finished index, folder or URI, or a list of several, as of `infscan ask`."""
    host: str = "127.0.0.1"
    """Address to listen on; another one than this machine's own needs INFSCAN_SERVE_TOKEN in the environment."""
    port: int = 8300
    """Port to listen on; 0 takes a free one."""
    output: str = "runs/serve"
    """Folder or URI that run folders of answers go to."""
    top_k: int = 20
    """Published rows per question and side."""
    candidates: int | None = None
    """Rows per question and side that the index chooses, to be scored exactly; null is 4 x top_k."""
    audit_sequences: int | None = 256
    """Sequences drawn at random that are scored exactly too, as of `infscan ask`."""
    sides: Sides = Sides.both
    """Sides that are kept: `proponents` raise the completion's probability, `opponents` lower it."""
    at_once: int = 64
    """Questions that are asked in one run, where so many wait."""
    most_waiting: int = 256
    """Questions that may wait; more are refused."""
    most_kept: int = 1024
    """Answered questions that are kept in memory; older ones are read from their run folders."""
    most_characters: int = 20_000
    """Characters of a question's texts together."""
    per_minute: int = 60
    """Questions that one client's address may ask in a minute."""
    model: str | None = None
    """Where the model is now; null is where the index found it."""
    corpus: str | None = None
    """Where the corpus is now; null is where the index found it."""
    factors: str | None = None
    """Where the factors are now; null is where the index found them."""
    threads: int = 1
    """Threads that the model computes with."""

    @property
    def is_local(self) -> bool:
        """Whether it listens to this machine alone."""
        return self.host in ("127.0.0.1", "localhost", "::1")

    def asking(self) -> AskJob:
        """The settings of every answer.

        Raises:
            ConfigError: at the first value that cannot work.
        """
        for name in ("at_once", "most_waiting", "most_kept", "most_characters", "per_minute", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be greater than 0.")
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"port={self.port}: a port from 0 to 65535.")
        shared = ("index", "top_k", "candidates", "audit_sequences", "sides", "model", "corpus", "factors", "output")
        cluster = ClusterConfig(backend=Backend.in_process, cpus_per_rank=self.threads)
        return AskJob(**{name: getattr(self, name) for name in shared}, cluster=cluster)


@dataclass
class PlanConfig:
    device: str | None = None
    """A GPU of the table in docs/sizing.md, such as `h100`; ranks are then planned on it, one each."""
    utilisation: float | None = None
    """Share of the device's peaks that is reached in everything; null is the table's shares, by what is multiplied."""
    calibration: str | None = None
    """verify.json, which tests/gpu/verify.py writes on a card: its measured rates take the place of the table's."""
    tokens_per_s: float | None = None
    """Tokens per second that one worker scans, measured; in place of device and utilisation."""
    like: str | None = None
    """A finished run of the same model and settings, whose phases give the rates."""
    price_per_hour: float | None = None
    """Price of one rank for an hour."""
    sequences: int | None = None
    """Sequences of a corpus that is not there yet."""
    queries: int | None = None
    """Number of queries that are not written yet."""
    index: bool = False
    """Plan `infscan index` with these arguments, beside a scan where there are queries."""
    sample_bytes: int = 16 << 20
    """Bytes that are read of a corpus that is not prepared."""
    json: bool = False
    """Print JSON."""


@dataclass
class PlanJob(IndexJob):
    """A run's or an index's settings, and what turns work into hours and money."""

    plan: PlanConfig = field(default_factory=PlanConfig)


@dataclass
class ExplainJob:
    """Rows of a finished run, or any text, taken apart."""

    run: str = MISSING
    """A finished run: folder or URI."""
    name: str = "rows"
    """Name of the folder below <run>/explain that tables are written to."""
    output: str | None = None
    """Folder or URI of the tables; null is <run>/explain/<name>."""
    query_ids: list[str] = field(default_factory=list)
    """Queries of the run to explain; all where empty."""
    sides: Sides = Sides.both
    """Sides whose rows are explained."""
    rows: int = 3
    """Strongest published rows per query and side."""
    sequences: list[int] = field(default_factory=list)
    """Sequence numbers of the run's corpus, in place of published rows."""
    text: str | None = None
    """A text to score, in place of published rows."""
    texts: str | None = None
    """JSONL file of texts to score: rows of `id`, `text` (or `input_ids`) and, optionally, `queries`."""
    own_tokens: bool = True
    """Compute the influence of the sequence's own tokens, as outputs and as inputs."""
    matrix: bool = False
    """Write scores by layer and position, and by completion token and position."""
    similar: float = 0.8
    """Share of the shorter one's tokens, in spans that two published rows have in common, from which they count as
    near-duplicates; a row is the document in it that its influence comes from."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        if self.rows < 1:
            raise ConfigError(f"rows={self.rows}: explain at least one row per query and side.")
        if sum(map(bool, (self.sequences, self.text, self.texts))) > 1:
            raise ConfigError("sequences, text and texts each say what is to be explained; give one of them, or none.")
        if not 0 < self.similar <= 1:
            raise ConfigError(f"similar={self.similar}: a share of shared tokens, above 0 and up to 1.")

    @property
    def folder(self) -> str:
        return self.output or f"{self.run.rstrip('/')}/explain/{self.name}"


@dataclass
class MasksJob:
    """The tokens that raise or lower queries most as what the model learns to predict, as masks of the loss."""

    run: str = MISSING
    """A finished run whose rows `infscan explain` took apart, or the run itself (scan.targets): folder or URI."""
    name: str = "rows"
    """Name of the explanation below <run>/explain; where there is none, the run's own tokens.targets are taken."""
    output: str | None = None
    """Parquet file to write; null is <run>/explain/<name>/masks.parquet."""
    query_ids: list[str] = field(default_factory=list)
    """Queries whose influences are added up, token by token; all of the explanation's where empty."""
    sides: Sides = Sides.proponents
    """`proponents` masks tokens that raise the completions, `opponents` those that lower them, `both` either."""
    share: float = 0.01
    """Share of the explained tokens to mask, the strongest ones."""
    tokens: int | None = None
    """Number of tokens to mask, in place of share."""

    def check(self) -> None:
        """Raises ConfigError at the first value that cannot work."""
        if not 0 < self.share <= 1:
            raise ConfigError(f"share={self.share}: a share of the explained tokens, above 0 and up to 1.")
        if self.tokens is not None and self.tokens < 1:
            raise ConfigError(f"tokens={self.tokens}: mask at least one token.")

    @property
    def explained(self) -> str:
        return f"{self.run.rstrip('/')}/explain/{self.name}"

    @property
    def path(self) -> str:
        return self.output or f"{self.explained}/masks.parquet"


@dataclass
class ReportJob:
    """A page of finished runs."""

    run: Any = MISSING
    """A finished run, a sweep's folder, or a list of them: `run=[runs/a,runs/b]`."""
    output: str | None = None
    """Path or URI of the page; null is report.html in the run's (or the sweep's) folder."""
    rows: int = 100
    """Rows per query and side at most."""
    megabytes: int = 64
    """Megabytes of sequences on the page, compressed; the lowest ranks are left out until they fit."""
    tokenizer: str | None = None
    """Tokenizer to decode with: a folder, URI or hub id; null is that of the run's model."""

    @property
    def runs(self) -> list[str]:
        return [str(run) for run in self.run] if isinstance(self.run, list) else [str(self.run)]


@dataclass
class MergeJob:
    """A LoRA adapter merged into the model that it adapts."""

    adapter: str = MISSING
    """peft's folder, a URI of it or a hub id: adapter_config.json and adapter_model.safetensors."""
    model: str | None = None
    """The model that it adapts: a folder, URI or hub id; null is the one that adapter_config.json names."""
    output: str = MISSING
    """Folder or URI of the merged model; it must not exist."""


@dataclass
class VerifyJob:
    """A finished run, held to its manifest."""

    run: str = MISSING
    """A finished run: folder or URI."""


@dataclass
class StatusJob:
    """How far a run or a sweep is."""

    run: str = MISSING
    """The run's folder or URI, or a sweep's."""
    top: int = 3
    """Strongest rows to show per query and side; 0 shows none."""
    json: bool = False
    """Print JSON."""
