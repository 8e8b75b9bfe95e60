"""How near do EK-FAC and its rivals come to the damped inverse itself, on a small model? (METHOD: ground truths)

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
from infscan.influence.inverse import from_core, inverse_core
from infscan.influence.layers import Layer, LayerFactors
from infscan.influence.score import LayerQueries, score_layer
from infscan.model.measure import next_tokens, summed_losses
from infscan.passes.queries import Inverse, layer_factors, query_gradients
from infscan.passes.rank import Rank
from infscan.queries import Query
from infscan.results.schema import to_parquet
from infscan.storage import Store
from infscan.studies.in_process import open_study
from infscan.studies.validation import Cost, LissaConfig, ValidateConfig, ValidateJob, estimate, timed
from infscan.truth.bm25 import bm25_scores
from infscan.truth.cg import Operator, Solution, conjugate_gradients, damped
from infscan.truth.compare import (
    MAX_CANDIDATE_SHARE,
    Agreement,
    agreement,
    difference,
    random_scores,
    recall,
    spearman,
)
from infscan.truth.ggn import GaussNewton, damping_vector, join, split
from infscan.truth.lissa import Estimate, largest_eigenvalue, lissa

AVERAGE = "*"  # the row over all queries; no query id can be this
EKFAC, DOT, BM25, RANDOM = "EK-FAC", "gradient dot product", "BM25", "random"
SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("method", pa.string()),
        ("pearson", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("spearman", pa.float64()),
        ("recall", pa.float64()),
        ("seconds", pa.float64()),
    ]
)
_TOP = 10


@dataclass(frozen=True)
class Scored:
    """One method's scores [Q, N], and the seconds it took on the query side, for all queries together."""

    name: str
    scores_qn: NDArray[np.floating]
    seconds: float


@dataclass(frozen=True)
class Findings:
    """scored: by method, the reference apart. lissa, cg: their histories. fit_seconds: EK-FAC's factors."""

    query_ids: tuple[str, ...]
    reference: Scored
    scored: list[Scored]
    cg: Solution
    lissa: Estimate
    scale: float
    cost: Cost
    fit_seconds: float


def against_cg(
    rank: Rank,
    queries: Sequence[Query],
    curvature: Sequence[corpus.Sequence],
    candidates: Sequence[corpus.Sequence],
    inverse: Inverse,
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

    known = {layer.name: layer_factors(inverse, layer, rank.device, rank.wide) for layer in rank.layers}
    factors = {name: found for name, found in known.items() if found is not None}
    precondition = ekfac_inverse(rank, factors)
    ekfac_kp, ekfac_seconds = timed(lambda: precondition(v_kp))
    lambda_p = damping_vector(rank.layers, {name: lam for name, (_, lam) in factors.items()}, v_kp)
    solutions = {EKFAC: (ekfac_kp, fit_seconds + ekfac_seconds), DOT: (v_kp, V_seconds)}

    scale, scale_seconds = timed(lambda: _scale(ggn, lambda_p, settings.lissa, seed))
    depths = settings.lissa.depths
    series = lissa(
        ggn.product,
        v_kp,
        lambda_p,
        sequences=len(curvature),
        batch=settings.lissa.batch,
        depth=max(depths),
        scale=scale,
        seed=seed,
        snapshots=depths,
    )
    for depth, x_kp in series.snapshots.items():
        solutions[f"LiSSA-{depth}"] = (x_kp, scale_seconds + series.history[depth - 1].seconds)
    log(f"LiSSA: {max(depths)} steps in {series.history[-1].seconds:.0f} s, scale {scale:.3g}")

    def keep(iteration: int, seconds: float, residual_k: Tensor, x_kp: Tensor) -> None:
        log(f"CG: iteration {iteration}, largest residual {float(residual_k.max()):.2g}, {seconds:.0f} s")
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
    return Findings(ids, reference, scored, solved, series, scale, cost, fit_seconds)


def ekfac_inverse(rank: Rank, factors: Mapping[str, tuple[LayerFactors, float]]) -> Operator:
    """x -> (G + lambda)^-1 x by EK-FAC, on vectors [K, P]."""

    def apply(x_kp: Tensor) -> Tensor:
        matrices = split(rank.layers, x_kp)
        return join(
            rank.layers,
            {name: from_core(inverse_core(matrices[name], *known), known[0]) for name, known in factors.items()},
        )

    return apply


def score_solutions(
    rank: Rank, sequences: Sequence[corpus.Sequence], solutions: Mapping[str, Tensor], tokens_per_batch: int = 4096
) -> dict[str, NDArray[np.floating]]:
    """<x, grad L(z)> for every method's x [Q, P] in one pass over the sequences: [Q, N] each, at full rank."""
    stacked_kp = torch.cat(list(solutions.values()))
    P = {
        name: LayerQueries.full(matrix.to(rank.model.dtype)) for name, matrix in split(rank.layers, stacked_kp).items()
    }
    scores_nk = torch.zeros(len(sequences), len(stacked_kp), dtype=rank.wide, device=rank.device)
    for batch in rank.batches(sequences, tokens_per_batch):
        targets = next_tokens(batch.ids_bt, batch.mask_bt)
        rows = rank.to_device(batch.rows)

        def loss(logits_btv: Tensor, targets: tuple[Tensor, Tensor] = targets) -> Tensor:
            return summed_losses(logits_btv, *targets)

        def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor, rows: Tensor = rows) -> None:
            scores_nk.index_add_(0, rows, score_layer(s_bto, a_bti, P[layer.name]))

        rank.backward(batch, rank.layers, loss, consume)
    parts = scores_nk.T.cpu().numpy().reshape(len(solutions), -1, len(sequences))
    return dict(zip(solutions, parts, strict=True))


