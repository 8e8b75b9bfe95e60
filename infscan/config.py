"""The typed configuration, its checks, and the fingerprints that tell one run from another.

The dataclasses are Hydra's schema: a key they do not have, or a value of another type, is refused while the
configuration is composed. `Config.check` refuses what types cannot say. Only this module and jobs/ know Hydra.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import II, MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from infscan.errors import ConfigError


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class Sharding(StrEnum):
    auto = "auto"
    none = "none"
    zero3 = "zero3"


class Packing(StrEnum):
    concat = "concat"
    document = "document"


class TextRecords(StrEnum):
    """What a document is in a plain text file."""

    file = "file"
    line = "line"


class Measure(StrEnum):
    completion = "completion"
    first = "first"
    tokens = "tokens"


class Labels(StrEnum):
    sampled = "sampled"
    empirical = "empirical"


class Solver(StrEnum):
    """What stands for (G + lambda)^-1. cg and astra iterate from EK-FAC's solution, query by query."""

    ekfac = "ekfac"
    identity = "identity"
    cg = "cg"
    astra = "astra"

    @property
    def iterated(self) -> bool:
        return self in (Solver.cg, Solver.astra)


class Compression(StrEnum):
    weighted = "weighted"
    plain = "plain"


class Sides(StrEnum):
    both = "both"
    proponents = "proponents"
    opponents = "opponents"


class Scores(StrEnum):
    top = "top"
    all = "all"


class Placement(StrEnum):
    STRICT_PACK = "STRICT_PACK"
    PACK = "PACK"
    SPREAD = "SPREAD"
    STRICT_SPREAD = "STRICT_SPREAD"


@dataclass
class ZeroConfig:
    """ZeRO-3's limits, in parameters. DeepSpeed's own defaults (1e9) would keep a model under 1B gathered whole."""

    max_live_parameters: int = 30_000_000
    max_reuse_distance: int = 0
    prefetch_bucket_size: int = 10_000_000
    param_persistence_threshold: int = 10_000


@dataclass
class ModelConfig:
    path: str = MISSING
    dtype: Dtype = Dtype.auto
    tracked: str = "mlp"
    sharding: Sharding = Sharding.auto
    gradient_checkpointing: bool = False
    zero: ZeroConfig = field(default_factory=ZeroConfig)


@dataclass
class CorpusConfig:
    """Where a corpus lies and how it becomes sequences.

    dtype: of raw token arrays (null: uint16 where that holds the vocabulary, else uint32). eos_id: what documents end
    with (null: the tokenizer's, else the model's). in_place: scan token arrays where they lie; false prepares them.
    part_bytes: a larger file of documents is cut into several parts. deduplicate: drop documents whose content an
    earlier one has too. paths: several corpora in place of `path`, by label. sample: a share of the sequences, drawn
    uniformly with `seed`, as max_sequences is a number of them.
    """

    path: str = MISSING
    paths: dict[str, str] = field(default_factory=dict)
    format: str = "auto"
    text_field: str = "text"
    id_field: str = "id"
    source_field: str = "source"
    tokens_field: str | None = None
    text_records: TextRecords = TextRecords.file
    dtype: str | None = None
    eos_id: int | None = None
    in_place: bool = True
    part_bytes: int = 256 << 20
    deduplicate: bool = False
    # Where training had no loss: a row's prompt (text, token ids, or how many of its token ids), or 0 and 1 by token.
    prompt_field: str | None = None
    mask_field: str | None = None
    sequence_length: int | None = None
    packing: Packing = Packing.concat
    bos: bool = False
    max_sequences: int | None = None
    sample: float | None = None
    seed: int = 0
    # Documents, and whole files, that cannot be used and may be left out, counted, before preparing stops.
    allow_bad_documents: int = 0
    allow_bad_files: int = 0

    @property
    def several(self) -> dict[str, CorpusConfig]:
        """Each of several corpora by its label; empty where there is one."""
        return {label: replace(self, path=path, paths={}) for label, path in self.paths.items()}

    @property
    def masked(self) -> bool:
        """Whether some tokens carry no loss."""
        return self.prompt_field is not None or self.mask_field is not None


