"""Fit EK-FAC factors, or reuse those in storage (docs/method.md#ek-fac).

Covariance sums per (layer group, slice of sequences), eigenbases per layer, Lambda sums per (layer group, slice),
Lambda per layer. Slices are fixed in the factors' plan and sums are added in their order, so the factors do not depend
on which worker did what; whatever is in storage already is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infscan.config import Labels, Solver
from infscan.corpus.addressable import AddressableCorpus, CorpusAddress
from infscan.corpus.plan import Selection
from infscan.engine.executor import Executor, Load, Step, TaskMap
from infscan.influence.blocks import BlockDiagonal, block_sizes
from infscan.influence.covariance import add_second_moment, mirror
from infscan.influence.eigenbasis import BYTES_PER_ENTRY, add_squared_gradients, check_width, threads_for
from infscan.influence.layers import Layer
from infscan.influence.precision import Multiply, multiplying
from infscan.influence.routed import Routed
from infscan.influence.span import Rotation, SpannedBasis, add_sketch, add_spanned_squares, sketch_matrix
from infscan.model.worker import Batch, LayerConsumer, ModelWorker
from infscan.results.tensor_files import damaged, read_facts, read_tensor, tensor_bytes
from infscan.steps.damping import fit_damping
from infscan.steps.eigenbases import (
    check_eigenbases,
    decompose_layer,
    eigenbases_digest,
    finish_layer,
    has_bases,
    pool_lambda,
    pool_moments,
)
from infscan.steps.factor_files import (
    COMPLETE,
    FITTING,
    FactorsPlan,
    block_keys,
    check_files,
    complete,
    identity_of,
    labels_path,
    layer_groups,
    named_blocks,
    partial_path,
    remove_partials,
    sketch_key,
    slice_count,
    store_plan,
    tokens_key,
    trace_key,
    widest_block,
)
from infscan.steps.gradients import StoredTokens
from infscan.steps.inputs import Inputs
from infscan.steps.labels import FitTask, Targets
from infscan.steps.preconditioner import Preconditioner, StoredGradients
from infscan.steps.prepare import prepare_factors_corpus
from infscan.steps.run import Run
from infscan.steps.volume import check_disk_for_factors
from infscan.storage import MissingError, Store

log = logging.getLogger("infscan")

# A layer group's number and a slice's.
Cell = tuple[int, int]


@dataclass(frozen=True)
class Factors:
    """Finished factors, as the steps after them use them."""

    inverse: Preconditioner
    # None for solver=identity, as is what follows.
    fingerprint: str | None
    # The corpus and the sequences of it that they are of.
    curvature: tuple[AddressableCorpus, Selection] | None = None
    # What `infscan.steps.solve` found, by query, for summary.json.
    iteration: dict[str, Any] | None = None


def fit(run: Run, vectors: StoredGradients | StoredTokens | None = None) -> Factors:
    """Covariance sums, eigenbases, Lambda sums; each piece that is in storage already is kept.

    vectors: what the inverse is applied to: the queries' gradients or, with stages, what the later ones left of them.
    None has gradients taken where they are needed.

    Raises:
        FactorsError: where factors.path holds factors of another model, corpus or setting, naming what differs.
    """
    config, store = run.config, run.folder.factors
    settings = config.factors
    inverse = Preconditioner(store, settings.solver, settings.damping, config.alpha, matmul=run.inputs.matmul)
    if isinstance(vectors, StoredTokens):
        inverse = replace(inverse, tokens=vectors)
    else:
        inverse = replace(inverse, vectors=vectors)
    if config.factors.solver is Solver.identity:
        return Factors(inverse, None)
    corpus = prepare_factors_corpus(run)
    plan = store_plan(store, plan_factors(run.inputs, corpus))
    if not store.exists(COMPLETE):
        check_disk_for_factors(config, plan, store)
    gpus = config.cluster.ranks_per_worker if run.inputs.device == "cuda" else 0
    fit_factors(run.executor, store, corpus, plan, config.factors.labels, config.seed, gpus=gpus)
    if settings.damping.by_fit:
        fit_damping(run.executor, store, corpus, plan, settings.labels, config.seed, lambda_task)
    inverse = replace(inverse, identity=identity_of(store))
    return Factors(inverse, plan.fingerprint, (corpus, plan.selection))


def plan_factors(inputs: Inputs, corpus: AddressableCorpus) -> FactorsPlan:
    """What is to be fitted on a corpus, and in which pieces."""
    config, settings, layers = inputs.config, inputs.config.factors, inputs.layers
    wanted = min(settings.num_sequences, settings.corpus.max_sequences or settings.num_sequences)
    selection = Selection.of(corpus.sequences, wanted, config.seed, share=settings.corpus.sample)
    fields: dict[str, Any] = {
        "fitting": FITTING,
        "model": inputs.architecture.fingerprint,
        "dtype": inputs.dtype,
        "tracked": [layer.name for layer in layers],
        "tokenizer": corpus.tokenizer,
        "corpus": corpus.fingerprint,
        **corpus.reading.fields(),
        "labels": settings.labels.value,
        "blocks": settings.blocks,
        "num_sequences": selection.size,
        "sample": selection.digest(),
        "seed": config.seed,
    }
    if spans := {layer.name: layer.span for layer in layers if layer.span}:
        fields["span"] = spans
    if inputs.matmul == "tf32":
        fields["matmul"] = inputs.matmul
    return FactorsPlan(
        fields=fields,
        layers=layers,
        selection=selection,
        slices=slice_bounds(selection.size, slice_count(settings.slices, selection.size, layers, settings.blocks)),
        groups=layer_groups(layers, config.group_bytes, settings.blocks),
        tokens_per_batch=config.tokens_per_batch,
    )


def fit_factors(
    executor: Executor,
    store: Store,
    corpus: AddressableCorpus,
    plan: FactorsPlan,
    labels: Labels,
    seed: int,
    *,
    gpus: int = 0,
) -> None:
    """Fit what the plan says into `store`, or check what is complete there. gpus: of a worker's ranks, which decompose
    there; none on a CPU.

    Raises:
        FactorsError: at once, where a layer is wider than can be decomposed here.
    """
    if store.exists(COMPLETE):
        if check_files(store)["fingerprint"] != plan.fingerprint:
            raise damaged(store, COMPLETE, "it is of another fit than plan.json")
        log.info("factors     reused from %s", store.uri)
        remove_partials(store)
        return
    for layer in plan.layers:
        for kind, n in (("A", layer.inputs), ("S", 0 if layer.span else layer.outputs)):
            check_width(max(block_sizes(n, plan.blocks)), f"{kind} of {layer.name}")
    log.info(
        "factors     %d layers, %d sequences in %d slices x %d layer groups; partial sums take %.1f MiB in storage",
        len(plan.layers), plan.selection.size, len(plan.slices), len(plan.groups), plan.partial_bytes() / 2**20,
    )  # fmt: skip
    fitting = _Fitting(store, CorpusAddress.of(corpus), plan, labels, seed)
    try:
        fitting.sum_covariances(executor)
        if plan.stacks:
            executor.map_tasks(fitting.on_stacks("experts", pool_moments))
        fitting.decompose(executor, gpus=gpus)
        fitting.sum_lambdas(executor)
        if plan.stacks:
            executor.map_tasks(fitting.on_stacks("damping", pool_lambda))
        fitting.finish(executor)
        check_eigenbases(store, plan.layers)
        store.write_json(COMPLETE, complete(store, plan))
    except MissingError:
        # A second driver was first: it finished the factors and removed the partial sums that this one was adding.
        if not store.exists(COMPLETE):
            raise
    remove_partials(store)
    executor.forget()


@dataclass(frozen=True)
class _Fitting:
    """The steps of one fit."""

    store: Store
    corpus: CorpusAddress
    plan: FactorsPlan
    labels: Labels
    seed: int

    def sum_covariances(self, executor: Executor) -> None:
        """The first layer group draws the labels; the other groups read them, so they go second."""
        if all(self.store.exists(f"S/{layer.name}.safetensors") for layer in self.plan.layers):
            return
        for groups in ([0], list(range(1, len(self.plan.groups)))):
            executor.run(self._step("covariance", groups, covariance_task, self._covariance_task, self._has_covariance))

    def _covariance_task(self, cell: Cell) -> FitTask:
        drawn = cell[0] == 0 and not self.store.exists(labels_path(cell[1]))
        return self._task(cell, draw_labels=self.labels is Labels.sampled and drawn)

    def _has_covariance(self, cell: Cell) -> bool:
        return self.store.exists(partial_path("covariance", *cell))

    def sum_lambdas(self, executor: Executor) -> None:
        groups = range(len(self.plan.groups))
        digests = [eigenbases_digest(self.store, self.plan.group(group)) for group in groups]

        def is_done(cell: Cell) -> bool:
            path = partial_path("lambda", *cell)
            return self.store.exists(path) and read_facts(self.store, path)["eigenbases"] == digests[cell[0]]

        executor.run(self._step("lambda", list(groups), lambda_task, self._task, is_done))

    def _step(
        self,
        name: str,
        groups: list[int],
        function: Callable[..., int | None],
        task: Callable[[Cell], FitTask],
        is_done: Callable[[Cell], bool],
    ) -> Step[Cell]:
        def progress(cell: Cell, tokens: int) -> tuple[int, int]:
            start, stop = self.plan.slices[cell[1]]
            return stop - start, tokens

        cells = [(group, index) for group in groups for index in range(len(self.plan.slices))]
        return Step(name, "slices", cells, function, task, is_done, progress, lambda cell: self._task(cell).reads)

    def _task(self, cell: Cell, *, draw_labels: bool = False) -> FitTask:
        return FitTask(self.store, self.corpus, self.plan, *cell, self.labels, self.seed, draw_labels)

    def decompose(self, executor: Executor, *, gpus: int) -> None:
        """The eigenbases: on the ranks' GPUs where they have any, one on each at a time, else in processes of their
        own."""
        if not gpus:
            executor.map_tasks(replace(self.on_layers("eigenbasis", decompose_layer), load=self._load))
            return
        # A worker's ranks take a layer each: of like widths, so that none waits long for another.
        by_width = sorted(self.plan.layers, key=lambda layer: max(layer.outputs, layer.inputs), reverse=True)
        units = [tuple(by_width[start : start + gpus]) for start in range(0, len(by_width), gpus)]
        step = Step(
            "eigenbasis",
            "layers" if gpus == 1 else f"{gpus} layers each",
            units,
            decompose_task,
            lambda layers: DecomposeTask(self.store, self.plan, layers),
            lambda layers: all(has_bases(self.store, layer) for layer in layers),
        )
        executor.run(step)

    def _load(self, layer: Layer) -> Load:
        widest = widest_block(layer, self.plan.blocks)
        return Load(threads_for(widest), BYTES_PER_ENTRY * widest**2)

    def finish(self, executor: Executor) -> None:
        """Lambda of every layer. The eigenbases' digests are read once for all layers of a group."""
        by_layer: dict[str, str] = {}
        for group, names in enumerate(self.plan.groups):
            by_layer |= dict.fromkeys(names, eigenbases_digest(self.store, self.plan.group(group)))
        tasks = self.on_layers("factors", finish_layer)
        executor.map_tasks(replace(tasks, arguments=lambda layer: (self.store, self.plan, layer, by_layer[layer.name])))

    def on_layers(self, name: str, function: Callable[..., None]) -> TaskMap[Layer]:
        """One task per layer, without a model. They ask for no core: ranks, which wait meanwhile, may hold all of them,
        and a task that asked for one of its own would never run."""
        return TaskMap(
            name, "layers", self.plan.layers, function, lambda layer: (self.store, self.plan, layer), cores=0
        )

    def on_stacks(self, name: str, function: Callable[[Store, FactorsPlan, str], None]) -> TaskMap[str]:
        """One task per stack of experts, as `on_layers`."""
        return TaskMap(
            name, "stacks", self.plan.stacks, function, lambda stack: (self.store, self.plan, stack), cores=0
        )


