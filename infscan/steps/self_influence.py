"""How strongly a row would act on itself: g^T (G + lambda)^-1 g of the strongest rows, g the gradient of its own loss.

Rows that are unlike anything else have much of it, and are near the top of many questions. l-RelatIF (Barshan et al.
2020) orders rows by score / sqrt(self-influence), what a step of one size in the curvature's norm would do
(docs/method.md#self-influence). Gradients are of a whole sequence, so that rows are taken by sequence, not by query.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.config import fingerprint
from infscan.corpus.plan import Plan
from infscan.engine.executor import Step
from infscan.influence.eigenbasis import weighted_squares
from infscan.influence.layers import Layer
from infscan.influence.precision import Multiply, multiplying
from infscan.influence.routed import Routed
from infscan.influence.span import SpannedBasis, weighted_spanned_squares
from infscan.model.worker import LayerConsumer, ModelWorker
from infscan.results.publish import Ranking
from infscan.results.refined import unit_path
from infscan.results.schema import OF, read_parquet, to_parquet
from infscan.steps.factor_files import layer_groups
from infscan.steps.factors import Factors
from infscan.steps.preconditioner import DampedFactors, Preconditioner, layer_factors
from infscan.steps.ranking import Ranked
from infscan.steps.refine import stored_candidates, whole_units
from infscan.steps.run import Run
from infscan.steps.scan import Scanned
from infscan.storage import Store

_SEQUENCES_PER_UNIT = 64
UNIT = pa.schema([("sequence_id", pa.int64()), ("self_influence", pa.float64())])


@dataclass(frozen=True)
class SelfInfluence:
    """Of the sequences that were tried, by sequence_id, ascending. values: float64."""

    sequence_ids: NDArray[np.int64]
    values: NDArray[np.float64]

    def of(self, ranking: Ranking) -> NDArray[np.float64]:
        """A ranking's rows; NaN for those that were not tried."""
        known = dict(zip(self.sequence_ids.tolist(), self.values.tolist(), strict=True))
        return np.asarray([known.get(one, np.nan) for one in ranking.sequence_ids.tolist()], np.float64)


def self_influence(run: Run, plan: Plan, scanned: Scanned, ranked: Ranked, factors: Factors) -> SelfInfluence | None:
    """Of the scan.self_influence strongest rows of every query and side; None for 0 rows."""
    config, inputs = run.config, run.inputs
    if not config.scan.self_influence:
        return None
    ranking = ranked.ranking
    tried = np.unique(ranking.sequence_ids[ranking.ranks <= config.scan.self_influence])
    units = [tried[start : start + _SEQUENCES_PER_UNIT] for start in range(0, len(tried), _SEQUENCES_PER_UNIT)]
    # As the Lambda pass holds them: a rank has one group's eigenbases at a time.
    groups = layer_groups(inputs.layers, config.group_bytes, config.factors.blocks)
    rest = [factors.fingerprint, factors.inverse.fingerprint, inputs.refine_dtype, scanned.fingerprint, list(groups)]
    digest = fingerprint(["self-influence", tried.tolist(), rest])
    cells = [(unit, group) for group in range(len(groups)) for unit in range(len(units))]
    path_of = {cell: unit_path(digest, number) for number, cell in enumerate(cells)}
    there = whole_units(run, digest)
    by_name = {layer.name: layer for layer in inputs.layers}

    def task(cell: tuple[int, int]) -> SelfInfluenceTask:
        return SelfInfluenceTask(
            run=run.store,
            path=path_of[cell],
            shards=tuple(plan.by_shard(units[cell[0]])),
            layers=tuple(by_name[name] for name in groups[cell[1]]),
            inverse=factors.inverse,
            factors=factors.fingerprint,
            tokens_per_batch=config.tokens_per_batch,
            fingerprint=scanned.fingerprint,
        )

    step = Step(
        name="self_influence",
        unit_name="units",
        units=cells,
        function=self_influence_task,
        task=task,
        is_done=lambda cell: path_of[cell] in there,
        progress=lambda cell, tokens: (len(units[cell[0]]), tokens),
    )
    if not all(map(step.is_done, cells)):
        run.hold_model_in(config.refine_dtype)
        # Refining's full-rank gradients: a rank holds a group's factors in their place.
        run.executor.forget()
        run.executor.run(step)
    values = np.zeros(len(tried), np.float64)
    for (unit, _), path in path_of.items():
        values[np.searchsorted(tried, units[unit])] += read_parquet(run.store, path)["self_influence"].to_numpy()
    return SelfInfluence(tried, values)


