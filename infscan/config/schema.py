"""The typed settings of a run: every key with its type, its default and its meaning.

The string below a field documents that key: `infscan <command> --help` and docs/configuration.md are made of it.
Hydra is not imported here; `infscan.config.compose` hands these classes to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

# A value that is not given. Hydra and OmegaConf use the same mark.
MISSING: Any = "???"

T = TypeVar("T")


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class Sharding(StrEnum):
    auto = "auto"
    none = "none"
    zero3 = "zero3"


class AttentionImplementation(StrEnum):
    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"


class Offload(StrEnum):
    """Where a sharded model's parameters are kept while they are not used."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class Packing(StrEnum):
    concat = "concat"
    document = "document"


class Attention(StrEnum):
    """Whether a packed sequence's tokens attend to the documents before their own (across), as in training."""

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
    """How (G + lambda)^-1 is applied. cg and astra iterate from EK-FAC's solution, query by query."""

    ekfac = "ekfac"
    identity = "identity"
    cg = "cg"
    astra = "astra"

    @property
    def iterated(self) -> bool:
        return self in (Solver.cg, Solver.astra)


class Matmul(StrEnum):
    """How a GPU multiplies what is in float32: exactly, or in TF32 on tensor cores."""

    exact = "exact"
    tf32 = "tf32"


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


class Backend(StrEnum):
    """What runs the units of work: worker groups on Ray, or this process alone."""

    ray = "ray"
    in_process = "in_process"


class LogFormat(StrEnum):
    text = "text"
    json = "json"


@dataclass
class ZeroConfig:
    """The limits of ZeRO-3, in parameters. DeepSpeed's own defaults (1e9) would keep a model under 1B gathered
    whole."""

    max_live_parameters: int | None = None
    """Parameters that a rank may hold gathered at once; null is two of the model's blocks, or 30 million where that is
    more. From one block on, a block's parameters are gathered together."""
    max_reuse_distance: int = 0
    """A parameter that is used again within this many parameters stays gathered."""
    prefetch_bucket_size: int | None = None
    """Parameters that are gathered ahead of their use; null is one block, or 10 million where that is more."""
    param_persistence_threshold: int = 10_000
    """Smaller parameters are never partitioned."""
    offload: Offload = Offload.none
    """Where a rank's shard is kept while it is not used: on its device, in host memory, or in a memory-mapped file."""
    offload_path: str | None = None
    """Folder of the memory-mapped file with offload=nvme; null uses the folder of temporary files."""