@dataclass(frozen=True)
class DecomposeTask:
    """A layer for each rank of a worker."""

    factors: Store
    plan: FactorsPlan
    layers: tuple[Layer, ...]


@multiplying("exact")
def decompose_task(worker: ModelWorker, task: DecomposeTask) -> None:
    """`decompose_layer` of this rank's layer on its GPU."""
    for layer in task.layers[worker.context.rank :: worker.context.world]:
        decompose_layer(task.factors, task.plan, layer, worker.device)


@multiplying("exact")
def covariance_task(worker: ModelWorker, task: FitTask) -> int | None:
    """Sum a a^T and s s^T over the slice's tokens for the group's layers; rank 0 writes the partial file.

    Every position that is not padding counts, the last one included; of sequences with a loss mask those alone that
    predict a token with a loss (`Batch.positions`). Rank 0 returns the tokens read.
    """
    sequences = task.sequences(worker)
    layers = task.plan.group(task.group)
    sums = CovarianceSums(layers, task.plan.blocks, worker.wide, worker.device)
    counted = torch.zeros(1, dtype=torch.int64, device=worker.device)
    targets = Targets(task, worker, sequences)
    for batch in worker.batches(sequences, task.plan.tokens_per_batch):
        loss = targets.loss(batch)
        worker.backward(batch, layers, loss, sums.consumer(batch), ones=False)
        targets.keep(batch, loss)
        counted += batch.positions().sum()
    blocks = {
        f"{key}|{name}": worker.reduce(block)
        for kind, totals in (("A", sums.A), ("S", sums.S))
        for name, total in totals.items()
        for key, block in named_blocks(kind, mirror(total)).items()
    }
    for name, (sketch_oc, trace) in sums.sketches.items():
        blocks |= {sketch_key(name): worker.reduce(sketch_oc), trace_key(name): worker.reduce(trace)}
    blocks |= {tokens_key(name): worker.reduce(count) for name, count in sums.tokens.items()}
    labels, counted = targets.stored(), worker.reduce(counted)
    path, tokens = partial_path("covariance", task.group, task.slice), sum(len(sequence) for sequence in sequences)
    return _write_partial(worker, task.factors, path, blocks | {"tokens": counted}, {}, tokens, labels)


