"""From a fine-tuned model back to the stage that is scanned, on the query side (docs/method.md#multi-stage).

Stage by stage, the last one first: its workers fit its factors, take what the stage after left of the queries (the last
one takes gradients), multiply it by alpha_k (G_k + alpha_k + lambda_k)^-1 and put it in storage. Then they end, and the
next stage's start. The scan knows nothing of it.

    x_(k-1) = alpha_k (G_k + alpha_k + lambda_k)^-1 x_k        x_n = grad(-f) at theta_n

theta_k = argmin L_k(theta) + alpha_k/2 |theta - theta_(k-1)|^2, so d theta_k / d theta_(k-1) is alpha_k times the
inverse. Vectors lie in storage at full rank, a file per query and group of layers: the next stage reads them where a
single-stage run would take gradients, and no rank ever holds two models.
"""

from __future__ import annotations

from dataclasses import dataclass

from infscan.config import Solver, fingerprint
from infscan.engine.executor import Step
from infscan.influence.layers import Layer
from infscan.model.worker import ModelWorker
from infscan.queries import Query, queries_fingerprint
from infscan.results.tensor_files import write_tensors
from infscan.steps.factors import Factors, fit
from infscan.steps.gradients import StoredTokens
from infscan.steps.preconditioner import Preconditioner, StoredGradients, preconditioned, query_groups
from infscan.steps.run import Run
from infscan.steps.solve import solve
from infscan.storage import Store

FOLDER = "vectors"


def pull_back_queries(run: Run, taken: StoredTokens | None = None) -> StoredGradients | StoredTokens | None:
    """grad(-f) at the last stage's model, brought back through every stage after the scanned one; without stages
    `taken`.

    Vectors lie in <output>/stages/<k>/vectors; those that are there already are kept. taken: the gradients where
    `infscan.steps.measure` kept them; None has them taken where they are needed.

    Raises:
        FactorsError: where a stage's factors.path holds factors of something else.
    """
    vectors: StoredGradients | StoredTokens | None = taken
    for stage in reversed(run.later):
        try:
            vectors = _through(stage, solve(stage, fit(stage, vectors)))
        finally:
            stage.executor.close()
    return vectors


def _through(stage: Run, factors: Factors) -> StoredGradients:
    config, inverse = stage.config, factors.inverse
    groups, layer_groups = query_groups(len(stage.queries), stage.inputs.layers, config.query_group_bytes)
    parts = {layer.name: part for part, layers in enumerate(layer_groups) for layer in layers}
    settings = {
        "model": stage.architecture.fingerprint,
        "dtype": stage.inputs.dtype,
        "factors": factors.fingerprint,
        "solver": inverse.solver,
        "damping": inverse.damping.facts() if inverse.solver is not Solver.identity else None,
        "alpha": inverse.alpha,
        "parts": parts,
    }
    names = {}
    for query in stage.queries:
        known = {
            "query": queries_fingerprint([query]),
            "vector": inverse.vectors.names[query.id] if inverse.vectors else None,
            "solution": inverse.solutions.names[query.id] if inverse.solutions else None,
        }
        names[query.id] = f"{FOLDER}/{fingerprint(settings | known)[:24]}-{{part:02d}}.safetensors"
    vectors = StoredGradients(stage.store, names, parts)
    there = {entry.name for entry in stage.store.list(FOLDER)}
    cells = [(group, part) for group in range(len(groups)) for part in range(len(layer_groups))]

    def left(cell: tuple[int, int]) -> tuple[Query, ...]:
        queries = (stage.queries[index] for index in groups[cell[0]])
        return tuple(query for query in queries if vectors.file(query.id, layer_groups[cell[1]][0]) not in there)

    def task(cell: tuple[int, int]) -> StageTask:
        layers = layer_groups[cell[1]]
        files = tuple(vectors.file(query.id, layers[0]) for query in left(cell))
        return StageTask(stage.store, files, left(cell), layers, inverse)

    def progress(cell: tuple[int, int], tokens: int) -> tuple[int, int]:
        return len(left(cell)), tokens

    step = Step("queries", "groups", cells, stage_task, task, lambda cell: not left(cell), progress)
    stage.executor.run(step)
    return vectors


@dataclass(frozen=True)
class StageTask:
    """A group of queries for a group of layers, at a rank with the stage's model. names: a file for each query."""

    store: Store
    names: tuple[str, ...]
    queries: tuple[Query, ...]
    layers: tuple[Layer, ...]
    inverse: Preconditioner


def stage_task(worker: ModelWorker, task: StageTask) -> int:
    """Write x_(k-1) of every query, [O, I] by layer, in the statistics' dtype. Returns the tokens of the queries.

    Without factors (solver=identity) G_k and lambda_k are zero, and x_(k-1) = x_k: the limit of a large alpha.
    """
    P = preconditioned(worker, task.queries, task.layers, task.inverse)
    scale = 1.0 if task.inverse.solver is Solver.identity else task.inverse.alpha
    if worker.leads:
        for index, name in enumerate(task.names):
            write_tensors(task.store, name, {layer: scale * P_qoi[index] for layer, P_qoi in P.items()})
    return sum(len(part.token_ids) for query in task.queries for part in query.parts)
