"""Fit factors on the worker groups, or reuse those that are there (METHOD: EK-FAC; DESIGN: guarantee 4)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import ray
import torch

from infscan.config import Attention, Labels, Solver
from infscan.corpus.addressable import AddressableCorpus
from infscan.corpus.filtered import FilteredCorpus
from infscan.corpus.plan import Selection
from infscan.errors import FactorsError, UnwritableError
from infscan.influence.layers import Layer
from infscan.passes.decompose import decompose_layer, eigenbases_digest, finish_layer
from infscan.passes.factor_store import (
    COMPLETE,
    PLAN,
    FactorsPlan,
    check_files,
    complete,
    labels_path,
    layer_groups,
    partial_path,
    read_facts,
    read_plan,
)
from infscan.passes.factors import FitTask, covariance_task, lambda_task, slice_bounds
from infscan.passes.queries import Inverse, Vectors
from infscan.runtime import preflight
from infscan.runtime.prepare import prepare
from infscan.runtime.run import Run
from infscan.storage import MissingError, Store

log = logging.getLogger("infscan")


@dataclass(frozen=True)
class Factors:
    """Finished factors: how to invert with them, and their fingerprint (None for solver=identity).

    curvature: the corpus and the sequences of it that they are of (None for solver=identity).
    iteration: what `infscan.runtime.solve` found, by query, for summary.json.
    """

    inverse: Inverse
    fingerprint: str | None
    curvature: tuple[AddressableCorpus, Selection] | None = None
    iteration: dict[str, Any] | None = None


def prepare_corpus(run: Run) -> AddressableCorpus:
    """The scanned corpus, addressable: prepared into <output>/corpus unless it is prepared already."""
    return prepare(run.config.corpus, run.architecture, run.tokenizer, run.store / "corpus", run.telemetry)


def prepare_factors_corpus(run: Run) -> AddressableCorpus:
    """What the factors are fitted on: the scanned corpus, or one of its own, prepared beside the factors."""
    if run.config.factors.corpus.same_corpus(run.config.corpus):
        corpus = prepare_corpus(run)
    else:
        store = run.factors_store / "corpus"
        corpus = prepare(run.config.factors.corpus, run.architecture, run.tokenizer, store, run.telemetry)
    # What a filter chose looks like the queries: curvature is the whole corpus's.
    return corpus.base if isinstance(corpus, FilteredCorpus) else corpus


def fit(run: Run, vectors: Vectors | None = None) -> Factors:
    """Covariance sums, eigenbases, Lambda sums; each piece that is in storage already is kept.

    vectors: with stages, what the later ones left of the queries; the inverse is applied to them.

    Raises:
        FactorsError: where factors.path holds factors of another model, corpus or setting, naming what differs.
    """
    config, store = run.config, run.factors_store
    inverse = Inverse(store, config.factors.solver, config.factors.damping, config.alpha, vectors)
    if config.factors.solver is Solver.identity:
        return Factors(inverse, None)
    corpus = prepare_factors_corpus(run)
    plan = _plan(run, corpus)
    factors = Factors(inverse, plan.fingerprint, (corpus, plan.selection))
    if store.exists(COMPLETE):
        check_files(store)
        log.info("factors     reused from %s", store.uri)
        _remove_partials(store)
        return factors
    log.info(
        "factors     %d layers, %d sequences in %d slices x %d layer groups; partial sums take %.1f MiB in storage",
        len(plan.layers), plan.selection.size, len(plan.slices), len(plan.groups), plan.partial_bytes() / 2**20,
    )  # fmt: skip
    preflight.check_disk_for_factors(run, plan)
    try:
        _covariance(run, plan, corpus)
        _on_layers(run, "eigenbasis", decompose_layer, plan)
        _lambda(run, plan, corpus)
        _on_layers(run, "factors", finish_layer, plan)
        store.write_json(COMPLETE, complete(store, plan))
    except MissingError:
        # A second driver was first: it finished the factors and removed the partial sums that this one was adding.
        if not store.exists(COMPLETE):
            raise
    _remove_partials(store)
    run.pool.forget()
    return factors


def _remove_partials(store: Store) -> None:
    """Partial sums of complete factors: this process's, or those that an earlier one left when it died."""
    for kind in ("covariance", "lambda"):
        for entry in store.list(kind):
            try:
                store.remove(entry.name)
            except UnwritableError as error:
                log.warning("factors     finished, and a partial sum is left: %s", error)
                return