def _write_partial(
    worker: ModelWorker,
    factors: Store,
    path: str,
    sums: Mapping[str, Tensor],
    facts: Mapping[str, str],
    tokens: int,
    first: Callable[[], None] = lambda: None,
) -> int | None:
    """Rank 0 writes a slice's sums, after what goes `first`, and returns its tokens.

    What waits for its writing is in the host's memory once: a GPU's sums as they are, to be serialised by the writer;
    those of a CPU, which the next slice's stand beside, as the file's bytes. Neither is made before the slice before is
    written.
    """
    if not worker.leads:
        return None
    worker.behind.wait()
    waiting: bytes | dict[str, Tensor]
    if worker.device == "cpu":
        waiting = tensor_bytes(sums, facts, path)
    else:
        waiting = {name: total.to("cpu") for name, total in sums.items()}

    def write() -> int:
        first()
        factors.write(path, waiting if isinstance(waiting, bytes) else tensor_bytes(waiting, facts, path))
        return tokens

    return worker.later(write)


class CovarianceSums:
    """A and S of some layers, upper triangles, as they are summed: A for every input, S for every layer; of one with a
    span S's sketch and trace (`infscan.influence.span`)."""

    def __init__(self, layers: tuple[Layer, ...], blocks: int, dtype: torch.dtype, device: str) -> None:
        def zeros(n: int) -> BlockDiagonal:
            return BlockDiagonal.zeros(n, blocks, dtype=dtype, device=device)

        self.A = {layer.name: zeros(layer.inputs) for layer in layers if layer.input_of == layer.name}
        self.S = {layer.name: zeros(layer.outputs) for layer in layers if not layer.span}
        self.Omega = {
            layer.name: sketch_matrix(layer.outputs, layer.span, dtype, device) for layer in layers if layer.span
        }
        self.sketches = {
            name: (torch.zeros_like(Omega_oc), torch.zeros(1, dtype=dtype, device=device))
            for name, Omega_oc in self.Omega.items()
        }
        # Of experts, the tokens that went to each; every other layer sees all.
        self.tokens = {layer.name: torch.zeros(1, dtype=torch.int64, device=device) for layer in layers if layer.stack}

    @property
    def nbytes(self) -> int:
        moments = sum(block.nbytes for total in (*self.A.values(), *self.S.values()) for block in total.blocks)
        return moments + sum(2 * Omega_oc.nbytes for Omega_oc in self.Omega.values())

    def consumer(self, batch: Batch) -> LayerConsumer:
        """Adds what a micro-batch's backward hands over."""
        positions_bt = batch.positions()
        masked_bt1 = None if batch.loss_bt is None else ~positions_bt[..., None]

        def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
            positions, masked = positions_bt, masked_bt1
            if routed is not None:
                positions = routed.of(positions_bt)
                masked = None if masked is None else routed.of(masked)
                self.tokens[layer.name] += positions.sum()
            if masked is not None:
                s, a = s.masked_fill(masked, 0), a.masked_fill(masked, 0)
            if layer.span:
                add_sketch(*self.sketches[layer.name], s, self.Omega[layer.name])
            else:
                add_second_moment(self.S[layer.name], s)
            if layer.name in self.A:
                add_second_moment(self.A[layer.name], a, positions if layer.bias else None)

        return consume


