"""A run's cost before it runs: work by phase, hours on a device or at a measured rate, memory, bytes, price."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from infscan.config import Config, Solver, plain
from infscan.influence.layers import Layer
from infscan.sizing.hosts import HostMemory
from infscan.sizing.hours import Work
from infscan.sizing.memory import PassCost
from infscan.sizing.pricing import Counted, Pricing, share
from infscan.sizing.rows import published_rows, solving
from infscan.steps.background import TOKENS as BACKGROUND_TOKENS
from infscan.steps.check import compared
from infscan.steps.damping import MOST_SEQUENCES
from infscan.steps.factor_files import partial_bytes
from infscan.steps.gradients import file_units
from infscan.steps.preconditioner import query_groups
from infscan.steps.refine import sequences_per_unit
from infscan.steps.suffix_choice import measured
from infscan.steps.volume import FactorFiles, query_files, scanned_in_full

# Multiply-adds of a symmetric eigensolver with vectors, in units of n^3 (float64).
_EIGH = 9
# Blocks of the Krylov truncation that a query's compression takes, and its columns beyond the rank.
_KRYLOV_BLOCKS, _OVERSAMPLING = 3, 8
# config.yaml, plan.json, shards.parquet, queries.jsonl, approximation.json, summary.json, _SUCCESS; the four tables.
_SMALL_FILES = 11


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
    hosts: HostMemory
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
                "hosts": self.hosts,
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
    run: Pricing, queries: int, query_tokens: int, scanned: Counted, fitted: Counted | None, *, blocks: bool = True
) -> list[Work]:
    """Every phase's sequences, tokens, FLOP and bytes, in a run's order; what loads, cuts or writes alone has none.

    fitted: None where factors are reused or there are none. blocks: whether the model has blocks, whose states can be
    compared. What the scan's own findings decide on (a sieve that is chosen, bases that are shared) is there at most.
    """
    config, layers, work = run.config, run.layers, run.work
    found = [Work("prepare", 0, 0, 0.0)] if scanned.prepared_bytes else []
    found.append(Work("workers", 0, 0, 0.0))
    along = config.scan.background_queries
    if queries:
        flop = query_tokens * run.forward_and_backward("refine")
        found.append(run.priced(Work("measure", queries, 0, flop)))
    if fitted is not None and config.factors.solver is not Solver.identity:
        found += _fitting(run, fitted)
    if "index" in run.costs:
        found.append(replace(work("index", scanned.sequences, scanned.tokens), units=run.shards))
    if not queries:
        return found
    most = min(config.factors.num_sequences, scanned.sequences)
    found += solving(run, queries, fitted or Counted(most, share(scanned, most), scanned.T))
    prepared = queries + along, query_tokens + BACKGROUND_TOKENS * along
    own = _query_flop(config, layers, *prepared)
    more = BACKGROUND_TOKENS * along * run.forward_and_backward("refine")
    found.append(run.priced(Work("queries", *prepared, own + more, own_flop=own)))
    if config.scan.rank == "auto":
        found.append(Work("joint", 0, 0, 0.0))
    groups_of_queries, grouped = query_groups(queries, layers, config.query_group_bytes)
    if config.scan.rank is not None and config.scan.check_sequences >= 3:
        checked = min(config.scan.check_sequences, scanned.sequences)
        cells = len(compared(groups_of_queries, config.seed)) * len(grouped)
        found.append(work("check", checked, share(scanned, checked), cells))
    if isinstance(config.scan.sieve, str):
        tried = measured(scanned.sequences)
        found.append(replace(work("scan", tried, share(scanned, tried)), name="suffix"))
    if "sieve" in run.costs:
        found.append(replace(work("sieve", scanned.sequences, scanned.tokens), units=run.shards))
    full = scanned_in_full(config, queries, scanned.sequences)
    found.append(replace(work("scan", full, share(scanned, full)), units=run.shards))
    found.append(run.priced(_refining(run, queries, scanned)))
    found += published_rows(run, queries, scanned, blocks=blocks)
    return [*found, Work("publish", 0, 0, 0.0)]


def _fitting(run: Pricing, fitted: Counted) -> list[Work]:
    """The passes over the factors' corpus, once for each layer group, and what is between them."""
    config, layers = run.config, run.layers
    blocks, slices = config.factors.blocks, max(1, len(fitted.slices))
    sizes = [layer.outputs for layer in layers if not layer.span]
    sizes += [layer.inputs for layer in layers if layer.input_of == layer.name]
    Lambda = 4.0 * slices * sum(layer.kept_outputs * layer.inputs for layer in layers)
    moments = partial_bytes(layers, blocks, slices) - Lambda
    eigh = math.fsum(_EIGH * n**3 / blocks**2 for n in sizes)
    again = len(run.groups)
    covariance, lam = (run.work(name, fitted.sequences, fitted.tokens, again) for name in ("covariance", "lambda"))
    units = slices * again
    damping = []
    if config.factors.damping.by_fit:
        # A pass like Lambda's over a part of its sequences.
        some = min(fitted.sequences, MOST_SEQUENCES)
        part = run.work("lambda", some, share(fitted, some), again)
        damping.append(replace(part, name="damping", stored=2 * Lambda + moments / slices, behind=Lambda, units=units))
    return [
        replace(covariance, stored=moments, behind=moments, units=units),
        # It reads the sums of every slice, and writes factors and eigenvectors.
        Work("eigenbasis", 0, 0, 0.0, cpu_flop=eigh, stored=moments * (1 + 2 / slices), units=len(layers)),
        # It reads the eigenvectors of a group once.
        replace(lam, stored=Lambda + moments / slices, behind=Lambda, units=units),
        # Lambda's sums are read again at the end.
        Work("factors", 0, 0, 0.0, stored=Lambda),
        *damping,
    ]


