"""The query batch: every query's gradient, preconditioned, compressed and laid out, for every rank to read.

Each group of queries and layers is one file in <output>/queries; so is each shared basis. What of it is planned here
goes by its spectra; its columns go from storage to the ranks (`infscan.steps.stored_queries`). The scan sees the layout
only (`infscan.influence.layout`), and nothing of the factors (docs/method.md#query-batching).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infscan.config import Compression, Dtype, fingerprint
from infscan.engine.executor import Pieces, Step
from infscan.errors import DamagedError
from infscan.influence import layout
from infscan.influence.compress import Compressed, compress, compress_weighted
from infscan.influence.layers import Layer
from infscan.influence.layout import (
    ON_CPU,
    Array,
    Basis,
    Factored,
    LayoutPlan,
    Prices,
    QueryBatch,
    SharedBasis,
    StoredQueries,
    Way,
    basis_from_arrays,
    basis_to_arrays,
    plan_layouts,
    prices_on,
    query_weights,
    shared_basis_pays,
    stored_dense,
    to_arrays,
    to_tensor,
)
from infscan.influence.precision import multiplying
from infscan.influence.score import LayerQueries, Scratch
from infscan.influence.shared_basis import shared_basis
from infscan.model.worker import ModelWorker
from infscan.queries import MEASURED, Query, measured_jsonl, queries_fingerprint
from infscan.results.tensor_files import read_facts, read_tensors, write_tensors
from infscan.steps.background import ASKED_ALONG, NO_BACKGROUND, Background
from infscan.steps.factors import Factors
from infscan.steps.inputs import in_dtype
from infscan.steps.preconditioner import (
    DampedFactors,
    Preconditioner,
    check_finite,
    core,
    full_rank,
    layer_factors,
    query_groups,
    sources,
)
from infscan.steps.run import Run
from infscan.steps.stored_queries import StoredBatch, read_bases, read_layouts, read_spectra
from infscan.storage import Store

# The ways of scoring a layer as approximation.json has always named them.
_PUBLISHED: dict[Way, str] = {"factored": "low", "dense": "full", "shared_basis": "joint"}
Cell = tuple[int, int]


@dataclass(frozen=True)
class BroadcastQueries:
    """All queries' compressed gradients, laid out for scoring, as every rank reads them."""

    fingerprint: str
    # `Pieces` of a layer each, (name, layout), as `Executor.share_by_node` gave them.
    batch: Any
    # How many layers are scored in each way, as approximation.json names them.
    layouts: dict[str, int]
    # Of its columns: the run's own queries, then those of the background.
    query_ids: tuple[str, ...]
    # How many of them are the run's own.
    own: int


