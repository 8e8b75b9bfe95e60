"""From a fine-tuned model back to the stage that is scanned, on the worker groups (METHOD: multi-stage).

Stage by stage, the last one first: its workers fit its factors, take what the stage after left of the queries (the last
one takes gradients), multiply it by alpha_k (G_k + alpha_k + lambda_k)^-1 and put it in storage. Then they end, and the
next stage's start. The scan knows nothing of it.
"""

from __future__ import annotations

from infscan.config import Solver, fingerprint, plain
from infscan.passes.queries import Vectors, query_groups
from infscan.passes.stages import StageTask, stage_task
from infscan.queries import queries_fingerprint
from infscan.runtime.fit import Factors, fit
from infscan.runtime.run import Run
from infscan.runtime.solve import solve

FOLDER = "vectors"


def bring_back(run: Run) -> Vectors | None:
    """grad(-f) at the last stage's model, brought back through every stage after the scanned one; None without stages.

    Vectors lie in <output>/stages/<k>/vectors; those that are there already are kept.

    Raises:
        FactorsError: where a stage's factors.path holds factors of something else.
    """
    vectors: Vectors | None = None
    for stage in reversed(run.later):
        try:
            vectors = _through(stage, solve(stage, fit(stage, vectors)))
        finally:
            stage.close_workers()
    return vectors


def _through(stage: Run, factors: Factors) -> Vectors:
    config, inverse = stage.config, factors.inverse
    groups, layer_groups = query_groups(len(stage.queries), stage.architecture.layers, config.scan.query_group_bytes)
    parts = {layer.name: part for part, layers in enumerate(layer_groups) for layer in layers}
    settings = {
        "model": stage.architecture.fingerprint,
        "dtype": stage.dtype,
        "factors": factors.fingerprint,
        "solver": inverse.solver,
        "damping": plain(inverse.damping) if inverse.solver is not Solver.identity else None,
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
    vectors = Vectors(stage.store, names, parts)
    there = {entry.name for entry in stage.store.list(FOLDER)}
    work = []
    for group in groups:
        for layers in layer_groups:
            queries = [stage.queries[index] for index in group]
            left = tuple(query for query in queries if vectors.file(query.id, layers[0]) not in there)
            if left:
                work.append((left, layers))
    if work:
        with stage.telemetry.phase("queries", len(work), "groups") as phase:

            def task(unit: int) -> StageTask:
                queries, layers = work[unit]
                files = tuple(vectors.file(query.id, layers[0]) for query in queries)
                return StageTask(stage.store, files, queries, layers, inverse)

            def on_done(unit: int, tokens: int) -> None:
                phase.advance(sequences=len(work[unit][0]), tokens=tokens)

            stage.pool.run(range(len(work)), stage_task, task, on_done)
    return vectors