def _refining(run: Pricing, queries: int, scanned: Counted) -> Work:
    """At most: each candidate of a query and side is another sequence, as long as a query group has sequences left; one
    that several queries of a group share goes forward and back once for all of them."""
    config, cost = run.config, run.costs["refine"]
    pairs = queries * len(config.sides) * min(config.candidates_of(scanned.sequences), scanned.sequences)
    groups, grouped = query_groups(queries, run.layers, config.refine_group_bytes)
    sequences, passes = min(pairs, len(groups) * scanned.sequences), len(grouped)
    tokens, scored = share(scanned, sequences), share(scanned, pairs)
    size = 2.0 * sum(layer.size for layer in run.layers)
    forward = (cost.flop_per_token - cost.own_flop_per_token) * passes * tokens
    return Work(
        "refine",
        passes * sequences,
        passes * tokens,
        forward + size * scored,
        own_flop=size * scored,
        units=passes * -(-pairs // _refined_at_once(config, pairs, scanned)),
    )


def _refined_at_once(config: Config, pairs: int, scanned: Counted) -> int:
    """Sequences of a unit of refining."""
    return sequences_per_unit(min(pairs, scanned.sequences), config.tokens_per_batch // scanned.T)


def _query_flop(config: Config, layers: Sequence[Layer], queries: int, tokens: int) -> float:
    """Rotating and inverting each query's gradient, and its truncation."""
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
    return queries * per_query


def writes_of(
    config: Config,
    layers: Sequence[Layer],
    queries: int,
    shards: int,
    scanned: Counted,
    factors: FactorFiles,
    gradients: int,
    rows: int = 0,
) -> dict[str, int]:
    """Requests that write, by kind; each is one file. Reads are two per shard and corpus part that it touches.

    gradients: bytes of the queries' gradients. rows: units of what goes over published rows after refining.
    """
    groups, grouped = query_groups(max(1, queries), layers, config.refine_group_bytes)
    pairs = queries * len(config.sides) * min(config.candidates_of(scanned.sequences), scanned.sequences)
    units = (-(-pairs // _refined_at_once(config, pairs, scanned)) + len(groups) - 1) * len(grouped) if queries else 0
    dense = shards if config.scan.scores.value == "all" else 0
    return {
        "factors": factors.files,
        "partial sums": factors.partial_files,
        "query batch": len(query_files(config, layers, queries)),
        "query gradients": len(file_units([gradients // max(1, queries)] * queries)),
        "shards": shards if queries else 0,
        "dense scores": dense if queries else 0,
        "refined units, at most": units + rows,
        "tables and records": _SMALL_FILES,
    }
