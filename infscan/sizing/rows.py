"""What published rows cost after the scan, and an iterated inverse before it: work by phase, and a rank's memory.

Nothing here is tried on shapes: passes are counted from those of refining and of Lambda, which are, and rows at most:
every row of a query and side is another sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from infscan.config import Config, Solver
from infscan.influence.layers import Layer
from infscan.sizing.hours import Work
from infscan.sizing.memory import PassCost, PassMemory
from infscan.sizing.pricing import Counted, Pricing, share
from infscan.steps import similarity as alike
from infscan.steps.preconditioner import query_groups
from infscan.steps.solve import VECTORS, powers, queries_per_batch, sequences_per_product
from infscan.steps.stability import MOST_CONTEXTS, NEUTRAL
from infscan.steps.targets import SEQUENCES_PER_UNIT, TOGETHER

# Phases that write units as refining does.
ROW_PHASES = ("stability", "self_influence", "similarity", "targets")


def row_costs(
    config: Config, layers: Sequence[Layer], costs: Mapping[str, PassCost], queries: int, *, blocks: bool
) -> dict[str, PassCost]:
    """Memory of the phases that `pass_costs` has no dry run of. blocks: whether the model has blocks to compare."""
    refine, scan = costs["refine"], config.scan
    size, K = sum(layer.size for layer in layers), queries_per_batch(config, layers)
    bases = 4 * sum(layer.outputs**2 + layer.inputs**2 + layer.size for layer in layers)
    forward = replace(refine, memory=replace(refine.memory, gradients=0))
    found = {"measure": forward}
    if config.factors.solver.iterated:
        vectors = (VECTORS * 4 + 8) * size * K // config.cluster.ranks_per_worker
        part = config.factors.iteration.tokens_per_batch / config.tokens_per_batch
        memory = PassMemory(
            weights=refine.memory.weights,
            factors=bases,
            gradients=vectors,
            activations=round(refine.memory.activations * part * (1 + K)),
            allocator=refine.memory.allocator,
        )
        found["solve"] = replace(refine, memory=memory)
    if scan.stability:
        found["stability"] = refine
    if scan.self_influence:
        found["self_influence"] = costs.get("lambda", forward)
    if scan.similarity != 0 and blocks:
        found |= dict.fromkeys(("whitening", "similarity_sample", "similarity"), forward)
    if scan.targets != 0:
        groups, grouped = query_groups(queries, layers, config.query_group_bytes)
        largest = max(sum(layer.size for layer in group) for group in grouped)
        # P, and what some queries share a pass of, in the model's dtype.
        held = 4 * largest * (len(groups[0]) + min(TOGETHER, len(groups[0])))
        found["targets"] = replace(refine, memory=replace(refine.memory, gradients=held))
    return found


def solving(run: Pricing, queries: int, fitted: Counted) -> list[Work]:
    """Products with G: for a batch of K vectors two forwards; for each vector a tangent forward, a backward, and two
    products of every layer."""
    config = run.config
    if not config.factors.solver.iterated:
        return []
    settings, K = config.factors.iteration, min(queries, queries_per_batch(config, run.layers))
    batches = -(-queries // K)
    wanted = settings.batch if config.factors.solver is Solver.cg else None
    all_of_them = min(fitted.sequences, wanted or fitted.sequences)
    own, both_ways = 4.0 * sum(layer.size for layer in run.layers), run.forward_and_backward("refine")
    each = share(fitted, sequences_per_product(config.factors.solver, settings, all_of_them))

    def flop(vectors: int, tokens: int) -> float:
        return tokens * (both_ways + vectors * (both_ways + own))

    steps = batches * settings.steps * flop(K, each) + powers(config.factors.solver, settings) * flop(1, each)
    # The residuals of both solutions.
    last = batches * flop(2 * K, share(fitted, all_of_them))
    sequences = batches * settings.steps * sequences_per_product(config.factors.solver, settings, all_of_them)
    return [run.priced(Work("solve", sequences, 0, steps + last, units=batches))]


def published_rows(run: Pricing, queries: int, scanned: Counted, *, blocks: bool) -> list[Work]:
    """Every phase that goes over published rows again, in a run's order."""
    config, scan, rows = run.config, run.config.scan, _Rows(run, queries, scanned)
    found: list[Work] = []
    if scan.stability:
        found.append(rows.stability(scan.stability))
    if scan.self_influence:
        n, _ = rows.of(scan.self_influence, 1)
        name = "lambda" if "lambda" in run.costs else "refine"
        passes = run.work(name, n, share(scanned, n), len(run.groups))
        found.append(replace(passes, name="self_influence", units=len(run.groups) * -(-n // SEQUENCES_PER_UNIT)))
    if scan.similarity != 0 and blocks:
        found += rows.similarity(scan.similarity)
    if scan.targets != 0:
        found.append(rows.targets(scan.targets))
    return [run.priced(one) for one in found if config.scan.top_k]


def _units(sequences: int, groups: Sequence[range]) -> int:
    """At most: the last of each group of queries has fewer sequences."""
    return -(-sequences // SEQUENCES_PER_UNIT) + len(groups) - 1


class _Rows:
    def __init__(self, run: Pricing, queries: int, scanned: Counted) -> None:
        self.run, self.queries, self.scanned = run, queries, scanned
        self.size = 2.0 * sum(layer.size for layer in run.layers)

    def of(self, most: int | None, groups: int) -> tuple[int, int]:
        """(sequences, pairs) of the strongest rows of every query and side, in so many groups of queries."""
        top_k = self.run.config.scan.top_k
        each = min(top_k if most is None else most, top_k, self.scanned.sequences)
        pairs = self.queries * len(self.run.config.sides) * each
        return min(pairs, groups * self.scanned.sequences), pairs

    def stability(self, most: int) -> Work:
        """As refining, once for each context."""
        groups, grouped = query_groups(self.queries, self.run.layers, self.run.config.refine_group_bytes)
        n, pairs = self.of(most, len(groups))
        again = MOST_CONTEXTS * len(grouped)
        tokens = share(self.scanned, n) + NEUTRAL * n
        own = MOST_CONTEXTS * self.size * (share(self.scanned, pairs) + NEUTRAL * pairs)
        flop = again * tokens * self.run.forward_and_backward("refine") + own
        return Work("stability", again * n, again * tokens, flop, own_flop=own, units=again * _units(n, groups))

    def similarity(self, most: int | None) -> list[Work]:
        """Forwards of a sample, once more for each group of queries, and of the rows: at most half of a forward and
        backward each."""
        forward = self.run.forward_and_backward("refine") / 2
        groups = -(-self.queries // alike.QUERIES_PER_GROUP)
        sampled = min(alike.SAMPLED, self.scanned.sequences)
        n, _ = self.of(most, groups)
        tokens = share(self.scanned, sampled), share(self.scanned, n)
        return [
            Work("whitening", 0, 0, tokens[0] * forward),
            Work("similarity_sample", 0, 0, groups * tokens[0] * forward, units=groups),
            Work("similarity", n, tokens[1], tokens[1] * forward, units=-(-n // alike.SEQUENCES_PER_UNIT)),
        ]

    def targets(self, most: int | None) -> Work:
        """A forward of each row, and one of each row and query that carries a tangent, with a product of each tracked
        layer and the query's gradient."""
        groups, grouped = query_groups(self.queries, self.run.layers, self.run.config.query_group_bytes)
        n, pairs = self.of(most, len(groups))
        tokens, tangents, passes = share(self.scanned, n), share(self.scanned, pairs), len(grouped)
        own = self.size * tangents
        flop = passes * (tokens + tangents) * self.run.forward_and_backward("refine") / 2 + own
        units = passes * _units(n, groups)
        return Work("targets", passes * n, passes * tangents, flop, own_flop=own, units=units)