def query_batch(run: Run, factors: Factors, background: Background = NO_BACKGROUND) -> BroadcastQueries:
    """Gradients, inverse and compression of all queries; stored in <output>/queries, where ranks read them.

    background: asked along, in the last columns.
    """
    config, inputs = run.config, run.inputs
    queries = (*run.queries, *background.queries)
    asked_along = {"background": queries_fingerprint(background.queries)} if background.queries else {}
    key = fingerprint(
        {
            **asked_along,
            **inputs.fingerprints(),
            "factors": factors.fingerprint,
            "inverse": factors.inverse.fingerprint,
            "rank": config.scan.rank,
            "energy": config.scan.energy if config.scan.rank == "auto" else None,
            "compression": config.scan.compression,
            "query_dtype": str(inputs.query_dtype),
        }
    )
    run.store.write(MEASURED, measured_jsonl(run.queries))
    if background.queries:
        run.store.write(ASKED_ALONG, measured_jsonl(background.queries))
    names, auto = _compress(run, factors, queries, key), config.scan.rank == "auto"
    layer_groups = query_groups(len(queries), inputs.layers, config.query_group_bytes)[1]
    spectra = read_spectra(run.store, names, layer_groups, config.most_rank)
    T = run.architecture.sequence_length(config.corpus.sequence_length)
    plan = plan_layouts(
        spectra,
        inputs.layers,
        T,
        config.query_group_bytes // inputs.query_dtype.itemsize,
        config.scan.energy if auto else None,
        share=auto,
        prices=prices_on(inputs.device, config.tokens_per_batch // T),
    )
    batch = StoredBatch(
        store=run.store,
        names=tuple(map(tuple, names)),
        layer_groups=tuple(layer_groups),
        plan=plan,
        bases={},
        queries=len(queries),
        dtype=str(inputs.query_dtype).removeprefix("torch."),
    )
    if plan.candidates:
        files = _shared_bases(run, factors, batch, query_weights(spectra, inputs.layers), key)
        bases = read_bases(run.store, files)
        plan = plan.with_bases(bases)
        batch = replace(batch, plan=plan, bases={name: files[name] for name in bases})
    _warn_over_budget(run, plan, len(queries))
    counted = Counter(plan.ways.values())
    shared = run.executor.share_by_node(read_layouts, (batch,), batch.pieces)
    layouts = {name: counted[way] for way, name in _PUBLISHED.items()}
    return BroadcastQueries(key, shared, layouts, tuple(query.id for query in queries), len(run.queries))


def _compress(run: Run, factors: Factors, queries: Sequence[Query], key: str) -> list[list[str]]:
    """Have every file of the query batch written; their names, by group of queries and then of layers."""
    config = run.config
    groups, layer_groups = query_groups(len(queries), run.inputs.layers, config.query_group_bytes)
    names = [
        [f"queries/batch-{q:04d}-layers-{g:02d}.safetensors" for g in range(len(layer_groups))]
        for q in range(len(groups))
    ]

    def task(cell: Cell) -> QueryTask:
        q, g = cell
        return QueryTask(
            store=run.store,
            name=names[q][g],
            queries=tuple(queries[index] for index in groups[q]),
            layers=layer_groups[g],
            inverse=factors.inverse,
            rank=config.most_rank,
            compression=config.scan.compression,
            fingerprint=key,
        )

    step = Step(
        name="queries",
        unit_name="groups",
        units=[(q, g) for q in range(len(groups)) for g in range(len(layer_groups))],
        function=query_task,
        task=task,
        is_done=lambda cell: is_made(run, names[cell[0]][cell[1]], key),
        progress=lambda cell, tokens: (len(groups[cell[0]]), tokens),
    )
    run.executor.run(step)
    return names


def _shared_bases(run: Run, factors: Factors, batch: StoredBatch, weights: np.ndarray, key: str) -> dict[str, str]:
    """A shared basis for every candidate of the plan where that is cheaper, found once: its file, by layer."""
    plan = batch.plan
    names = {
        number: f"queries/joint-{number:04d}.safetensors"
        for number, layer in enumerate(plan.layers)
        if layer.name in plan.candidates
    }

    def task(number: int) -> SharedBasisTask:
        layer = plan.layers[number]
        return SharedBasisTask(
            store=run.store,
            name=names[number],
            layer=layer,
            inverse=factors.inverse,
            compression=run.config.scan.compression,
            weights=weights,
            energy=run.config.scan.energy,
            tokens=plan.tokens,
            entries=plan.candidates[layer.name],
            fingerprint=key,
            prices=plan.prices,
        )

    step = Step(
        name="joint",
        unit_name="layers",
        units=list(names),
        function=shared_basis_task,
        task=task,
        is_done=lambda number: is_made(run, names[number], key),
    )
    run.executor.run(step, shared=[run.executor.share(batch)])
    return {plan.layers[number].name: name for number, name in names.items()}


def _warn_over_budget(run: Run, plan: LayoutPlan, queries: int) -> None:
    if plan.over_budget:
        itemsize = run.inputs.query_dtype.itemsize
        needed = queries * sum(layer.size for layer in plan.layers) * itemsize
        halved = "" if itemsize <= 2 else ", or scan.query_dtype=bfloat16, which halves them"
        run.telemetry.warn(
            f"{len(plan.over_budget)} layers are scored by their queries' columns, {plan.times:.1f} times the products "
            f"that matrices would take: those have no room in scan.query_group_bytes="
            f"{run.config.query_group_bytes}; give up to {needed} of a rank's memory{halved}."
        )


def is_made(run: Run, name: str, key: str) -> bool:
    """Whether a file in <output>/queries is there, of this key and whole; a damaged one is made again."""
    if not run.store.exists(name):
        return False
    try:
        if read_facts(run.store, name).get("fingerprint") != key:
            return False
        read_tensors(run.store, name)
    except DamagedError as error:
        run.telemetry.warn(f"{error} It is computed again now.")
        return False
    return True


@dataclass(frozen=True)
class QueryTask:
    """A group of queries for a group of layers; the result is one file of the query batch."""

    store: Store
    name: str
    queries: tuple[Query, ...]
    layers: tuple[Layer, ...]
    inverse: Preconditioner
    # Columns that are kept of each query and layer; None: all, as one matrix.
    rank: int | None
    compression: Compression
    fingerprint: str


@multiplying("exact")
def query_task(worker: ModelWorker, task: QueryTask) -> int:
    """Gradients, inverse and compression of a group of queries for a group of layers; rank 0 writes one file.

    Returns the tokens measured.
    """
    V = sources(worker, task.queries, task.layers, task.inverse)
    solved = task.inverse.solutions is not None
    tensors: dict[str, Tensor] = {}
    for layer in task.layers:
        known = layer_factors(task.inverse, layer, worker.device, worker.wide)
        # One query at a time: within a product of all of them a query's bits could depend on the others.
        with multiplying(task.inverse.matmul):
            cores = [core(one, layer, known, solved=solved) for one in V[layer.name]]
            by_query = [_compressed(task, layer, one, known) for one in cores]
        tensors |= to_arrays(layer.name, by_query)
        finite = [torch.isfinite(one if isinstance(one, Tensor) else one.U_or).all() for one in by_query]
        check_finite(layer.name, task.queries, torch.stack(finite))
    if worker.leads:
        write_tensors(task.store, task.name, tensors, {"fingerprint": task.fingerprint})
    return sum(len(part.token_ids) for query in task.queries for part in query.parts)


def _compressed(task: QueryTask, layer: Layer, C_oi: Tensor, known: DampedFactors) -> Compressed | Tensor:
    """One query and layer: its columns, or P. C: its core in the eigenbases, or (without factors) its gradient."""
    if task.rank is None or stored_dense(layer, task.rank):
        return full_rank(C_oi, known)
    if known and task.compression is Compression.weighted:
        return compress_weighted(C_oi, known[0], task.rank)
    return compress(full_rank(C_oi, known), task.rank)


@dataclass(frozen=True)
class SharedBasisTask:
    """One layer of a query batch whose ranks are allocated; the result is one file."""

    store: Store
    name: str
    layer: Layer
    inverse: Preconditioner
    compression: Compression
    weights: np.ndarray  # float64 [Q], by which a query's squares count
    energy: float  # of the layer's squares in the columns, what the basis keeps
    tokens: int  # T of a sequence, which settles what is cheaper
    entries: int  # that the cores may have, or the dense matrices instead
    fingerprint: str
    prices: Prices = ON_CPU


def shared_basis_task(worker: ModelWorker, task: SharedBasisTask, batch: StoredBatch | QueryBatch) -> Basis | None:
    """Find the layer's shared basis and write it; or an empty file, where another way is cheaper or nothing fits.

    batch: of which the layer's columns alone are read.

    Returns (m, n), zeros for an empty file, on rank 0.
    """
    if not worker.leads:
        return None
    layer, columns = task.layer, batch[task.layer.name]
    assert isinstance(columns, Factored), f"{layer.name} is stored dense"
    U_xo, V_xi = (to_tensor(side, worker.device, worker.wide) for side in (columns.U_xo, columns.V_xi))
    known = layer_factors(task.inverse, layer, worker.device, worker.wide)
    factors = known[0] if known and task.compression is Compression.weighted else None
    weights = worker.to_device(task.weights)
    found = shared_basis(
        U_xo, V_xi, columns.ranks, factors, weights, task.energy, task.tokens * layer.share, task.entries, task.prices
    )
    if found and not shared_basis_pays(layer, columns.ranks, task.tokens, found.basis, task.entries, task.prices):
        found = None
    write_tensors(task.store, task.name, basis_to_arrays(found), {"fingerprint": task.fingerprint})
    return found.basis if found else (0, 0)


def read_shared_bases(store: Store, names: Sequence[tuple[Layer, str]]) -> dict[str, SharedBasis[Array]]:
    """The shared bases of those layers that have one, by name. names: every layer that was tried, with its file."""
    read = {
        layer.name: basis_from_arrays({kind: tensor.numpy() for kind, tensor in read_tensors(store, name).items()})
        for layer, name in names
    }
    return {name: found for name, found in read.items() if found}


def read_query_batch(store: Store, names: Sequence[Sequence[str]]) -> StoredQueries:
    """Read the whole query batch. names: its files, by group of queries and then by group of layers."""
    return layout.from_arrays(
        [
            {key: tensor.numpy() for name in files for key, tensor in read_tensors(store, name).items()}
            for files in names
        ]
    )


def on_device(worker: ModelWorker, batch: Pieces | QueryBatch, dtype: Dtype | None = None) -> dict[str, LayerQueries]:
    """The query batch laid out for scoring, on this rank's device, layer after layer. dtype: as of `in_dtype`."""
    scratch, by_name = Scratch.on(worker.device), {layer.name: layer for layer in worker.layers}
    found: dict[str, LayerQueries] = {}
    for name, one in batch.items() if isinstance(batch, Mapping) else batch.read():
        products = in_dtype(dtype, worker.model.dtype)
        found |= layout.on_device({name: one}, [by_name[name]], worker.device, products, scratch)
    return found
