"""factors.damping.auto: each layer's damping from squares of true-label gradients in its eigenbases, after the fit.

A pass over up to 1,024 of the fit's sequences, spread over its slices; then a number per layer, in the factors' folder
(docs/method.md#automatic-damping). Slices and groups are the fit's, and sums are added in their order, so that the
numbers do not depend on which worker did what; what is in storage already is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from infscan.config import Labels
from infscan.corpus.addressable import AddressableCorpus, CorpusAddress
from infscan.engine.executor import Executor, Step, TaskMap
from infscan.errors import FactorsError
from infscan.model.worker import ModelWorker
from infscan.results.tensor_files import read_facts
from infscan.steps.eigenbases import MOMENTS, damp_layer, eigenbases_digest
from infscan.steps.factor_files import FactorsPlan, damping_path, partial_path, remove_partials
from infscan.steps.labels import FitTask
from infscan.storage import Store

# Sequences that second moments are of: their error is a few percent, far below a step of the grid that is tried.
MOST_SEQUENCES = 1024


def fit_damping(
    executor: Executor,
    store: Store,
    corpus: AddressableCorpus,
    plan: FactorsPlan,
    labels: Labels,
    seed: int,
    squares: Callable[[ModelWorker, FitTask], int | None],
) -> None:
    """Find the damping of every layer of the finished factors in `store` that has none there yet.

    squares: sums the squared gradients of a task on a rank (`infscan.steps.factors.lambda_task`).

    Raises:
        FactorsError: where the factors are of true labels, of which Lambda is the very moment it is held against.
    """
    if labels is not Labels.sampled:
        raise FactorsError(
            f"factors.damping.auto with factors.labels={labels.value}: it holds Lambda of drawn labels against true "
            "ones; use factors.labels=sampled, or give factors.damping.relative."
        )
    digests = {layer.name: eigenbases_digest(store, (layer,)) for layer in plan.layers}

    def is_found(name: str, path: str) -> bool:
        return store.exists(path) and read_facts(store, path)["eigenbases"] == digests[name]

    missing = [layer for layer in plan.layers if not is_found(layer.name, damping_path(layer))]
    if missing:
        part = moments_plan(plan)
        executor.run(_step(store, CorpusAddress.of(corpus), part, seed, squares))
        executor.map_tasks(
            TaskMap("damping", "layers", missing, damp_layer, lambda layer: (store, part, layer), cores=0)
        )
    remove_partials(store, (MOMENTS,))
    executor.forget()


def moments_plan(plan: FactorsPlan) -> FactorsPlan:
    """The fit's plan with the first sequences of every slice alone, up to `MOST_SEQUENCES` in all."""
    each = max(1, MOST_SEQUENCES // len(plan.slices))
    return replace(plan, slices=tuple((start, min(stop, start + each)) for start, stop in plan.slices))


def moments_of(store: Store, corpus: CorpusAddress, plan: FactorsPlan, cell: tuple[int, int], seed: int) -> FitTask:
    """What a layer group and slice's moments are summed by: squared gradients of true labels."""
    return FitTask(store, corpus, plan, *cell, Labels.empirical, seed, squares=MOMENTS)


def _step(
    store: Store,
    corpus: CorpusAddress,
    plan: FactorsPlan,
    seed: int,
    squares: Callable[[ModelWorker, FitTask], int | None],
) -> Step[tuple[int, int]]:
    bases = [eigenbases_digest(store, plan.group(group)) for group in range(len(plan.groups))]

    def is_done(cell: tuple[int, int]) -> bool:
        path = partial_path(MOMENTS, *cell)
        return store.exists(path) and read_facts(store, path)["eigenbases"] == bases[cell[0]]

    def progress(cell: tuple[int, int], tokens: int) -> tuple[int, int]:
        start, stop = plan.slices[cell[1]]
        return stop - start, tokens

    cells = [(group, index) for group in range(len(plan.groups)) for index in range(len(plan.slices))]
    return Step(
        "damping",
        "slices",
        cells,
        squares,
        lambda cell: moments_of(store, corpus, plan, cell, seed),
        is_done,
        progress,
    )
