"""A run's cost before it runs: work by phase, hours on a device or at a measured rate, memory, bytes, price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infscan.config import Config, Solver, plain
from infscan.influence.layers import Layer
from infscan.sizing.memory import PassCost
from infscan.steps.factor_files import layer_groups
from infscan.steps.preconditioner import query_groups
from infscan.steps.volume import FactorFiles, query_files

# Multiply-adds of LAPACK's symmetric eigensolver with vectors, in units of n^3 (float64, on a CPU core).
_EIGH = 9
# Blocks of the Krylov truncation that a query's compression takes, and its columns beyond the rank.
_KRYLOV_BLOCKS, _OVERSAMPLING = 3, 8
_SEQUENCES_PER_UNIT = 256
# config.yaml, plan.json, shards.parquet, queries.jsonl, approximation.json, summary.json, _SUCCESS; the four tables.
_SMALL_FILES = 11


@dataclass(frozen=True)
class Counted:
    """The sequences that a pass reads. how: `exact`, `given`, or what was sampled.

    sequences, tokens: of the selection. T: tokens of the longest. slices: (sequences, longest) of the factors' slices.
    """

    sequences: int
    tokens: int
    T: int
    how: str = "exact"
    slices: tuple[tuple[int, int], ...] = ()
    prepared_bytes: int = 0


@dataclass(frozen=True)
class Work:
    """One phase. flop: on the ranks' devices; cpu_flop: float64, on CPU cores. seconds: with all workers; None where
    neither a device nor a rate says it."""

    name: str
    sequences: int
    tokens: int
    flop: float
    cpu_flop: float = 0.0
    seconds: float | None = None


@dataclass(frozen=True)
class Rate:
    """What turns work into time: a peak and the share of it that is reached, or a measured rate of the scan.

    flops: of one rank. tokens_per_s: of one worker's scan; other phases go by their FLOP. refine_speed: the refining
    dtype's peak over the scan's. measured: by phase, of a finished run: (tokens or sequences per second and worker, or
    None; seconds, where nothing is counted).
    """

    flops: float | None = None
    refine_speed: float = 1.0
    tokens_per_s: float | None = None
    measured: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """All of it; `to_json` is what `plan.json=true` prints."""

    parameters: int
    tracked: int
    queries: int
    corpus: Counted
    shards: int
    shard_sequences: int
    work: tuple[Work, ...]
    costs: Mapping[str, PassCost]
    factors: FactorFiles
    bytes: Mapping[str, int]
    writes: Mapping[str, int]
    workers: int
    ranks: int
    price_per_hour: float | None = None
    notes: tuple[str, ...] = ()
    # The share of the parameters that is tracked, and a line for every place that tracked layers have in their blocks.
    share: float = 1.0
    by_block: tuple[str, ...] = ()

    @property
    def seconds(self) -> float | None:
        """Wall time of all phases; None where one's is not known."""
        known = [work.seconds for work in self.work if work.flop or work.seconds is not None]
        return None if None in known else math.fsum(second for second in known if second is not None)

    @property
    def rank_hours(self) -> float | None:
        return None if self.seconds is None else self.seconds * self.workers * self.ranks / 3600

    @property
    def price(self) -> float | None:
        hours = self.rank_hours
        return None if hours is None or self.price_per_hour is None else hours * self.price_per_hour

    def to_json(self) -> dict[str, Any]:
        return plain(
            {
                "model": {"parameters": self.parameters, "tracked_layers": self.tracked, "tracked_share": self.share},
                "tracked": self.by_block,
                "queries": self.queries,
                "corpus": self.corpus,
                "shards": self.shards,
                "shard_sequences": self.shard_sequences,
                "phases": {work.name: work for work in self.work},
                "memory": {name: vars(cost.memory) | {"total": cost.memory.total} for name, cost in self.costs.items()},
                "factors": self.factors,
                "bytes": dict(self.bytes),
                "writes": dict(self.writes),
                "workers": self.workers,
                "ranks_per_worker": self.ranks,
                "seconds": self.seconds,
                "rank_hours": self.rank_hours,
                "price": self.price,
                "notes": self.notes,
            }
        )


def work_of(
    config: Config,
    layers: Sequence[Layer],
    costs: Mapping[str, PassCost],
    queries: int,
    query_tokens: int,
    scanned: Counted,
    fitted: Counted | None,
) -> list[Work]:
    """Every phase's sequences, tokens and FLOP. fitted: None where factors are reused or there are none."""

    def work(name: str, sequences: int, tokens: int, times: int = 1) -> Work:
        return Work(name, times * sequences, times * tokens, times * tokens * costs[name].flop_per_token)

    found: list[Work] = []
    if fitted is not None and config.factors.solver is not Solver.identity:
        groups = len(layer_groups(layers, config.factors.max_group_bytes, config.factors.blocks))
        blocks = config.factors.blocks
        sizes = [layer.outputs for layer in layers]
        sizes += [layer.inputs for layer in layers if layer.input_of == layer.name]
        found.append(work("covariance", fitted.sequences, fitted.tokens, groups))
        found.append(Work("eigenbasis", 0, 0, 0.0, cpu_flop=math.fsum(_EIGH * n**3 / blocks**2 for n in sizes)))
        found.append(work("lambda", fitted.sequences, fitted.tokens, groups))
    if not queries:
        return found
    found.append(Work("queries", queries, query_tokens, _query_flop(config, layers, costs, queries, query_tokens)))
    groups_of_queries, grouped = query_groups(queries, layers, config.scan.query_group_bytes)
    cells = len(groups_of_queries) * len(grouped)
    if config.scan.rank is not None and config.scan.check_sequences >= 3:
        checked = min(config.scan.check_sequences, scanned.sequences)
        found.append(work("check", checked, _share(scanned, checked), cells))
    found.append(work("scan", scanned.sequences, scanned.tokens))
    found.append(_refining(config, layers, costs, queries, scanned, len(groups_of_queries), len(grouped)))
    return found