@dataclass
class ModelConfig:
    path: str = MISSING
    """The model: a folder in Hugging Face layout, a URI, or a hub id. A folder without a tokenizer suffices where
    corpus and queries bring token ids."""
    revision: str | None = field(default=None, kw_only=True)
    """Branch, tag or commit of a hub id, such as `step1000`; null is its main one."""
    dtype: Dtype = Dtype.auto
    """Dtype of the model in every pass; `auto` is float32 on a CPU and the checkpoint's own on a GPU, but bfloat16 for
    float16, whose range gradients leave."""
    tracked: str = "mlp"
    """Linear layers that take part: `mlp` (as Grosse et al. 2023), `attention`, `linear` (both), `head` (the output
    embeddings), several of these joined by `+`, or a regular expression over module names."""
    attention_implementation: AttentionImplementation = AttentionImplementation.auto
    """How attention is computed: `sdpa` (fused), `eager` (plain products), or `auto` (fused where a family has it)."""
    sharding: Sharding = Sharding.auto
    """How a worker's ranks hold the model: `none` (one rank, whole), `zero3` (partitioned), or `auto` (zero3 where a
    worker has several ranks)."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)


@dataclass
class CorpusConfig:
    """What the corpus is and how it becomes sequences."""

    path: str = MISSING
    """The corpus: a file, folder, glob or URI of documents or token arrays, or a corpus that was prepared before."""
    paths: dict[str, str] = field(default_factory=dict)
    """Several corpora in place of `path`, each under a label: `+corpus.paths.web=... +corpus.paths.books=...`."""
    format: str = "auto"
    """File format; `auto` goes by names and content."""
    text_field: str = "text"
    """Field of a row that holds its text."""
    id_field: str = "id"
    """Field of a row that holds its document id; ids are made from file and row where rows have none."""
    source_field: str = "source"
    """Field of a row that names where the document is from; the file's name where rows have none."""
    tokens_field: str | None = None
    """Field that holds token ids in place of text; null where rows hold text."""
    text_records: TextRecords = TextRecords.file
    """What a document is in a plain text file: the whole `file`, or every `line`."""
    dtype: str | None = None
    """Integer type of raw token arrays; null is uint16 where that holds the vocabulary, else uint32."""
    eos_id: int | None = None
    """Token id that documents end with; null is the tokenizer's, else the model's."""
    in_place: bool = True
    """Scan token arrays where they are; false prepares a copy of them first."""
    part_bytes: int = 256 << 20
    """Bytes of input that become one prepared part; a larger file is cut into several parts."""
    deduplicate: bool = False
    """Drop documents whose content an earlier document has, too."""
    prompt_field: str | None = None
    """Field of a row that holds its prompt (text, token ids, or a number of token ids), which training had no loss
    on."""
    mask_field: str | None = None
    """Field of a row that holds 0 or 1 for each token id: 1 where training had a loss. Needs tokens_field."""
    sequence_length: int | None = None
    """T, tokens of a sequence at most; null is the model's context, at most 512 (as Grosse et al. 2023)."""
    packing: Packing = Packing.concat
    """How documents become sequences: `concat` joins them with EOS and cuts every T tokens; `document` makes one
    sequence of each, cut off at T tokens."""
    attention: Attention = Attention.across
    """Whether tokens attend `across` the documents of a sequence or `within` their own: as training had it."""
    bos: bool | None = None
    """Put the BOS token before every document and every query; null does what the tokenizer does to a text. Where that
    is nothing and packing=document, null puts EOS before them, which training has between documents. Documents that
    bring token ids stay as they are."""
    max_sequences: int | None = None
    """Scan a uniform sample of this many sequences; null scans all. Factors are not fitted on fewer for it."""
    sample: float | None = None
    """Scan a uniform sample of this share of the sequences, above 0 and up to 1; null scans all. Factors are not
    fitted on fewer for it."""
    seed: int = 0
    """Seed of the sample."""
    allow_bad_documents: int = 0
    """Documents that may be unusable: so many are left out and counted before preparing stops."""
    allow_bad_files: int = 0
    """Files that may be unreadable: so many are left out and counted before preparing stops."""

    @property
    def several(self) -> dict[str, CorpusConfig]:
        """Each of several corpora by its label; empty where there is one."""
        return {label: replace(self, path=path, paths={}) for label, path in self.paths.items()}

    @property
    def masked(self) -> bool:
        """Whether some tokens carry no loss."""
        return self.prompt_field is not None or self.mask_field is not None

    def same_corpus(self, other: CorpusConfig) -> bool:
        """Whether both are the same sequences, whatever sample of them is taken."""
        return replace(self, **_WHOLE) == replace(other, **_WHOLE)


# Keys of infscan 0.1 that have other names now: taken on a command line and in a stored config.yaml.
RENAMED = {
    "cluster.silence_s": "cluster.heartbeat_timeout_s",
    "cluster.capacity_s": "cluster.placement_timeout_s",
    "cluster.startup_s": "cluster.startup_timeout_s",
}

# Rows kept per query and side that cost next to nothing.
_FEWEST_CANDIDATES = 32

# What of a corpus is scanned, as opposed to what the corpus is. Factors do not inherit it.
SELECTION = ("max_sequences", "sample")
_WHOLE: dict[str, Any] = {"max_sequences": None, "sample": None, "seed": 0}


def not_given(kind: type[T]) -> T:
    """Settings of a kind, none of which is given: `infscan.config.inherit` fills them from an outer group."""
    values: dict[str, Any] = {}
    for one in fields(kind):  # type: ignore[arg-type]
        default = one.default_factory() if callable(one.default_factory) else None
        if is_dataclass(default):
            default = not_given(type(default))
        # Labels are added one by one, so a group of them is empty where none is given.
        values[one.name] = MISSING if default is None else default
    return kind(**values)


@dataclass
class QueriesConfig:
    path: str = MISSING
    """Query file: JSONL rows of `id`, `prompt`, `completion`, or of `id`, `input_ids`, `prompt_len`; optional
    `contrast` and `measure`."""
    measure: Measure = Measure.completion
    """What is measured of a completion: all of it (`completion`), its `first` token, or each of its `tokens` apart, as
    `id#0`, `id#1`, ... A row's own `measure` wins."""
    prompt: str | None = None
    """One query's prompt, in place of a file; `prompt=...` for short."""
    completion: str | None = None
    """That query's completion; `completion=...` for short."""
    contrast: str | None = None
    """Another completion: the difference of the two log-probabilities is measured; `contrast=...` for short."""


