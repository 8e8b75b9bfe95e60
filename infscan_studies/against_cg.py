"""How near do EK-FAC and its rivals come to the damped inverse itself, on a small model? (docs/method.md#ground-truths)

The reference solves (G + lambda) x = grad(-f) by conjugate gradients, with exact Gauss-Newton products and the damping
lambda_l of EK-FAC; x takes the place of EK-FAC's P, and everything else of a score is the same. Judged against it, over
a sample of sequences: EK-FAC, LiSSA at several depths, early CG iterates, the gradient dot product, BM25, random.
G, EK-FAC's factors and LiSSA's batches are all of one sample of sequences. One process, no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.config import plain
from infscan.corpus import sequences as corpus
from infscan.influence.agreement import random_scores
from infscan.influence.astra import BatchOperator, Estimate, drawn, largest_eigenvalue
from infscan.influence.cg import Solution, conjugate_gradients, damped
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.influence.score import LayerQueries, score_layer
from infscan.model.gauss_newton import GaussNewton, damping_vector, join, split
from infscan.model.worker import ModelWorker
from infscan.queries import Query
from infscan.results.schema import to_parquet
from infscan.steps.preconditioner import Preconditioner, query_gradients
from infscan.steps.solve import ekfac_factors, ekfac_inverse
from infscan.storage import Store
from infscan_studies.comparison import BM25, DOT, EKFAC, RANDOM, Comparison, Scored, facts_of, judge, to_table
from infscan_studies.config import LissaConfig, ValidateConfig, ValidateJob
from infscan_studies.in_process import open_study
from infscan_studies.truth.bm25 import bm25_scores
from infscan_studies.truth.lissa import lissa
from infscan_studies.validation import Cost, estimate, timed


@dataclass(frozen=True)
class Findings(Comparison):
    """Judged by CG's solutions. lissa, cg: their histories."""

    cg: Solution
    lissa: Estimate
    scale: float
    cost: Cost


def against_cg(
    rank: ModelWorker,
    queries: Sequence[Query],
    curvature: Sequence[corpus.Sequence],
    candidates: Sequence[corpus.Sequence],
    inverse: Preconditioner,
    settings: ValidateConfig,
    *,
    seed: int,
    fit_seconds: float,
    log: Callable[[str], None] = lambda line: None,
) -> Findings:
    """Every method's scores of `candidates`; `inverse` has the factors of `curvature`.

    Seconds of EK-FAC and of CG, which it may precondition and whose damping it gives, hold the fit's; those of LiSSA
    the search for its scale.

    Raises:
        ConfigError: where it would run for more than settings.max_hours (before any of it is computed).
    """
    bm25_qn, bm25_seconds = timed(
        lambda: bm25_scores([one.token_ids for one in candidates], [query.parts[0].token_ids for query in queries])
    )
    V, V_seconds = timed(lambda: query_gradients(rank, queries, rank.layers))
    v_kp = join(rank.layers, V)
    ggn = GaussNewton(rank, curvature, settings.tokens_per_batch)
    cost = estimate(ggn, v_kp, settings)
    log(f"at most {cost.hours * 60:.1f} minutes of Gauss-Newton products ({cost.flops:.2g} FLOP)")
    cost.refuse_above(settings.max_hours)

    factors = ekfac_factors(rank, inverse)
    precondition = ekfac_inverse(rank.layers, factors)
    ekfac_kp, ekfac_seconds = timed(lambda: precondition(v_kp))
    lambda_p = damping_vector(rank.layers, {name: lam for name, (_, lam) in factors.items()}, v_kp)
    solutions = {EKFAC: (ekfac_kp, fit_seconds + ekfac_seconds), DOT: (v_kp, V_seconds)}

    by_depth, series, scale = by_lissa(ggn.product, v_kp, lambda_p, len(curvature), settings.lissa, seed)
    solutions |= by_depth
    log(f"LiSSA: {len(series.history)} steps in {series.history[-1].seconds:.0f} s, scale {scale:.3g}")

    def keep(iteration: int, seconds: float, residual_k: Tensor, x_kp: Tensor) -> None:
        largest = float(residual_k.max())
        # The residual's norm is not what CG makes smaller at every step: the error in the norm of G + lambda is.
        above = " (x = 0 has 1; it may rise before it falls)" if largest > 1 else ""
        log(f"CG: iteration {iteration}, largest relative residual {largest:.2g}{above}, {seconds:.0f} s")
        if iteration in settings.cg.snapshots:
            solutions[f"CG-{iteration}"] = (x_kp.clone(), fit_seconds + seconds)

    solved = conjugate_gradients(
        damped(ggn.product, lambda_p),
        v_kp,
        tolerance=settings.cg.tolerance,
        max_iterations=settings.cg.max_iterations,
        preconditioner=precondition if settings.cg.preconditioned else None,
        on_iteration=keep,
    )
    solutions["CG"] = (solved.x_kp, fit_seconds + solved.seconds[-1])
    scores = score_solutions(rank, candidates, {name: x_kp for name, (x_kp, _) in solutions.items()})
    scored = [Scored(name, scores[name], seconds) for name, (_, seconds) in solutions.items() if name != "CG"]
    scored += [
        Scored(BM25, bm25_qn, bm25_seconds),
        Scored(RANDOM, random_scores(len(queries), len(candidates), seed), 0.0),
    ]
    reference = Scored("CG", scores["CG"], solutions["CG"][1])
    ids = tuple(query.id for query in queries)
    return Findings(ids, reference, scored, fit_seconds, solved, series, scale, cost)