def _refining(
    config: Config,
    layers: Sequence[Layer],
    costs: Mapping[str, PassCost],
    queries: int,
    scanned: Counted,
    query_groups: int,
    layer_groups: int,
) -> Work:
    """At most: each candidate of a query and side is another sequence, as long as a query group has sequences left; one
    that several queries of a group share goes forward and back once for all of them."""
    pairs = queries * len(config.sides) * min(config.candidates, scanned.sequences)
    sequences = min(pairs, query_groups * scanned.sequences)
    tokens, scored = _share(scanned, sequences), _share(scanned, pairs)
    again = 2.0 * sum(layer.size for layer in layers) * (scored - tokens)
    return Work(
        "refine",
        layer_groups * sequences,
        layer_groups * tokens,
        layer_groups * tokens * costs["refine"].flop_per_token + again,
    )


def _share(counted: Counted, sequences: int) -> int:
    return round(counted.tokens * sequences / max(1, counted.sequences))


def _query_flop(
    config: Config, layers: Sequence[Layer], costs: Mapping[str, PassCost], queries: int, tokens: int
) -> float:
    """Forward and backward over the queries' tokens; rotating and inverting each query's gradient; its truncation."""
    r = config.most_rank
    per_query = 0.0
    each = tokens / queries
    for layer in layers:
        O, I = layer.outputs, layer.inputs
        per_query += 2 * each * (O * O + I * I + O * I)
        if r is None or min(O, I) <= r:
            per_query += 2 * O * I * (O + I)
        else:
            columns = r + _OVERSAMPLING
            per_query += 4 * O * I * columns * _KRYLOV_BLOCKS + 2 * (O * O + I * I) * r
    return queries * per_query + tokens * costs["refine"].flop_per_token


def timed(work: Sequence[Work], rate: Rate, workers: int, ranks: int) -> tuple[Work, ...]:
    """The same phases with seconds where they can be told."""
    scan = next((one for one in work if one.name == "scan"), None)
    per_token = scan.flop / scan.tokens if scan and scan.tokens else None

    def seconds(one: Work) -> float | None:
        if known := rate.measured.get(one.name):
            if "tokens_per_s" in known and one.tokens:
                return one.tokens / known["tokens_per_s"] / workers
            if "sequences_per_s" in known and one.sequences:
                return one.sequences / known["sequences_per_s"] / workers
            return known["seconds"]
        speed = rate.refine_speed if one.name == "refine" else 1.0
        if rate.tokens_per_s and per_token and one.flop:
            return one.flop / per_token / rate.tokens_per_s / workers / speed
        if rate.flops and one.flop:
            return one.flop / rate.flops / workers / ranks / speed
        return None

    return tuple(Work(one.name, one.sequences, one.tokens, one.flop, one.cpu_flop, seconds(one)) for one in work)


def rates_of(summary: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What a finished run's summary.json says of each phase: tokens, else sequences, per second and worker."""
    workers = summary["workers"]["num_workers"]
    found: dict[str, dict[str, float]] = {}
    for name, phase in summary["phases"].items():
        took = max(phase["seconds"], 1e-3)
        found[name] = {"seconds": took}
        for kind in ("tokens", "sequences"):
            if phase[kind]:
                found[name][f"{kind}_per_s"] = phase[kind] / took / workers
    return found


def writes_of(
    config: Config, layers: Sequence[Layer], queries: int, shards: int, N: int, factors: FactorFiles
) -> dict[str, int]:
    """Requests that write, by kind; each is one file. Reads are two per shard and corpus part that it touches."""
    groups, grouped = query_groups(max(1, queries), layers, config.scan.query_group_bytes)
    pairs = queries * len(config.sides) * min(config.candidates, N)
    units = (-(-pairs // _SEQUENCES_PER_UNIT) + len(groups) - 1) * len(grouped) if queries else 0
    dense = shards if config.scan.scores.value == "all" else 0
    return {
        "factors": factors.files,
        "partial sums": factors.partial_files,
        "query batch": len(query_files(config, layers, queries)),
        "shards": shards if queries else 0,
        "dense scores": dense if queries else 0,
        "refined units, at most": units,
        "tables and records": _SMALL_FILES,
    }