# (Q_S, Q_A) by layer.
Bases = Mapping[str, tuple[Rotation, BlockDiagonal]]


@multiplying("exact")
def lambda_task(worker: ModelWorker, task: FitTask) -> int | None:
    """Sum (Q_S^T g Q_A)^2 over the slice's sequences; the partial carries the digest of its eigenbases."""
    sequences = task.sequences(worker)
    layers = task.plan.group(task.group)
    bases, digest = worker.cached(
        "eigenbases", (task.factors, task.plan.fingerprint, task.group), lambda: _bases(worker, task)
    )
    Lambda = lambda_sums(layers, worker.wide, worker.device)
    targets = Targets(task, worker, sequences)
    for batch in worker.batches(sequences, task.plan.tokens_per_batch):
        consume = lambda_consumer(Lambda, bases, task.plan.matmul)
        worker.backward(batch, layers, targets.loss(batch), consume, ones=False)
    sums = {name: worker.reduce(total) for name, total in Lambda.items()}
    path, tokens = partial_path(task.squares, task.group, task.slice), sum(len(sequence) for sequence in sequences)
    return _write_partial(worker, task.factors, path, sums, {"eigenbases": digest}, tokens)


def lambda_sums(layers: tuple[Layer, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Zeros [O, I] for every layer; of one with a span the rows that are kept."""
    return {layer.name: torch.zeros(layer.kept_outputs, layer.inputs, dtype=dtype, device=device) for layer in layers}


def lambda_consumer(Lambda: Mapping[str, Tensor], bases: Bases, matmul: Multiply = "exact") -> LayerConsumer:
    """Adds every sequence's squared gradient in the eigenbases."""

    def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
        with multiplying(matmul):
            for mine in (slice(None),) if routed is None else (part for _, part in routed.segments()):
                of_one = (s, a) if routed is None else (s[None, mine], a[None, mine])
                Q_S, Q_A = bases[layer.name]
                if isinstance(Q_S, SpannedBasis):
                    add_spanned_squares(Lambda[layer.name], *of_one, Q_S, Q_A)
                else:
                    add_squared_gradients(Lambda[layer.name], *of_one, Q_S, Q_A)

    return consume


def _bases(worker: ModelWorker, task: FitTask) -> tuple[Bases, str]:
    def read(path: str, key: str) -> BlockDiagonal:
        blocks = [read_tensor(task.factors, path, name) for name in block_keys(key, task.plan.blocks)]
        return BlockDiagonal(tuple(blocks)).to(worker.device, worker.wide)

    bases: dict[str, tuple[Rotation, BlockDiagonal]] = {}
    for layer in task.plan.group(task.group):
        Q_S: Rotation
        if layer.span:
            parts = (read_tensor(task.factors, f"S/{layer.name}.safetensors", key) for key in ("reflectors", "weights"))
            Q_S = SpannedBasis(*parts).to(worker.device, worker.wide)
        else:
            Q_S = read(f"S/{layer.name}.safetensors", "Q_S")
        bases[layer.name] = (Q_S, read(f"A/{layer.input_of}.safetensors", "Q_A"))
    return bases, eigenbases_digest(task.factors, task.plan.group(task.group))


def slice_bounds(size: int, slices: int) -> tuple[tuple[int, int], ...]:
    """[0, size) cut into at most `slices` near-equal pieces, none empty."""
    edges = np.linspace(0, size, min(slices, size) + 1).round().astype(int).tolist()
    return tuple(pairwise(edges))