@dataclass
class FactorsCorpusConfig(CorpusConfig):
    """What the factors are fitted on: key by key the corpus beside them (the scanned one, or a stage's), unless said
    otherwise."""

    path: str = II("...corpus.path")
    paths: dict[str, str] = II("...corpus.paths")
    format: str = II("...corpus.format")
    text_field: str = II("...corpus.text_field")
    id_field: str = II("...corpus.id_field")
    source_field: str = II("...corpus.source_field")
    tokens_field: str | None = II("...corpus.tokens_field")
    text_records: TextRecords = II("...corpus.text_records")
    prompt_field: str | None = II("...corpus.prompt_field")
    mask_field: str | None = II("...corpus.mask_field")
    dtype: str | None = II("...corpus.dtype")
    eos_id: int | None = II("...corpus.eos_id")
    in_place: bool = II("...corpus.in_place")
    part_bytes: int = II("...corpus.part_bytes")
    deduplicate: bool = II("...corpus.deduplicate")
    sequence_length: int | None = II("...corpus.sequence_length")
    packing: Packing = II("...corpus.packing")
    bos: bool = II("...corpus.bos")
    max_sequences: int | None = II("...corpus.max_sequences")
    sample: float | None = II("...corpus.sample")
    seed: int = II("...corpus.seed")
    allow_bad_documents: int = II("...corpus.allow_bad_documents")
    allow_bad_files: int = II("...corpus.allow_bad_files")


@dataclass
class QueriesConfig:
    path: str = MISSING
    measure: Measure = Measure.completion


@dataclass
class DampingConfig:
    """lambda_l = relative * mean(Lambda_l) (G23), or one absolute value (B25); `absolute` wins where it is given."""

    relative: float = 0.1
    absolute: float | None = None


@dataclass
class IterationConfig:
    """How solver=cg and solver=astra iterate; G is of the factors' sequences.

    steps: at most. tolerance: of the relative residual |v - (G + lambda) x| / |v|, where cg stops earlier.
    batch: sequences that G is of, fixed (cg; null: all that the factors were fitted on) or drawn anew for every step
    (astra; null: 32). step_size (astra): null for the largest that is stable on a few batches tried first; it falls to
    zero over the steps. tokens_per_batch: padded tokens in one product.
    """

    steps: int = 50
    tolerance: float = 1e-2
    batch: int | None = None
    momentum: float = 0.9
    step_size: float | None = None
    tokens_per_batch: int = 1024


@dataclass
class FactorsConfig:
    path: str | None = None
    corpus: FactorsCorpusConfig = field(default_factory=FactorsCorpusConfig)
    labels: Labels = Labels.sampled
    num_sequences: int = 10_000
    damping: DampingConfig = field(default_factory=DampingConfig)
    solver: Solver = Solver.ekfac
    iteration: IterationConfig = field(default_factory=IterationConfig)
    slices: int = 8
    blocks: int = 1
    max_group_bytes: int = 8 << 30


# scan.rank=auto: every query and layer may have ranks up to this one.
MOST_RANK = 32


@dataclass
class StageCorpusConfig(CorpusConfig):
    """What a stage was trained on. How it is read is as for `corpus`, unless said otherwise."""

    format: str = II("corpus.format")
    text_field: str = II("corpus.text_field")
    id_field: str = II("corpus.id_field")
    source_field: str = II("corpus.source_field")
    tokens_field: str | None = II("corpus.tokens_field")
    text_records: TextRecords = II("corpus.text_records")
    dtype: str | None = II("corpus.dtype")
    eos_id: int | None = II("corpus.eos_id")
    in_place: bool = II("corpus.in_place")
    part_bytes: int = II("corpus.part_bytes")
    deduplicate: bool = II("corpus.deduplicate")
    allow_bad_documents: int = II("corpus.allow_bad_documents")
    allow_bad_files: int = II("corpus.allow_bad_files")
    sequence_length: int | None = II("corpus.sequence_length")
    packing: Packing = II("corpus.packing")
    bos: bool = II("corpus.bos")


@dataclass
class StageDampingConfig(DampingConfig):
    relative: float = II("factors.damping.relative")
    absolute: float | None = II("factors.damping.absolute")


@dataclass
class StageIterationConfig(IterationConfig):
    steps: int = II("factors.iteration.steps")
    tolerance: float = II("factors.iteration.tolerance")
    batch: int | None = II("factors.iteration.batch")
    momentum: float = II("factors.iteration.momentum")
    step_size: float | None = II("factors.iteration.step_size")
    tokens_per_batch: int = II("factors.iteration.tokens_per_batch")