@dataclass(frozen=True)
class SelfInfluenceTask:
    """Some sequences for a group of layers. shards, fingerprint: as of `RefineTask`; factors: of what is preconditioned
    with."""

    run: Store
    path: str
    shards: tuple[tuple[str, np.ndarray], ...]
    layers: tuple[Layer, ...]
    inverse: Preconditioner
    factors: str | None
    tokens_per_batch: int
    fingerprint: str


@multiplying("exact")
def self_influence_task(worker: ModelWorker, task: SelfInfluenceTask) -> int:
    """sum over the layers of <g, (G + lambda)^-1 g> of every sequence, written by rank 0. Returns the tokens."""

    def known() -> dict[str, DampedFactors]:
        return {layer.name: layer_factors(task.inverse, layer, worker.device, worker.wide) for layer in task.layers}

    key = (task.factors, task.inverse.fingerprint, task.layers)
    factors = worker.cached("damped factors", key, known)
    sequences = stored_candidates(task.run, task.shards, task.fingerprint)
    found = torch.zeros(len(sequences), dtype=worker.wide, device=worker.device)
    for batch in worker.batches(sequences, task.tokens_per_batch):
        partial_b = torch.zeros(len(batch.rows), dtype=worker.wide, device=worker.device)
        worker.backward(batch, task.layers, batch.loss(), _adding(partial_b, factors, task.inverse.matmul))
        if batch.scored:
            found[worker.to_device(batch.rows)] = partial_b
    found = worker.reduce(found)
    if worker.leads:
        columns = [[sequence.sequence_id for sequence in sequences], found.double().cpu().numpy()]
        task.run.write(task.path, to_parquet(pa.table(columns, schema=UNIT), {OF: task.path}))
    return sum(len(sequence) for sequence in sequences)


def _adding(found_b: Tensor, factors: dict[str, DampedFactors], matmul: Multiply) -> LayerConsumer:
    """Adds a layer's part of every sequence of a micro-batch to found_b, [B]."""

    def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
        with multiplying(matmul):
            if routed is None:
                found_b.add_(_part(s, a, factors[layer.name]))
                return
            for row, mine in routed.segments():
                found_b[row] += _part(s[None, mine], a[None, mine], factors[layer.name])[0]

    return consume


def _part(s_bto: Tensor, a_bti: Tensor, known: DampedFactors) -> Tensor:
    """<g, (G + lambda)^-1 g> of one layer, [B]; <g, g> without factors. a_bti has a bias's 1."""
    if known is None:
        # <g, g> = sum over t, u of (s_t . s_u)(a_t . a_u), without forming g.
        wide = torch.promote_types(s_bto.dtype, torch.float32)
        s_bto, a_bti = s_bto.to(wide), a_bti.to(wide)
        return ((s_bto @ s_bto.mT) * (a_bti @ a_bti.mT)).flatten(1).sum(dim=1)
    factors, lam = known
    weights, Q_S = 1 / (factors.Lambda + lam), factors.Q_S
    if isinstance(Q_S, SpannedBasis):
        return weighted_spanned_squares(weights, s_bto, a_bti, Q_S, factors.Q_A)
    return weighted_squares(weights, s_bto, a_bti, Q_S, factors.Q_A)
