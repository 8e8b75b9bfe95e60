"""The typed configuration: every key, its type and its default.

The dataclasses are Hydra's schema: a key they do not have, or a value of another type, is refused while the
configuration is composed (`compose`). What types cannot say is refused by `checks`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from hydra.core.config_store import ConfigStore
from omegaconf import II, MISSING


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class Sharding(StrEnum):
    auto = "auto"
    none = "none"
    zero3 = "zero3"


class Offload(StrEnum):
    """Where a sharded model's parameters lie while they are not used."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class Packing(StrEnum):
    concat = "concat"
    document = "document"


class Attention(StrEnum):
    """Whether a packed sequence's tokens see the documents before their own (across), as the model was trained."""

    across = "across"
    within = "within"


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


class LogFormat(StrEnum):
    text = "text"
    json = "json"


@dataclass
class ZeroConfig:
    """ZeRO-3's limits, in parameters. DeepSpeed's own defaults (1e9) would keep a model under 1B gathered whole.

    offload: a rank's shard lies on its device (none), in its host's memory (cpu), or in a file on a disk of its host
    that memory maps (nvme), in the folder offload_path (null: where temporary files go).
    """

    max_live_parameters: int = 30_000_000
    max_reuse_distance: int = 0
    prefetch_bucket_size: int = 10_000_000
    param_persistence_threshold: int = 10_000
    offload: Offload = Offload.none
    offload_path: str | None = None


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
    attention: across the documents of a sequence, or within each, its positions beginning anew: as training had it.
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
    attention: Attention = Attention.across
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
    attention: Attention = II("...corpus.attention")
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
    attention: Attention = II("corpus.attention")
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
    kept hold `energy` of the score's expected square. query_dtype: of the queries' columns or matrices and of products
    with them; null: model.dtype. refine_dtype: of the model that candidates are scored again with;
    null: model.dtype. For another one the workers load the model again, after the scan.
    """

    stage: int = 1
    rank: int | str | None = 32
    energy: float = 0.99
    compression: Compression = Compression.weighted
    top_k: int = 100
    candidates: int | None = None
    query_dtype: Dtype | None = None
    refine_dtype: Dtype | None = None
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

    num_workers: at most; those that have no room wait for it, and join when a node does. placement: of a worker's ranks
    on nodes. rank_env: environment variables that ranks set before they meet (NCCL_*, GLOO_*, TORCH_NCCL_*).
    max_attempts: errors of a unit of work after which it is given up. deadline_s: for one unit. startup_s: for loading
    the model, once there is room. heartbeat_s: between two questions to a rank whether it lives. silence_s: without an
    answer after which it is taken for lost. capacity_s: without room for a single worker after which the job ends.
    lease_s: without a sign of life after which another host's driver is taken for dead. log_format: json for a JSON
    object a line, and a line for every unit of work. trace: write <output>/trace.json, the workers' time, for Perfetto.
    """

    address: str | None = None
    num_workers: int = 1
    ranks_per_worker: int = 1
    gpus_per_rank: float | None = None
    cpus_per_rank: int = 1
    placement: Placement = Placement.STRICT_PACK
    rank_env: dict[str, str] = field(default_factory=dict)
    max_attempts: int = 3
    deadline_s: float = 3600.0
    startup_s: float = 600.0
    heartbeat_s: float = 10.0
    silence_s: float = 60.0
    capacity_s: float = 1800.0
    lease_s: float = 60.0
    log_format: LogFormat = LogFormat.text
    trace: bool = False


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
    def refine_dtype(self) -> Dtype:
        """What candidates are scored again in: the scan's dtype, where nothing else is said."""
        return self.scan.refine_dtype or self.model.dtype

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


ConfigStore.instance().store(name="infscan_schema", node=Config)