@dataclass
class DampingConfig:
    relative: float = 0.1
    """lambda of a layer as a multiple of the mean of its Lambda (Grosse et al. 2023)."""
    absolute: float | None = None
    """lambda of every layer as a value (Bao et al. 2025); it wins over `relative` where it is given."""
    auto: bool = False
    """Find each layer's lambda after the fit, from up to 1,024 of its sequences (docs/method.md#automatic-damping); it
    wins over `relative`, `absolute` over it; it needs factors.labels=sampled."""

    @property
    def by_fit(self) -> bool:
        """Whether it is found after the fit."""
        return self.auto and self.absolute is None

    def facts(self) -> dict[str, Any]:
        """What fixes a damping, for fingerprints; `auto` only where it is asked for, as before there was a choice."""
        known: dict[str, Any] = {"relative": self.relative, "absolute": self.absolute}
        return known | {"auto": True} if self.auto else known


@dataclass
class IterationConfig:
    """How solver=cg and solver=astra iterate."""

    steps: int = 50
    """Steps at most."""
    tolerance: float = 1e-2
    """cg stops where the relative residual |v - (G + lambda) x| / |v| is this small."""
    batch: int | None = None
    """Sequences that G is of: fixed ones (cg; null is all that the factors were fitted on), or drawn anew for every
    step (astra; null is 32)."""
    momentum: float = 0.9
    """astra's momentum, from 0 to below 1."""
    step_size: float | None = None
    """astra's first step size, which falls to zero; null is half of the largest stable one on a few batches."""
    tokens_per_batch: int = 1024
    """Padded tokens in one product with G."""
    queries: int | None = None
    """Queries that share each pass of the model; null is as many as have their vectors in scan.query_group_bytes, up to
    8."""


@dataclass
class FactorsConfig:
    path: str | None = None
    """Folder or URI where factors are, or are put; null is <output>/factors."""
    corpus: CorpusConfig = field(default_factory=lambda: not_given(CorpusConfig))
    """What factors are fitted on: key by key the scanned corpus, except for its sample."""
    labels: Labels = Labels.sampled
    """Labels of the Fisher: `sampled` from the model, or the true tokens (`empirical`)."""
    num_sequences: int = 10_000
    """Sequences that factors are fitted on, a uniform sample; all where the corpus has fewer."""
    damping: DampingConfig = field(default_factory=DampingConfig)
    solver: Solver = Solver.ekfac
    """How (G + lambda)^-1 is applied: `ekfac`; `identity` (the gradient dot product, the baseline); `cg` or `astra`,
    which iterate from EK-FAC's solution."""
    iteration: IterationConfig = field(default_factory=IterationConfig)
    slices: int | None = None
    """Slices of the fitted sequences: the unit of work and of retry of a fit. null is 8, or fewer where few sequences
    are fitted on and each slice's partial sums are large."""
    blocks: int = 1
    """Diagonal blocks that A and S are cut into (Grosse et al. 2023, appendix A: 2 for the 52B model)."""
    span: int = 256
    """Eigenvectors of S that are kept of output embeddings whose S is too wide to be formed; outside of their span one
    Lambda per input axis stands for all output directions (docs/method.md#ek-fac, step 9)."""
    span_from: int = 8192
    """Rows of output embeddings above which that is so."""
    max_group_bytes: int | None = None
    """Bytes of factors that a rank holds at once; layers beyond them take another pass. null is what a GPU has left
    beside the model, and 8 GiB on a CPU."""
    matmul: Matmul | None = None
    """How a GPU multiplies float32 in Lambda, rotations and refining: `exact`, which null is, or in `tf32`, on tensor
    cores, to about three digits (docs/gpu.md). A CPU is always exact."""


