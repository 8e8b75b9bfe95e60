"""What the types of a configuration cannot say: impossible values are refused by key, with the fix."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from infscan.config.identity import leaves, plain, unstaged
from infscan.config.schema import (
    MISSING,
    ClusterConfig,
    Compression,
    Config,
    CorpusConfig,
    Offload,
    QueriesConfig,
    ScanConfig,
    Scores,
    Sharding,
    Solver,
)
from infscan.errors import ConfigError
from infscan.secrets import MEND, holds_secret, names_secret, redact

_MOST_INTEGER = 2**63 - 1  # of Parquet, numpy and torch
_MOST_SECONDS = 1e9  # thirty years; an operating system's timers end at about ten times that
_MOST_NAME_BYTES, _MOST_BYTES = 255, 4096  # of a name in a path, and of a path; no other text needs more

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,64}")

# (least, most) of what a number may be, by key, where it is not any that Parquet holds; a stage's as at the top.
_COUNT = (1, _MOST_INTEGER)
_COUNT_OR_NONE = (0, _MOST_INTEGER)
# Of a micro-batch: more are no faster, and every forecast of memory goes through all of them.
_TOKENS = (1, 1 << 22)
_SECONDS = (math.nextafter(0, 1), _MOST_SECONDS)
_ABOVE_ZERO = (math.nextafter(0, 1), math.inf)
_SHARE = (0.0, 1.0)
BOUNDS: dict[str, tuple[float, float]] = {
    "model.zero.max_live_parameters": _COUNT_OR_NONE,
    "model.zero.max_reuse_distance": _COUNT_OR_NONE,
    "model.zero.prefetch_bucket_size": _COUNT_OR_NONE,
    "model.zero.param_persistence_threshold": _COUNT_OR_NONE,
    "factors.num_sequences": _COUNT,
    "factors.slices": _COUNT,
    "factors.blocks": _COUNT,
    "factors.span": _COUNT,
    "factors.span_from": _COUNT,
    "factors.max_group_bytes": _COUNT,
    "factors.damping.relative": _ABOVE_ZERO,
    "factors.damping.absolute": _ABOVE_ZERO,
    "factors.iteration.steps": _COUNT,
    "factors.iteration.tolerance": _ABOVE_ZERO,
    "factors.iteration.batch": _COUNT,
    "factors.iteration.step_size": _ABOVE_ZERO,
    "factors.iteration.tokens_per_batch": _TOKENS,
    "factors.iteration.queries": _COUNT,
    "scan.rank": _COUNT,
    "scan.top_k": _COUNT,
    "scan.candidates": _COUNT,
    "scan.stability": _COUNT_OR_NONE,
    "scan.self_influence": _COUNT_OR_NONE,
    # More say no more.
    "scan.background_queries": (0, 1_000),
    "scan.tokens_per_batch": _TOKENS,
    "scan.shard_sequences": _COUNT,
    "scan.allow_quarantined": _COUNT_OR_NONE,
    "scan.max_nonfinite": _SHARE,
    "scan.check_sequences": _COUNT_OR_NONE,
    "scan.similarity": _COUNT_OR_NONE,
    "scan.targets": _COUNT_OR_NONE,
    "scan.sieve": _COUNT,
    "scan.sieve_candidates": _COUNT,
    "scan.audit_sequences": _COUNT_OR_NONE,
    "scan.query_group_bytes": _COUNT,
    "scan.refine_group_bytes": _COUNT,
    # A worker and a rank each have a process, and a place in Ray's tables.
    "cluster.num_workers": (1, 100_000),
    "cluster.ranks_per_worker": (1, 10_000),
    "cluster.gpus_per_rank": (0, 1_000),
    "cluster.cpus_per_rank": (1, 10_000),
    "cluster.max_attempts": _COUNT,
    "cluster.deadline_s": _SECONDS,
    "cluster.startup_timeout_s": _SECONDS,
    "cluster.heartbeat_s": _SECONDS,
    "cluster.heartbeat_timeout_s": _SECONDS,
    "cluster.placement_timeout_s": _SECONDS,
    "cluster.lease_s": _SECONDS,
    "seed": _COUNT_OR_NONE,
    "plan.utilisation": _ABOVE_ZERO,
    "tfidf.top_k": _COUNT,
    "tfidf.idf_sequences": _COUNT,
    "tfidf.slice_sequences": _COUNT,
    **{
        f"{corpus}.{key}": bounds
        for corpus in ("corpus", "factors.corpus")
        for key, bounds in (
            ("max_sequences", _COUNT),
            ("part_bytes", _COUNT),
            ("eos_id", _COUNT_OR_NONE),
            ("seed", _COUNT_OR_NONE),
            ("allow_bad_documents", _COUNT_OR_NONE),
            ("allow_bad_files", _COUNT_OR_NONE),
        )
    },
}


def check(config: Config, unused: tuple[str, ...] = ()) -> None:
    """Refuse impossible values, naming the key, the value and the fix; keys that are `unused` are not looked at.

    Raises:
        ConfigError: at the first value that cannot work.
    """
    _check_groups(config)
    # Several corpora by label stand in the place of a path.
    unused = (*unused, *(f"{name}.path" for name, corpus in _corpora(config) if corpus.paths and not corpus.path))
    for key, value in leaves(plain(config)):
        if key not in unused:
            _check_value(key, value)
    _check_corpora(config)
    if isinstance(config.scan.rank, str) and config.scan.rank != "auto":
        raise ConfigError(f"scan.rank={_said(config.scan.rank)}: give a number, auto, or null for full rank.")
    if isinstance(config.scan.sieve, str) and config.scan.sieve != "auto":
        raise ConfigError(f"scan.sieve={_said(config.scan.sieve)}: give a number of blocks, auto, or null for none.")
    if not 0 < config.scan.energy <= 1:
        raise ConfigError(f"scan.energy={config.scan.energy}: a share, above 0 and up to 1.")
    if config.scan.candidates is not None and config.scan.candidates < config.scan.top_k:
        raise ConfigError(
            f"scan.candidates={config.scan.candidates} is less than scan.top_k={config.scan.top_k}: the published rows "
            "are chosen among the candidates; give at least top_k, or null for 4 x top_k."
        )
    if config.model.sharding is Sharding.none and config.cluster.ranks_per_worker > 1:
        raise ConfigError(
            f"model.sharding=none with cluster.ranks_per_worker={config.cluster.ranks_per_worker}: a worker's ranks "
            "hold one copy of the model between them; use model.sharding=zero3, or more cluster.num_workers."
        )
    if config.model.zero.offload is not Offload.none and not config.sharded:
        raise ConfigError(
            f"model.zero.offload={config.model.zero.offload.value}: only a sharded model's parameters are kept apart "
            "from where they are used; add model.sharding=zero3 (one rank is enough)."
        )
    _check_ranks(config.cluster)
    if not 0 <= config.factors.iteration.momentum < 1:
        raise ConfigError(f"factors.iteration.momentum={config.factors.iteration.momentum}: from 0 to below 1.")
    if config.factors.solver.iterated and config.model.gradient_checkpointing:
        raise ConfigError(
            f"factors.solver={config.factors.solver.value} multiplies with the Gauss-Newton matrix by a backward for "
            "several vectors at once, which gradient checkpointing does not have; use "
            "model.gradient_checkpointing=false with fewer factors.iteration.tokens_per_batch, or factors.solver=ekfac."
        )
    if config.model.tracked not in ("mlp", "attention", "linear"):
        try:
            re.compile(config.model.tracked)
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(
                f"model.tracked={_said(config.model.tracked)} is not a regular expression ({error}); give mlp, "
                "attention, linear, or a regex over module names."
            ) from None
    weighted = config.scan.compression is Compression.weighted and config.scan.rank
    if config.factors.solver is Solver.identity and weighted:
        raise ConfigError(
            "scan.compression=weighted: factors.solver=identity has no factors to weigh a compression by; leave "
            "scan.compression out, or give scan.rank=null for exact scores."
        )
    _check_search(config)
    _check_background(config)
    _check_queries(config.queries)
    _check_stages(config)


def _check_search(config: Config) -> None:
    scan = config.scan
    if config.searches and scan.scores is Scores.all:
        raise ConfigError(
            "scan.scores=all wants every sequence's scores, and with scan.sieve or scan.candidates_from candidates and "
            "the audit alone have them; leave one out."
        )
    if scan.sieve is None and scan.sieve_candidates is not None:
        raise ConfigError(
            f"scan.sieve_candidates={scan.sieve_candidates}: there is no sieve; give scan.sieve=<blocks>, or leave it "
            "out."
        )
    if scan.audit_sequences is not None and not config.searches:
        raise ConfigError(
            f"scan.audit_sequences={scan.audit_sequences}: everything is scanned, so there is nothing to audit; give "
            "scan.sieve or scan.candidates_from, or leave it out."
        )
    if scan.sieve_candidates is not None and scan.sieve_candidates < config.candidates:
        raise ConfigError(
            f"scan.sieve_candidates={scan.sieve_candidates} is less than the {config.candidates} rows per query and "
            "side that are refined (scan.candidates, 4 x top_k where it is null); give at least as many."
        )


def _check_background(config: Config) -> None:
    asked, solver = config.scan.background_queries, config.factors.solver
    if not asked:
        return
    if config.searches:
        raise ConfigError(
            f"scan.background_queries={asked} are asked of everything that is scanned, and with scan.sieve or "
            "scan.candidates_from candidates and the audit alone are; leave one out."
        )
    if config.stages or solver not in (Solver.ekfac, Solver.identity):
        what = "stages" if config.stages else f"factors.solver={solver.value}"
        raise ConfigError(
            f"scan.background_queries={asked} would take as long as the run's own queries to bring through {what}; "
            "leave it out."
        )


def _check_queries(queries: QueriesConfig) -> None:
    given = [key for key in ("prompt", "completion", "contrast") if getattr(queries, key) is not None]
    if given and queries.path not in ("", MISSING):
        raise ConfigError(
            f"queries.{given[0]} and queries.path={_said(queries.path)} are both given: one query, or a file of "
            "queries; leave one out (queries=null takes a preset away)."
        )
    if given and (queries.prompt is None or queries.completion is None):
        missing = "prompt" if queries.prompt is None else "completion"
        raise ConfigError(f"queries.{missing}: no value given; one query has a prompt= and a completion=.")


def _check_ranks(cluster: ClusterConfig) -> None:
    gpus, ranks = cluster.gpus_per_rank or 0.0, cluster.ranks_per_worker
    if gpus > 1:
        raise ConfigError(
            f"cluster.gpus_per_rank={gpus:g}: a rank computes on one GPU; cut the model over several ranks with "
            f"cluster.ranks_per_worker={math.ceil(gpus)} cluster.gpus_per_rank=1."
        )
    if 0 < gpus < 1 and ranks > 1:
        raise ConfigError(
            f"cluster.gpus_per_rank={gpus:g} with cluster.ranks_per_worker={ranks}: the ranks of a worker exchange "
            "parameters by NCCL, which wants a GPU for each; use cluster.gpus_per_rank=1, or one rank per worker."
        )
    for name in cluster.rank_env:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"cluster.rank_env: {_said(name)} is no name of an environment variable.")
        if names_secret(name):
            raise ConfigError(
                f"cluster.rank_env.{name}: by its name a secret, which would be written to config.yaml; set it in the "
                "environment of the nodes instead."
            )


def _check_groups(config: Any, prefix: str = "") -> None:
    """Refuse keys that there are not (`+key=` adds them), and a value in a group's place (`stages=${output}`)."""
    for key in vars(config).keys() - {one.name for one in fields(config)}:
        raise ConfigError(f"{prefix}{key}: there is no such key; --cfg job prints those that there are.")
    for one in fields(config):
        key, value = f"{prefix}{one.name}", getattr(config, one.name)
        default = one.default_factory() if callable(one.default_factory) else None
        if isinstance(default, list) and not isinstance(value, list):
            raise ConfigError(f"{key}={_said(value)}: a list is needed here.")
        if is_dataclass(default):
            if not isinstance(value, type(default)):
                raise ConfigError(f"{key}={_said(value)}: a group of keys is needed here, not a value.")
            _check_groups(value, f"{key}.")