@dataclass
class StageFactorsConfig(FactorsConfig):
    """A stage's factors, fitted on its corpus; settings are those of `factors`, unless said otherwise."""

    labels: Labels = II("factors.labels")
    num_sequences: int = II("factors.num_sequences")
    damping: StageDampingConfig = field(default_factory=StageDampingConfig)
    solver: Solver = II("factors.solver")
    iteration: StageIterationConfig = field(default_factory=StageIterationConfig)
    slices: int = II("factors.slices")
    blocks: int = II("factors.blocks")
    max_group_bytes: int = II("factors.max_group_bytes")


@dataclass
class StageConfig:
    """One stage of training (METHOD: multi-stage). model: what it ended with, a folder, URI or hub id.

    alpha: of the proximal term alpha/2 |theta - theta_before|^2 that held it at the stage before; the first has none.
    """

    model: str = MISSING
    corpus: StageCorpusConfig = field(default_factory=StageCorpusConfig)
    factors: StageFactorsConfig = field(default_factory=StageFactorsConfig)
    alpha: float | None = None


@dataclass
class ScanConfig:
    """How sequences are scored. rank: a number; null: full; `auto`: allotted per query and layer, so that the columns
    kept hold `energy` of the score's expected square.
    """

    stage: int = 1
    rank: int | str | None = 32
    energy: float = 0.99
    compression: Compression = Compression.weighted
    top_k: int = 100
    candidates: int | None = None
    sides: Sides = Sides.both
    scores: Scores = Scores.top
    tokens_per_batch: int = 4096
    shard_sequences: int | None = None
    allow_quarantined: int = 0
    max_nonfinite: float = 0.001
    check_sequences: int = 256
    query_group_bytes: int = 4 << 30