# What a device's memory settles, and a CPU's value of it.
ON_A_CPU = {
    "factors.max_group_bytes": 8 << 30,
    "scan.query_group_bytes": 4 << 30,
    "scan.tokens_per_batch": 4096,
}
# Of the planned sequences, what a sieve leaves per query and side, and at most for all of them.
_SIEVED, _ALL_SIEVED = 0.01, 0.1
# Of these, what is audited, at least and at most.
_AUDITED, _LEAST_AUDIT, _MOST_AUDITED = 0.01, 256, 0.1
# Strongest rows of all queries and sides that an audit is to hit: with none of them missed, about 0.975 is certified.
_AUDITED_TAIL_ROWS = 160
# scan.rank=auto: every query and layer may have ranks up to this one.
MOST_RANK = 32


@dataclass
class StageConfig:
    """One stage of training (docs/method.md#multi-stage). What the first one does not give is the run's own model,
    corpus and factors; a later one inherits how a corpus is read and how factors are fitted."""

    model: str = MISSING
    """The model that the stage ended with: a folder, URI or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null is its main one."""
    corpus: CorpusConfig = field(default_factory=lambda: not_given(CorpusConfig))
    """What the stage was trained on."""
    factors: FactorsConfig = field(default_factory=lambda: not_given(FactorsConfig))
    """The stage's factors, fitted on its corpus."""
    alpha: float | None = None
    """Strength of the proximal term alpha/2 |theta - theta_before|^2 of every stage but the first."""


@dataclass
class ScanConfig:
    stage: int = 1
    """With stages: the number of the stage whose corpus is scanned, 1 for pretraining."""
    rank: int | str | None = 32
    """Rank of a compressed query gradient: a number, `auto` (allocated per query and layer), or null for full rank."""
    energy: float = 0.99
    """With rank=auto: the share of the score's expected square that is kept."""
    compression: Compression = field(default=MISSING, metadata={"default": "weighted"})
    """How query gradients are truncated: `weighted` by the factors, or by a `plain` SVD; where it is not given,
    factors.solver=identity, which has no factors to weigh by, makes it plain."""
    top_k: int = 100
    """Published rows per query and side."""
    candidates: int | None = None
    """Rows kept per query and side until they are scored again at full rank; null is 4 x top_k, of a small corpus at
    most a tenth (but 2 x top_k), and top_k where a scan at full rank has exact scores already."""
    stability: int = 0
    """The strongest rows per query and side that are scored again after other contexts (nothing, the separator, two
    other sequences' beginnings): top.score_low, score_high and sign_sure. 0 leaves it out."""
    similarity: int | None = None
    """The strongest rows per query and side whose hidden states are compared with the query's by a forward of each:
    top.similarity (docs/reading.md). null compares all that are published, 0 none."""
    targets: int | None = 0
    """The strongest rows per query and side of which tokens.targets says what every token taught as a target, by a
    forward with a tangent of each row. null takes all that are published, 0 none."""
    self_influence: int = 0
    """The strongest rows per query and side whose self-influence g' (G + lambda)^-1 g is computed, one forward and
    backward for each of their sequences: top.self_influence and relatif_rank. 0 leaves it out."""
    background_queries: int = 0
    """Questions made of the corpus's own sequences that are scanned along, so that top.hub says how near the top a row
    is of whatever is asked; none of their rows is published. 32 tell well. 0 asks none."""
    query_dtype: Dtype | None = None
    """Dtype of query gradients and of products with them; null is model.dtype."""
    refine_dtype: Dtype | None = None
    """Dtype of the model that candidates are scored again with; null is model.dtype. Another one loads the model
    again."""
    sides: Sides = Sides.both
    """Sides that are kept: `proponents` raise the completion's probability, `opponents` lower it."""
    scores: Scores = Scores.top
    """`all` also writes every sequence's score for every query (4 bytes each)."""
    tokens_per_batch: int | None = None
    """Padded tokens in one micro-batch. null goes by a GPU's memory, and is 4,096 on a CPU; a run that is resumed keeps
    its own."""
    shard_sequences: int | None = None
    """Sequences of one shard; null goes by the size of the corpus."""
    allow_quarantined: int = 0
    """Shards that may be given up without the run failing."""
    max_nonfinite: float = 0.001
    """Share of sequences whose scores may be NaN or infinite."""
    sieve: int | str | None = None
    """Find candidates by the last so many blocks' layers alone, whose backward is short; then those and an audit are
    scanned with all tracked layers (docs/scanning.md#a-sieve). `auto` measures how many suffice, and scans everything
    where none does for less; null scans everything with all of them."""
    sieve_candidates: int | None = None
    """With a sieve: sequences that it leaves per query and side; null is 1 % of those planned, or less, so that all
    queries' are at most a tenth of them, and scan.candidates at the least."""
    candidates_from: str | None = None
    """Sequences to scan in place of all of them, or beside what a sieve leaves: a file of sequence numbers, one a line,
    the output of infscan tfidf, or of a finished run, whose published sequences they then are."""
    audit_sequences: int | None = None
    """With a sieve or candidates_from: sequences of the audit, a uniform sample that is scanned too, and says what was
    missed; null is what certifies about 0.975 of the strongest rows where none of them is missed, but at least 1 % of
    those planned and 256, and at most 10 %."""
    check_sequences: int = 256
    """Sequences of the sample on which compressed scores are compared with full-rank ones; below 3 skips the check."""
    query_group_bytes: int | None = None
    """Bytes of full-rank query gradients, or of query matrices, that a rank holds at once. null is what a GPU has left
    beside the model, and 4 GiB on a CPU."""
    refine_group_bytes: int | None = None
    """The same while candidates are scored again: each passes through the model once for every group of layers that its
    query's gradients take. null is scan.query_group_bytes where that is given, and else what a GPU has left without the
    query batch."""


