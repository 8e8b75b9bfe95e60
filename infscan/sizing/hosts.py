"""Host memory that is nobody's rank's: the driver's, and what a node's ranks read together (docs/sizing.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infscan.config import Config
from infscan.influence.layers import Layer
from infscan.influence.layout import LayoutPlan, Spectrum, plan_layouts, stored_dense

# What a driver's or a rank's process takes at work beside what it computes: libraries that are loaded or set up as they
# are first used, Ray's connection, Arrow's pools (measured: benchmarks/job_memory.py).
LIBRARIES_BYTES = 140 << 20
# With what it takes before (torch for a CPU): people are told.
PROCESS_BYTES = 600 << 20
# Of a planned shard and of a candidate row, beside the thresholds (measured: benchmarks/driver.py).
_SHARD, _ROW = 400, 100


@dataclass(frozen=True)
class HostMemory:
    """Bytes at most. driver: beside its process. node: of Ray's object store, on every node that has a rank."""

    driver: int
    node: int


def host_memory(
    config: Config, layers: Sequence[Layer], queries: int, T: int, shards: int, itemsize: int
) -> HostMemory:
    """itemsize: of the dtype that queries are scored in (`scan.query_dtype`).

    The driver holds what each column of a query contributes, twice while it is joined, and the candidates; a node the
    query batch itself, in that dtype.
    """
    if not queries:
        return HostMemory(_SHARD * shards, 0)
    rank = config.most_rank
    factored = [layer for layer in layers if not stored_dense(layer, rank)]
    numbers = 2 * 8 * queries * len(factored) * ((rank or 0) + 1)
    rows = _ROW * queries * len(config.sides) * config.candidates
    spectra = {layer.name: Spectrum.largest(queries, rank or 0) for layer in factored}
    auto = config.scan.rank == "auto"
    plan = plan_layouts(spectra, layers, T, config.query_group_bytes // itemsize, share=auto)
    plans = [plan, plan.with_largest_bases()] if plan.candidates else [plan]
    entries = max(shared_entries(one, queries) for one in plans)
    return HostMemory(numbers + rows + _SHARD * shards, entries * itemsize)


def shared_entries(plan: LayoutPlan, queries: int) -> int:
    """Numbers of a query batch of this plan, as it is read from storage (`infscan.steps.stored_queries`)."""
    total = 0
    for layer in plan.layers:
        O, I = layer.outputs, layer.inputs
        if layer.name in plan.bases:
            m, n = plan.bases[layer.name]
            total += queries * m * n + (m * O if m < O else 0) + (n * I if n < I else 0)
        elif layer.name in plan.ranks:
            total += sum(plan.ranks[layer.name]) * (O + I)
        else:
            total += queries * O * I
    return total