def score_solutions(
    rank: ModelWorker,
    sequences: Sequence[corpus.Sequence],
    solutions: Mapping[str, Tensor],
    tokens_per_batch: int = 4096,
) -> dict[str, NDArray[np.floating]]:
    """<x, grad L(z)> for every method's x [Q, P] in one pass over the sequences: [Q, N] each, at full rank."""
    stacked_kp = torch.cat(list(solutions.values()))
    P = {
        name: LayerQueries.dense(matrix.to(rank.model.dtype)) for name, matrix in split(rank.layers, stacked_kp).items()
    }
    scores_nk = torch.zeros(len(sequences), len(stacked_kp), dtype=rank.wide, device=rank.device)
    for batch in rank.batches(sequences, tokens_per_batch):
        rows = rank.to_device(batch.rows)

        def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None, rows: Tensor = rows) -> None:
            scores_nk.index_add_(0, rows, score_layer(s, a, P[layer.name], routed))

        rank.backward(batch, rank.layers, batch.loss(), consume)
    parts = scores_nk.T.cpu().numpy().reshape(len(solutions), -1, len(sequences))
    return dict(zip(solutions, parts, strict=True))


def by_lissa(
    product: BatchOperator, v_kp: Tensor, lambda_p: Tensor, sequences: int, settings: LissaConfig, seed: int
) -> tuple[dict[str, tuple[Tensor, float]], Estimate, float]:
    """LiSSA's solutions at every depth asked for with their seconds, by method; the whole series; its scale."""
    scale, scale_seconds = timed(lambda: lissa_scale(product, sequences, lambda_p, settings, seed))
    series = lissa(
        product,
        v_kp,
        lambda_p,
        sequences=sequences,
        batch=settings.batch,
        depth=max(settings.depths),
        scale=scale,
        seed=seed,
        snapshots=settings.depths,
    )
    solutions = {
        f"LiSSA-{depth}": (x_kp, scale_seconds + series.history[depth - 1].seconds)
        for depth, x_kp in series.snapshots.items()
    }
    return solutions, series, scale


def lissa_scale(product: BatchOperator, sequences: int, lambda_p: Tensor, settings: LissaConfig, seed: int) -> float:
    """The one that is set, or 1.5 times the largest eigenvalue of G + lambda over a few batches."""
    if settings.scale is not None:
        return settings.scale
    largest = largest_eigenvalue(
        product,
        drawn([lambda_p.numel()], [True], lambda_p),
        sequences=sequences,
        batch=settings.batch,
        batches=4,
        steps=8,
        seed=seed,
    )
    return 1.5 * (largest + float(lambda_p.max()))


def validate(config: ValidateJob, log: Callable[[str], None]) -> tuple[Findings, pa.Table, dict[str, Any]]:
    """The whole study for a configuration; the table goes to <output>/validate/against_cg.parquet.

    Returns the findings, the table, and what the table's footer contains beside it: the reference's iterations and
    residuals by query, EK-FAC's gain over every other method with its paired interval, the settings, the cost.

    Raises:
        InfscanError: for inputs that cannot be used, or a validation that would take too long.
    """
    study = open_study(config)
    found = against_cg(
        study.worker,
        study.queries,
        study.curvature,
        study.candidates,
        study.inverse,
        config.validate,
        seed=config.seed,
        fit_seconds=study.fit_seconds,
        log=log,
    )
    agreements = judge(found, config.validate.resamples, config.seed)
    table = to_table(found, agreements)
    facts = facts_of(found, agreements) | {
        "cg": cg_facts(found, config.validate),
        "lissa_scale": found.scale,
        "damping": plain(config.factors.damping),
        "settings": plain(config.validate),
        "fingerprints": study.fingerprints,
        "flops": found.cost.flops,
    }
    Store(config.output).write("validate/against_cg.parquet", to_parquet(table, facts))
    return found, table, facts


def cg_facts(found: Findings, settings: ValidateConfig) -> dict[str, Any]:
    """How far conjugate gradients came, by query."""
    return {
        "tolerance": settings.cg.tolerance,
        "iterations": dict(zip(found.query_ids, found.cg.iterations_k.tolist(), strict=True)),
        "residual": dict(zip(found.query_ids, found.cg.residuals[-1].tolist(), strict=True)),
        "seconds": found.reference.seconds,
    }