@dataclass
class ClusterConfig:
    """What the ranks run on, and how long the driver waits for them."""

    backend: Backend = Backend.ray
    """What runs the work: `ray`, or this process alone (`in_process`), for notebooks and small runs."""
    address: str | None = None
    """Address of a Ray cluster, `auto` for the one of this machine; null uses RAY_ADDRESS, else starts a local Ray."""
    num_workers: int | None = None
    """Workers at most; those without capacity wait for it, and join when a node does. null is as many as this machine
    has cores (or GPUs) and memory for, and one where `address` names a cluster."""
    ranks_per_worker: int = 1
    """Ranks (processes) that hold one copy of the model between them."""
    gpus_per_rank: float | None = None
    """GPUs of a rank; null is one where the cluster has GPUs, else none."""
    cpus_per_rank: int = 1
    """CPUs of a rank, and the number of its threads."""
    placement: Placement = Placement.STRICT_PACK
    """Ray's placement strategy of a worker's ranks."""
    rank_env: dict[str, str] = field(default_factory=dict)
    """Environment variables that ranks set before they meet (NCCL_*, GLOO_*): `+cluster.rank_env.NCCL_DEBUG=INFO`."""
    max_attempts: int = 3
    """Errors of a unit of work after which it is given up."""
    deadline_s: float = 3600.0
    """Seconds that one unit of work may take at most. Once five units of a step are done, the next may take 20 times
    what the longest of them took, and never less than storage is waited for (docs/faults.md)."""
    startup_timeout_s: float = 600.0
    """Seconds that a worker may take to load the model, once it is placed."""
    heartbeat_s: float = 10.0
    """Seconds between two heartbeats of a rank."""
    heartbeat_timeout_s: float = 60.0
    """Seconds without a heartbeat before a rank is considered lost."""
    placement_timeout_s: float = 1800.0
    """Seconds without capacity for a single worker after which the job ends."""
    lease_s: float = 60.0
    """Seconds without a renewed lease after which another host's driver is considered dead."""
    log_format: LogFormat = LogFormat.text
    """`json` logs one JSON object a line, and a line for every unit of work."""
    trace: bool = False
    """Write <output>/trace.json, the workers' time, for Perfetto."""


@dataclass
class ResumeConfig:
    allow_other_versions: bool = False
    """Let another version of infscan, torch, transformers, tokenizers, numpy or Python go on with a run; summary.json
    then warns of it. Another arithmetic or dtype is refused all the same."""