def _scale(ggn: GaussNewton, lambda_p: Tensor, settings: LissaConfig, seed: int) -> float:
    if settings.scale is not None:
        return settings.scale
    largest = largest_eigenvalue(
        ggn.product,
        lambda_p,
        sequences=len(ggn.sequences),
        batch=settings.batch,
        batches=4,
        steps=8,
        seed=seed,
    )
    return 1.5 * (largest + float(lambda_p.max()))


def judge(found: Findings, settings: ValidateConfig, seed: int) -> dict[str, Agreement]:
    """Each method's Pearson with the reference; one seed, so that any two can be compared in pairs."""
    return {
        one.name: agreement(found.reference.scores_qn, one.scores_qn, seed=seed, resamples=settings.resamples)
        for one in found.scored
    }


def to_table(found: Findings, agreements: Mapping[str, Agreement]) -> pa.Table:
    """Rows by method: one per query, then the average over queries (`*`).

    seconds: the method's, for all queries together. recall: of the reference's strongest proponents (ten, or as many
    as 2 % of the sequences are) among as many candidates as 2 % allow; null where they allow none.
    """
    reference_qn = found.reference.scores_qn
    candidates = int(MAX_CANDIDATE_SHARE * reference_qn.shape[1])
    rows = []
    for one in found.scored:
        judged = agreements[one.name]
        rank_correlations = np.nan_to_num(spearman(reference_qn, one.scores_qn))
        recalls = (
            recall(reference_qn, one.scores_qn, top=min(_TOP, candidates), candidates=candidates)
            if candidates
            else np.full(len(found.query_ids), np.nan)
        )
        columns = zip(found.query_ids, judged.values, judged.low, judged.high, rank_correlations, recalls, strict=True)
        average = (
            AVERAGE,
            judged.mean,
            judged.mean_low,
            judged.mean_high,
            rank_correlations.mean(),
            recalls.mean(),
        )
        for query, value, low, high, by_rank, recalled in [*columns, average]:
            rows.append(
                {
                    "query": query,
                    "method": one.name,
                    "pearson": float(value),
                    "low": float(low),
                    "high": float(high),
                    "spearman": float(by_rank),
                    "recall": float(recalled) if np.isfinite(recalled) else None,
                    "seconds": one.seconds,
                }
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def validate(config: ValidateJob, log: Callable[[str], None]) -> tuple[Findings, pa.Table, dict[str, Any]]:
    """The whole study for a configuration; the table goes to <output>/validate/against_cg.parquet.

    Returns the findings, the table, and what stands in the table's footer beside it: the reference's iterations and
    residuals by query, EK-FAC's gain over every other method with its paired interval, the settings, the cost.

    Raises:
        InfscanError: for inputs that cannot be used, or a validation that would take too long.
    """
    study = open_study(config)
    found = against_cg(
        study.rank,
        study.queries,
        study.curvature,
        study.candidates,
        study.inverse,
        config.validate,
        seed=config.seed,
        fit_seconds=study.fit_seconds,
        log=log,
    )
    agreements = judge(found, config.validate, config.seed)
    table = to_table(found, agreements)
    facts: dict[str, Any] = {
        "cg": {
            "tolerance": config.validate.cg.tolerance,
            "iterations": dict(zip(found.query_ids, found.cg.iterations_k.tolist(), strict=True)),
            "residual": dict(zip(found.query_ids, found.cg.residuals[-1].tolist(), strict=True)),
            "seconds": found.reference.seconds,
        },
        "gain_of_ekfac": {
            name: difference(agreements[EKFAC], other) for name, other in agreements.items() if name != EKFAC
        },
        "lissa_scale": found.scale,
        "damping": plain(config.factors.damping),
        "settings": plain(config.validate),
        "fingerprints": study.fingerprints,
        "flops": found.cost.flops,
        "fit_seconds": found.fit_seconds,
    }
    Store(config.output).write("validate/against_cg.parquet", to_parquet(table, facts))
    return found, table, facts