@dataclass
class ClusterConfig:
    """Where ranks run, and how long is waited for what does not answer.

    max_attempts: errors of a unit of work after which it is given up. deadline_s: for one unit. startup_s: for loading
    the model, once there is room. heartbeat_s: between two questions to a rank whether it lives. silence_s: without an
    answer after which it is taken for lost. capacity_s: without room for a single worker after which the job ends.
    lease_s: without a sign of life after which another host's driver is taken for dead.
    """

    address: str | None = None
    num_workers: int = 1
    ranks_per_worker: int = 1
    gpus_per_rank: float | None = None
    cpus_per_rank: int = 1
    placement: Placement = Placement.STRICT_PACK
    max_attempts: int = 3
    deadline_s: float = 3600.0
    startup_s: float = 600.0
    heartbeat_s: float = 10.0
    silence_s: float = 60.0
    capacity_s: float = 1800.0
    lease_s: float = 60.0


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    queries: QueriesConfig = field(default_factory=QueriesConfig)
    factors: FactorsConfig = field(default_factory=FactorsConfig)
    scan: ScanConfig = field(default_factory=ScanConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    stages: list[StageConfig] = field(default_factory=list)
    output: str = MISSING
    seed: int = 0

    def at_stage(self, number: int) -> Config:
        """This configuration with the model, corpus and factors of a stage (1 is the first); one without stages as is.

        After `from_hydra` a configuration is at its scan.stage: what is scanned stands at the top.
        """
        if not self.stages:
            return self
        stage = self.stages[number - 1]
        return replace(
            self,
            model=replace(self.model, path=stage.model),
            corpus=stage.corpus,
            factors=stage.factors,
            scan=replace(self.scan, stage=number),
        )

    @property
    def alpha(self) -> float:
        """alpha_j of the stage that is scanned; 0 for the first."""
        return (self.stages[self.scan.stage - 1].alpha or 0.0) if self.stages else 0.0

    @property
    def candidates(self) -> int:
        """C: rows kept per query and side until they are refined."""
        return self.scan.candidates or 4 * self.scan.top_k

    @property
    def most_rank(self) -> int | None:
        """The rank at which query gradients are stored, the largest that any layer scans with; None: full."""
        return MOST_RANK if isinstance(self.scan.rank, str) else self.scan.rank

    @property
    def sides(self) -> tuple[str, ...]:
        both = ("proponent", "opponent")
        return {Sides.both: both, Sides.proponents: both[:1], Sides.opponents: both[1:]}[self.scan.sides]

    @property
    def sharded(self) -> bool:
        """Whether the model is cut over the ranks of its worker group (ZeRO-3)."""
        return self.model.sharding is Sharding.zero3 or self.cluster.ranks_per_worker > 1

    def check(self) -> None:
        """Refuse impossible values, naming the key, the value and the mend.

        Raises:
            ConfigError: at the first value that cannot work.
        """
        positive = {
            "factors.num_sequences": self.factors.num_sequences,
            "factors.slices": self.factors.slices,
            "factors.blocks": self.factors.blocks,
            "factors.max_group_bytes": self.factors.max_group_bytes,
            "scan.top_k": self.scan.top_k,
            "scan.tokens_per_batch": self.scan.tokens_per_batch,
            "scan.query_group_bytes": self.scan.query_group_bytes,
            "cluster.num_workers": self.cluster.num_workers,
            "cluster.ranks_per_worker": self.cluster.ranks_per_worker,
            "cluster.cpus_per_rank": self.cluster.cpus_per_rank,
            "cluster.max_attempts": self.cluster.max_attempts,
            "cluster.deadline_s": self.cluster.deadline_s,
            "cluster.startup_s": self.cluster.startup_s,
            "cluster.heartbeat_s": self.cluster.heartbeat_s,
            "cluster.silence_s": self.cluster.silence_s,
            "cluster.capacity_s": self.cluster.capacity_s,
            "cluster.lease_s": self.cluster.lease_s,
            "factors.damping.relative": self.factors.damping.relative,
            "factors.iteration.steps": self.factors.iteration.steps,
            "factors.iteration.tolerance": self.factors.iteration.tolerance,
            "factors.iteration.tokens_per_batch": self.factors.iteration.tokens_per_batch,
        }
        optional = {
            "factors.iteration.batch": self.factors.iteration.batch,
            "factors.iteration.step_size": self.factors.iteration.step_size,
            "factors.damping.absolute": self.factors.damping.absolute,
            "scan.rank": self.most_rank,
            "scan.candidates": self.scan.candidates,
            "scan.shard_sequences": self.scan.shard_sequences,
        }
        corpora: dict[str, CorpusConfig] = {"corpus": self.corpus, "factors.corpus": self.factors.corpus}
        for number, stage in enumerate(self.stages):
            corpora[f"stages.{number}.corpus"] = stage.corpus
        for name, corpus in corpora.items():
            if corpus.mask_field is not None and (corpus.prompt_field is not None or corpus.tokens_field is None):
                raise ConfigError(
                    f"{name}.mask_field={corpus.mask_field}: a mask says 0 or 1 for every token id of a row; give "
                    f"{name}.tokens_field too, and no prompt_field."
                )
            optional[f"{name}.max_sequences"] = corpus.max_sequences
            if corpus.sample is not None and not 0 < corpus.sample <= 1:
                raise ConfigError(f"{name}.sample={corpus.sample}: a share of the sequences, above 0 and up to 1.")
            for label in corpus.paths:
                if not _LABEL.fullmatch(label):
                    raise ConfigError(f"{name}.paths: {label!r} is no label; give 1 to 64 of A-Z, a-z, 0-9, _ and -.")
            positive[f"{name}.part_bytes"] = corpus.part_bytes
            if corpus.sequence_length is not None and corpus.sequence_length < 2:
                raise ConfigError(
                    f"{name}.sequence_length={corpus.sequence_length}: a sequence needs two tokens to have a loss; "
                    "give at least 2, or null for the model's context (at most 512)."
                )
        if isinstance(self.scan.rank, str) and self.scan.rank != "auto":
            raise ConfigError(f"scan.rank={self.scan.rank}: give a number, auto, or null for full rank.")
        if not 0 < self.scan.energy <= 1:
            raise ConfigError(f"scan.energy={self.scan.energy}: a share, above 0 and up to 1.")
        positive |= {key: value for key, value in optional.items() if value is not None}
        for key, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{key}={value}: must be greater than 0.")
        if self.scan.candidates is not None and self.scan.candidates < self.scan.top_k:
            raise ConfigError(
                f"scan.candidates={self.scan.candidates} is less than scan.top_k={self.scan.top_k}: the published rows "
                "are chosen among the candidates; give at least top_k, or null for 4 x top_k."
            )
        if not 0 <= self.scan.max_nonfinite <= 1:
            raise ConfigError(f"scan.max_nonfinite={self.scan.max_nonfinite}: a share of sequences, between 0 and 1.")
        for key, count in (
            ("scan.allow_quarantined", self.scan.allow_quarantined),
            ("scan.check_sequences", self.scan.check_sequences),
            ("corpus.allow_bad_documents", self.corpus.allow_bad_documents),
            ("corpus.allow_bad_files", self.corpus.allow_bad_files),
            ("factors.corpus.allow_bad_documents", self.factors.corpus.allow_bad_documents),
            ("factors.corpus.allow_bad_files", self.factors.corpus.allow_bad_files),
        ):
            if count < 0:
                raise ConfigError(f"{key}={count}: must be 0 or more.")
        if self.cluster.gpus_per_rank is not None and self.cluster.gpus_per_rank < 0:
            raise ConfigError(f"cluster.gpus_per_rank={self.cluster.gpus_per_rank}: 0 or more, or null to find out.")
        if self.model.sharding is Sharding.none and self.cluster.ranks_per_worker > 1:
            raise ConfigError(
                f"model.sharding=none with cluster.ranks_per_worker={self.cluster.ranks_per_worker}: a worker's ranks "
                "hold one copy of the model between them; use model.sharding=zero3, or more cluster.num_workers."
            )
        if not 0 <= self.factors.iteration.momentum < 1:
            raise ConfigError(f"factors.iteration.momentum={self.factors.iteration.momentum}: from 0 to below 1.")
        if self.factors.solver.iterated and (self.sharded or self.model.gradient_checkpointing):
            raise ConfigError(
                f"factors.solver={self.factors.solver.value} multiplies with the Gauss-Newton matrix of a whole model "
                "by forward-mode differentiation, which neither a sharded model nor gradient checkpointing has; use "
                "cluster.ranks_per_worker=1 with model.sharding=auto and model.gradient_checkpointing=false, or "
                "factors.solver=ekfac."
            )
        if self.model.tracked not in ("mlp", "attention", "linear"):
            try:
                re.compile(self.model.tracked)
            except re.error as error:
                raise ConfigError(
                    f"model.tracked={self.model.tracked!r} is not a regular expression ({error}); give mlp, attention, "
                    "linear, or a regex over module names."
                ) from None
        if self.factors.solver is Solver.identity and self.scan.compression is Compression.weighted and self.scan.rank:
            raise ConfigError(
                "factors.solver=identity has no factors to weigh a compression by; add scan.compression=plain, "
                "or scan.rank=null for exact scores."
            )

        self._check_stages()

    def _check_stages(self) -> None:
        if not 1 <= self.scan.stage <= max(1, len(self.stages)):
            raise ConfigError(
                f"scan.stage={self.scan.stage}: there are {len(self.stages)} stages; give one of them, 1 for the first."
            )
        if len(self.stages) == 1:
            raise ConfigError("stages: there is one; give two or more, pretraining first, or none.")
        for number, stage in enumerate(self.stages):
            key = f"stages.{number}"
            if (number > 0) != (stage.alpha is not None):
                raise ConfigError(
                    f"{key}.alpha={stage.alpha}: every stage has one but the first, which nothing held: alpha of (mean "
                    "loss of a sequence) + alpha/2 |theta - theta_before|^2."
                )
            if stage.alpha is not None and not 0 < stage.alpha < float("inf"):
                raise ConfigError(
                    f"{key}.alpha={stage.alpha}: must be greater than 0 and finite; where fine-tuning had no proximal "
                    "term, a small one stands for its having stopped early."
                )
            if number + 1 != self.scan.stage:
                # What a single-stage run at this stage would be refused for.
                try:
                    replace(self.at_stage(number + 1), stages=[], scan=ScanConfig(rank=None)).check()
                except ConfigError as error:
                    raise ConfigError(f"{key}: {error}") from None


ConfigStore.instance().store(name="infscan_schema", node=Config)

# Fields that may differ when a run is resumed: they change where and how fast, never what.
RUN_TIME_FIELDS = (
    "output",
    "cluster.",
    "model.sharding",
    "model.zero.",
    "model.gradient_checkpointing",
    "scan.allow_quarantined",
    "corpus.allow_bad_",
    "factors.corpus.allow_bad_",
    "scan.max_nonfinite",
    "factors.max_group_bytes",
    "scan.query_group_bytes",
    # A path says where an input lies; what lies there is compared by its content's fingerprint.
    "model.path",
    "corpus.path",
    "queries.path",
    "factors.path",
    "factors.corpus.path",
)
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,64}")
_STAGE = re.compile(r"stages\.\d+\.(model$)?")