def _check_value(key: str, value: object) -> None:
    """Refuse a value that no key of its kind may have."""
    if isinstance(value, str):
        _check_string(key, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}={value}: must be a finite number.")
    if abs(value) > _MOST_INTEGER and isinstance(value, int):
        raise ConfigError(f"{key}={_said(value)}: whole numbers have at most 63 bits.")
    least, most = BOUNDS.get(unstaged(key), (-math.inf, math.inf))
    if least <= value <= most:
        return
    if (least, most) == _SHARE:
        raise ConfigError(f"{key}={value}: a share of sequences, between 0 and 1.")
    if value > most:
        said = str(most) if isinstance(most, int) else f"{most:g}"
        raise ConfigError(f"{key}={value}: more than is possible; give at most {said}.")
    raise ConfigError(f"{key}={value}: must be {'0 or more' if least == 0 else 'greater than 0'}.")


def _check_string(key: str, value: str) -> None:
    """Refuse text that no file's name, column or address can be."""
    if value == MISSING:
        raise ConfigError(f"{key}: no value given. Add {key}=...")
    if not value and key != "queries.prompt":
        raise ConfigError(f"{key} is empty; give a value, or leave it out for the default.")
    if holds_secret(value):
        raise ConfigError(f"{key}={_said(value)} carries credentials, {MEND}.")
    if "\0" in value:
        raise ConfigError(f"{key}={_said(value)} holds a NUL character, which no name has; remove it.")
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        raise ConfigError(
            f"{key}={_said(value)} holds half a character (a lone surrogate, or bytes that are not UTF-8), which "
            "cannot be written; rename what it names."
        ) from None
    if length > _MOST_BYTES:
        raise ConfigError(f"{key}={_said(value)} has {length:,} bytes; give at most {_MOST_BYTES:,}.")
    is_path = key == "output" or unstaged(key).endswith("path") or ".paths." in key
    if is_path and "://" not in value and any(len(part.encode()) > _MOST_NAME_BYTES for part in value.split("/")):
        raise ConfigError(
            f"{key}={_said(value)}: the names in a path have at most {_MOST_NAME_BYTES} bytes each; shorten them."
        )


