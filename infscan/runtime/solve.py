"""The iterated inverse on the worker groups (METHOD: iterated inverse): nothing to do for EK-FAC and the identity."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from infscan.config import Solver, fingerprint, plain
from infscan.corpus.plan import Selection
from infscan.passes.factor_store import read_facts
from infscan.passes.queries import Vectors
from infscan.passes.solve import Solved, SolveTask, sequences_per_product, solve_task, solved_before
from infscan.queries import queries_fingerprint
from infscan.runtime.fit import Factors
from infscan.runtime.run import Run

log = logging.getLogger("infscan")

FOLDER = "solutions"


def solve(run: Run, factors: Factors) -> Factors:
    """Iterate (G + lambda) x = grad(-f) for every query whose solution is not in <output>/solutions yet.

    Query by query, each on one rank: a solution does not depend on the other queries or on the number of workers.
    Returns the factors with an inverse that reads the solutions, and the residuals for summary.json.

    Raises:
        FactorsError: where an iteration diverges.
    """
    config = run.config.factors
    if not config.solver.iterated:
        return factors
    assert factors.curvature is not None, "an iterated inverse starts from factors"
    corpus, fitted = factors.curvature
    wanted = config.iteration.batch if config.solver is Solver.cg else None
    ids = fitted.at(Selection.of(fitted.size, wanted, run.config.seed).ids())
    settings = {
        "model": run.architecture.fingerprint,
        "tokenizer": run.tokenizer.digest if run.tokenizer else None,
        "factors": factors.fingerprint,
        "damping": plain(config.damping),
        "solver": config.solver,
        "iteration": plain(config.iteration),
        "seed": run.config.seed,
    }
    vectors = factors.inverse.vectors
    keys = {
        query.id: fingerprint(
            {
                **settings,
                "query": queries_fingerprint([query]),
                # Of a run with stages: what held this one, and what a later one left of the query.
                **({"alpha": factors.inverse.alpha} if factors.inverse.alpha else {}),
                **({"vector": vectors.names[query.id]} if vectors else {}),
            }
        )
        for query in run.queries
    }
    names = {query_id: f"{FOLDER}/{key[:24]}.safetensors" for query_id, key in keys.items()}
    ekfac = replace(factors.inverse, solver=Solver.ekfac)
    found: dict[str, Solved] = {}
    for query_id, name in names.items():
        if run.store.exists(name) and (facts := read_facts(run.store, name)).get("fingerprint") == keys[query_id]:
            found[query_id] = solved_before(facts)
    left = [query for query in run.queries if query.id not in found]

    def task(unit: int) -> SolveTask:
        query = left[unit]
        return SolveTask(
            store=run.store,
            name=names[query.id],
            query=query,
            solver=config.solver,
            settings=config.iteration,
            ekfac=ekfac,
            corpus=corpus.store,
            curvature_ids=ids,
            curvature=factors.fingerprint or "",
            fingerprint=keys[query.id],
            seed=run.config.seed,
            attention=config.corpus.attention,
        )

    if left:
        per_product = sequences_per_product(config.solver, config.iteration, len(ids))
        _announce(run, per_product, len(left))
        with run.telemetry.phase("solve", len(left), "queries") as phase:

            def on_done(unit: int, solved: Solved) -> None:
                found[solved.query_id] = solved
                phase.advance(sequences=solved.products * per_product)

            run.pool.run(range(len(left)), solve_task, task, on_done)
        run.pool.forget()
    inverse = replace(factors.inverse, solutions=Vectors(run.store, names))
    return replace(factors, inverse=inverse, iteration=_report(run, found))


def _announce(run: Run, per_product: int, queries: int) -> None:
    """What it will cost, before it is spent."""
    config = run.config.factors
    megabytes = 4 * sum(layer.size for layer in run.architecture.layers) / 2**20
    log.info(
        "solve       %s: %d queries, up to %d products each with G of %d sequences; %.3g MiB in storage per query",
        config.solver.value, queries, config.iteration.steps, per_product, megabytes,
    )  # fmt: skip


def _report(run: Run, found: dict[str, Solved]) -> dict[str, Any]:
    config = run.config.factors
    by_query = {
        query_id: {
            "residual": solved.residual,
            "ekfac_residual": solved.ekfac_residual,
            "products": solved.products,
        }
        for query_id, solved in sorted(found.items())
    }
    unconverged = [query_id for query_id, solved in found.items() if solved.residual > config.iteration.tolerance]
    if config.solver is Solver.cg and unconverged:
        run.telemetry.warn(
            f"{len(unconverged)} of {len(found)} queries stopped above factors.iteration.tolerance="
            f"{config.iteration.tolerance:g} after {config.iteration.steps} steps (relative residuals up to "
            f"{max(solved.residual for solved in found.values()):.2g}); more factors.iteration.steps lower them"
        )
    return {"solver": config.solver.value, "tolerance": config.iteration.tolerance, "queries": by_query}