def _plan(run: Run, corpus: AddressableCorpus) -> FactorsPlan:
    """The factors' plan: created if absent, then read back and compared."""
    config, store = run.config.factors, run.factors_store
    wanted = min(config.num_sequences, config.corpus.max_sequences or config.num_sequences)
    selection = Selection.of(corpus.sequences, wanted, run.config.seed, share=config.corpus.sample)
    fields: dict[str, Any] = {
        "model": run.architecture.fingerprint,
        "dtype": run.dtype,
        "tracked": [layer.name for layer in run.architecture.layers],
        "tokenizer": corpus.tokenizer,
        "corpus": corpus.fingerprint,
        "attention": config.corpus.attention.value,
        "labels": config.labels.value,
        "blocks": config.blocks,
        "num_sequences": selection.size,
        "sample": selection.digest(),
        "seed": run.config.seed,
    }
    made = FactorsPlan(
        fields=fields,
        layers=run.architecture.layers,
        selection=selection,
        slices=slice_bounds(selection.size, config.slices),
        groups=layer_groups(run.architecture.layers, config.max_group_bytes, config.blocks),
        tokens_per_batch=run.config.scan.tokens_per_batch,
    )
    store.create(PLAN, _json_bytes(made.to_json()))
    plan = read_plan(store)
    # Factors that were fitted before there was a choice.
    stored = {"attention": Attention.across.value} | plan.fields | {"blocks": plan.blocks}
    differing = [
        f"{key}: {stored.get(key)!r} -> {value!r}" for key, value in fields.items() if stored.get(key) != value
    ]
    if differing:
        raise FactorsError(
            f"{store.uri} holds factors for something else ({'; '.join(differing)}). Give another factors.path, or the "
            "settings they were fitted with."
        )
    return plan


def _json_bytes(value: Any) -> bytes:
    import json

    return json.dumps(value, indent=2).encode() + b"\n"


def _covariance(run: Run, plan: FactorsPlan, corpus: AddressableCorpus) -> None:
    """The first layer group draws the labels; the other groups read them, so they go second."""
    store = run.factors_store
    if all(store.exists(f"S/{layer.name}.safetensors") for layer in plan.layers):
        return
    for groups in ([0], list(range(1, len(plan.groups)))):
        pieces = [(group, index) for group in groups for index in range(len(plan.slices))]
        left = [piece for piece in pieces if not store.exists(partial_path("covariance", *piece))]

        def task(unit: int, left: list[tuple[int, int]] = left) -> FitTask:
            group, index = left[unit]
            drawn = group == 0 and not store.exists(labels_path(index))
            draw = run.config.factors.labels is Labels.sampled and drawn
            return _task(run, plan, corpus, group, index, draw_labels=draw)

        _run_tasks(run, "covariance", plan, left, covariance_task, task)


def _lambda(run: Run, plan: FactorsPlan, corpus: AddressableCorpus) -> None:
    store = run.factors_store
    left: list[tuple[int, int]] = []
    for group in range(len(plan.groups)):
        expected = eigenbases_digest(store, plan.group(group))
        for index in range(len(plan.slices)):
            path = partial_path("lambda", group, index)
            if not store.exists(path) or read_facts(store, path)["eigenbases"] != expected:
                left.append((group, index))
    _run_tasks(run, "lambda", plan, left, lambda_task, lambda unit: _task(run, plan, corpus, *left[unit]))


def _task(
    run: Run, plan: FactorsPlan, corpus: AddressableCorpus, group: int, index: int, *, draw_labels: bool = False
) -> FitTask:
    config, seed = run.config.factors, run.config.seed
    return FitTask(
        run.factors_store, corpus.store, plan, group, index, config.labels, seed, draw_labels, config.corpus.attention
    )


def _run_tasks(run: Run, name: str, plan: FactorsPlan, left: list[tuple[int, int]], function: Any, task: Any) -> None:
    if not left:
        return
    with run.telemetry.phase(name, len(left), "slices") as phase:

        def on_done(unit: int, tokens: int) -> None:
            start, stop = plan.slices[left[unit][1]]
            phase.advance(sequences=stop - start, tokens=tokens)

        run.pool.run(range(len(left)), function, task, on_done)


def _on_layers(run: Run, name: str, function: Any, plan: FactorsPlan) -> None:
    """One Ray task per layer: no model, one core each.

    The cores are those of the ranks, which wait meanwhile: a task that asked for one of its own would never run where
    ranks, or workers that wait for room, take them all. So they ask for none, and as many run at once as there are.
    """

    def one(store: Store, plan: FactorsPlan, layer: Layer) -> None:
        # Whatever OMP_NUM_THREADS says: threads of several tasks on one core wait for each other.
        torch.set_num_threads(1)
        function(store, plan, layer)

    remote = ray.remote(num_cpus=0, max_retries=3, scheduling_strategy="SPREAD")(one)
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(reversed(plan.layers))
    pending: list[ray.ObjectRef] = []
    with run.telemetry.phase(name, len(plan.layers), "layers") as phase:
        while waiting or pending:
            while waiting and len(pending) < at_once:
                pending.append(remote.remote(run.factors_store, plan, waiting.pop()))
            ready, pending = ray.wait(pending)
            for ref in ready:
                try:
                    ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from None
                phase.advance()