def _said(value: object) -> str:
    """A value as an error shows it: on one line, its middle left out where it is long."""
    text = redact(repr(value) if isinstance(value, str) else str(value))
    return text if len(text) <= 120 else f"{text[:80]}...{text[-20:]}"


def _corpora(config: Config) -> Iterator[tuple[str, CorpusConfig]]:
    yield from (("corpus", config.corpus), ("factors.corpus", config.factors.corpus))
    for number, stage in enumerate(config.stages):
        yield f"stages.{number}.corpus", stage.corpus
        yield f"stages.{number}.factors.corpus", stage.factors.corpus


def _check_corpora(config: Config) -> None:
    for name, corpus in _corpora(config):
        if corpus.path and corpus.paths:
            raise ConfigError(
                f"{name}.path={_said(corpus.path)} and {name}.paths are both given: one corpus, or several by label; "
                "leave one out."
            )
        if corpus.sample is not None and not 0 < corpus.sample <= 1:
            raise ConfigError(f"{name}.sample={corpus.sample}: a share of the sequences, above 0 and up to 1.")
        for label in corpus.paths:
            if not _LABEL.fullmatch(label):
                raise ConfigError(f"{name}.paths: {_said(label)} is no label; give 1 to 64 of A-Z, a-z, 0-9, _ and -.")
        if corpus.mask_field is not None and (corpus.prompt_field is not None or corpus.tokens_field is None):
            raise ConfigError(
                f"{name}.mask_field={corpus.mask_field}: a mask says 0 or 1 for every token id of a row; give "
                f"{name}.tokens_field too, and no prompt_field."
            )
        if corpus.sequence_length is not None and corpus.sequence_length < 2:
            raise ConfigError(
                f"{name}.sequence_length={corpus.sequence_length}: a sequence needs two tokens to have a loss; "
                "give at least 2, or null for the model's context (at most 512)."
            )


def _check_stages(config: Config) -> None:
    if not 1 <= config.scan.stage <= max(1, len(config.stages)):
        raise ConfigError(
            f"scan.stage={config.scan.stage}: there are {len(config.stages)} stages; give one of them, 1 for the first."
        )
    if len(config.stages) == 1:
        raise ConfigError("stages: there is one; give two or more, pretraining first, or none.")
    for number, stage in enumerate(config.stages):
        key = f"stages.{number}"
        if (number > 0) != (stage.alpha is not None):
            raise ConfigError(
                f"{key}.alpha={stage.alpha}: every stage has one but the first, which nothing held: alpha of (mean "
                "loss of a sequence) + alpha/2 |theta - theta_before|^2."
            )
        if stage.alpha is not None and not stage.alpha > 0:
            raise ConfigError(
                f"{key}.alpha={stage.alpha}: must be greater than 0; where fine-tuning had no proximal term, a small "
                "one stands for its having stopped early."
            )
        if number + 1 != config.scan.stage:
            # What a single-stage run at this stage would be refused for.
            try:
                check(
                    replace(
                        config.at_stage(number + 1),
                        stages=[],
                        scan=ScanConfig(rank=None, compression=Compression.weighted),
                    )
                )
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from None