def from_hydra(cfg: DictConfig, unused: tuple[str, ...] = ()) -> Config:
    """Turn Hydra's composed configuration into a checked `Config`; local paths become absolute.

    In a sweep (`-m`) each cell gets a folder of its own below `output`, named after its overrides.
    unused: mandatory keys that this job does not read; they may be missing.

    Raises:
        ConfigError: for a mandatory key without a value, or an impossible one.
    """
    unresolved = OmegaConf.to_container(cfg, resolve=False)
    missing = [key for key, value in _leaves(unresolved) if value == MISSING]
    for key in [key for key in missing if key.endswith("corpus.path") and OmegaConf.select(cfg, f"{key}s")]:
        OmegaConf.update(cfg, key, "")
        missing.remove(key)
    for key in set(missing) & set(unused):
        OmegaConf.update(cfg, key, "")
    missing = [key for key in missing if key not in unused]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no value given. Add {' '.join(f'{key}=...' for key in missing)}.")
    try:
        config = cast(Config, OmegaConf.to_object(cfg))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    config.check()
    config = config.at_stage(config.scan.stage)
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        config.output = f"{config.output.rstrip('/')}/{_cell_name(list(HydraConfig.get().overrides.task))}"
    config.output = absolute(config.output)
    config.model.path = absolute(config.model.path, only_existing=True)
    config.queries.path = absolute(config.queries.path) if config.queries.path else ""
    for corpus in (config.corpus, config.factors.corpus):
        _settle_paths(corpus)
    config.factors.path = absolute(config.factors.path) if config.factors.path else f"{config.output}/factors"
    for number, stage in enumerate(config.stages, start=1):
        stage.model = absolute(stage.model, only_existing=True)
        for corpus in (stage.corpus, stage.factors.corpus):
            _settle_paths(corpus)
        own = f"{stage_output(config.output, number)}/factors"
        stage.factors.path = absolute(stage.factors.path) if stage.factors.path else own
    return config