@dataclass
class Config:
    """The settings of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    queries: QueriesConfig = field(default_factory=QueriesConfig)
    factors: FactorsConfig = field(default_factory=FactorsConfig)
    scan: ScanConfig = field(default_factory=ScanConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    stages: list[StageConfig] = field(default_factory=list)
    """Stages of training, pretraining first; empty where the scanned model is the one that is asked."""
    output: str = MISSING
    """Folder or URI of the run."""
    seed: int = 0
    """Seed of the fitted sample, of the Fisher's labels and of the order of shards."""

    def at_stage(self, number: int) -> Config:
        """These settings with the model, corpus and factors of a stage (1 is the first); without stages as they are.

        After `from_hydra` a configuration is at its scan.stage: what is scanned is at the top.
        """
        if not self.stages:
            return self
        stage = self.stages[number - 1]
        return replace(
            self,
            model=replace(self.model, path=stage.model, revision=stage.revision),
            corpus=stage.corpus,
            factors=stage.factors,
            scan=replace(self.scan, stage=number),
        )

    @property
    def alpha(self) -> float:
        """alpha_j of the stage that is scanned; 0 for the first."""
        return (self.stages[self.scan.stage - 1].alpha or 0.0) if self.stages else 0.0

    @property
    def group_bytes(self) -> int:
        """factors.max_group_bytes, once it is settled (`infscan.sizing.sizes`); what a CPU has where it is not."""
        return self.factors.max_group_bytes or ON_A_CPU["factors.max_group_bytes"]

    @property
    def query_group_bytes(self) -> int:
        """scan.query_group_bytes, in the same way."""
        return self.scan.query_group_bytes or ON_A_CPU["scan.query_group_bytes"]

    @property
    def refine_group_bytes(self) -> int:
        """scan.refine_group_bytes, in the same way."""
        return self.scan.refine_group_bytes or self.query_group_bytes

    @property
    def tokens_per_batch(self) -> int:
        """scan.tokens_per_batch, in the same way."""
        return self.scan.tokens_per_batch or ON_A_CPU["scan.tokens_per_batch"]

    @property
    def candidates(self) -> int:
        """C of a large corpus: rows kept per query and side until they are refined."""
        return self.scan.candidates or 4 * self.scan.top_k

    def candidates_of(self, sequences: int) -> int:
        """C of a corpus of so many sequences.

        Where it is not given: a tenth of a small corpus, but twice top_k; and top_k where the scan's scores are exact.
        """
        scan = self.scan
        if scan.candidates is not None:
            return scan.candidates
        if scan.rank is None and scan.query_dtype is None and scan.refine_dtype is None:
            return scan.top_k
        return min(self.candidates, max(2 * scan.top_k, _FEWEST_CANDIDATES, sequences // 10))

    @property
    def refine_dtype(self) -> Dtype:
        """Dtype of the model that candidates are scored again with."""
        return self.scan.refine_dtype or self.model.dtype

    @property
    def most_rank(self) -> int | None:
        """The rank at which query gradients are stored, the largest that any layer scans with; None is full rank."""
        return MOST_RANK if isinstance(self.scan.rank, str) else self.scan.rank

    @property
    def searches(self) -> bool:
        """Whether candidates and an audit alone are scanned with all tracked layers."""
        return self.scan.sieve is not None or self.scan.candidates_from is not None

    @property
    def dense(self) -> bool:
        """Whether every sequence's scores are kept."""
        return self.scan.scores is Scores.all

    def sieve_candidates(self, planned: int, queries: int) -> int:
        """Sequences that a sieve leaves per query and side, of so many planned ones and for so many queries."""
        share = min(_SIEVED, _ALL_SIEVED / max(1, queries * len(self.sides)))
        return self.scan.sieve_candidates or max(self.candidates, round(share * planned))

    def audited(self, planned: int, queries: int) -> int:
        """Sequences of the audit, of so many planned ones and for so many queries."""
        asked = self.scan.audit_sequences
        if asked is not None:
            return min(planned, asked)
        enough = math.ceil(_AUDITED_TAIL_ROWS / max(1e-9, self.audited_tail_rows(planned, queries, 1)))
        least = max(_LEAST_AUDIT, round(_AUDITED * planned))
        return min(planned, max(least, min(enough, round(_MOST_AUDITED * planned))))

    def audited_tail_rows(self, planned: int, queries: int, audited: int) -> float:
        """How many of the strongest rows, of all queries and sides, an audit is expected to hit: of each as many as are
        published, or an eighth of what a sieve leaves, where that is more."""
        left = self.sieve_candidates(planned, queries) // 8 if self.scan.sieve is not None else 0
        rank = min(planned, max(self.scan.top_k, left))
        return audited * queries * len(self.sides) * rank / max(1, planned)

    @property
    def sides(self) -> tuple[str, ...]:
        both = ("proponent", "opponent")
        return {Sides.both: both, Sides.proponents: both[:1], Sides.opponents: both[1:]}[self.scan.sides]

    @property
    def sharded(self) -> bool:
        """Whether the model is cut over the ranks of its worker group (ZeRO-3)."""
        return self.model.sharding is Sharding.zero3 or self.cluster.ranks_per_worker > 1