def _settle_paths(corpus: CorpusConfig) -> None:
    """Absolute addresses; a path of its own stands before the several that may be inherited."""
    if corpus.path:
        corpus.path, corpus.paths = absolute(corpus.path), {}
    else:
        corpus.paths = {label: absolute(path) for label, path in sorted(corpus.paths.items())}


def stage_output(output: str, number: int) -> str:
    """Where a run keeps what it makes of a stage that it does not scan."""
    return f"{output}/stages/{number}"


def _cell_name(overrides: list[str]) -> str:
    """A folder name for one cell of a sweep: its overrides, harmless in a path, distinct by a digest."""
    cell = [override for override in sorted(overrides) if not override.startswith(("output=", "cluster."))]
    readable = re.sub(r"[^A-Za-z0-9_=.,-]+", "-", ",".join(cell))[:80].strip("-.")
    return f"{readable or 'cell'}-{fingerprint(cell)[:8]}"


def absolute(path: str, *, only_existing: bool = False) -> str:
    """A local path made absolute, since workers run in other folders; URIs (and hub ids) stay as they are."""
    if "://" in path or (only_existing and not Path(path).exists()):
        return path
    return str(Path(path).expanduser().absolute())


def plain(value: Any) -> Any:
    """Dataclasses and enums as plain JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON: sorted keys, no spaces, dataclasses and enums made plain."""
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_SEAL = "seal"


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the fingerprint of its content, by which damage shows."""
    return value | {_SEAL: fingerprint(value)}


def is_intact(value: Any) -> bool:
    """Whether a value read back is an object that `sealed` gave, unchanged."""
    if not isinstance(value, dict):
        return False
    return value.get(_SEAL) == fingerprint(unsealed(value))


def unsealed(value: dict[str, Any]) -> dict[str, Any]:
    """What was given to `sealed`."""
    return {key: item for key, item in value.items() if key != _SEAL}


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def from_yaml(text: str) -> dict[str, Any]:
    """What `to_yaml` wrote.

    Raises:
        ConfigError: for anything else.
    """
    try:
        value = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"not a configuration ({next(iter(str(error).splitlines()), '')})") from None
    if not isinstance(value, dict) or not value:
        raise ConfigError("not a configuration (no key)")
    return cast("dict[str, Any]", value)


def differences(before: Any, after: Any) -> list[str]:
    """`key: before -> after` for every leaf that differs between two plain settings, run-time fields left out."""
    old, new = dict(_leaves(plain(before))), dict(_leaves(plain(after)))
    keys = sorted(key for key in old.keys() | new.keys() if not _at_top(key).startswith(RUN_TIME_FIELDS))
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def _at_top(key: str) -> str:
    """A stage's key as it would be called at the top: stages.1.corpus.path is corpus.path, stages.1.model is
    model.path."""
    return _STAGE.sub(lambda found: "model.path" if found[1] else "", key)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
