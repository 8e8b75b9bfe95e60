"""The influence of each token of published rows as a target: what predicting it taught the model of the completion.

They add up to a row's score, and a score changes by exactly minus their sum where tokens are left out of the loss
(`infscan.results.masks`). By a forward of every row that carries a tangent for each of its queries
(`infscan.model.target_influence`), which a model that is cut over ranks can do.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.config import fingerprint
from infscan.corpus.plan import Plan
from infscan.corpus.sequences import Sequence
from infscan.engine.executor import Step
from infscan.influence.layers import Layer
from infscan.influence.precision import multiplying
from infscan.influence.topk_tracker import ScoredRows
from infscan.model.target_influence import target_influence
from infscan.model.worker import ModelWorker
from infscan.results.publish import Ranking
from infscan.results.refined import RefinedRows, unit_path
from infscan.steps.factors import Factors
from infscan.steps.preconditioner import preconditioned, query_groups
from infscan.steps.refine import (
    RefineTask,
    full_rank_key,
    pairs_of,
    refine_units,
    stored_candidates,
    whole_units,
    write_pairs,
)
from infscan.steps.run import Run
from infscan.steps.scan import Scanned

SEQUENCES_PER_UNIT, _PAIRS_PER_UNIT = 64, 1 << 12
# Queries whose tangents share a pass at most (docs/reports/truth.md#products-with-g-for-several-queries), and the pairs
# that are worth a pass of their own.
TOGETHER, _FEWEST = 8, 8
Cell = tuple[int, int]


@dataclass(frozen=True)
class Targets:
    """Where the influences are stored. tried: the rows that have them."""

    tried: ScoredRows
    rows: RefinedRows

    def of(self, ranking: Ranking) -> list[NDArray[np.float32] | None]:
        """Of a ranking's rows, by token; None for those that were not tried."""
        place = {
            pair: row
            for row, pair in enumerate(zip(self.tried.queries.tolist(), self.tried.sequence_ids.tolist(), strict=True))
        }
        wanted = [place.get(pair) for pair in zip(ranking.queries.tolist(), ranking.sequence_ids.tolist(), strict=True)]
        there = [row for row in wanted if row is not None]
        found = iter(self.rows.margins(np.asarray(there, np.intp)).token_scores)
        return [None if row is None else next(found) for row in wanted]


def targets(run: Run, plan: Plan, scanned: Scanned, ranking: Ranking, factors: Factors) -> Targets | None:
    """Take apart the scan.targets strongest rows of every query and side; None for 0 rows."""
    config, inputs = run.config, run.inputs
    most = config.scan.targets
    if most == 0:
        return None
    rows = np.sort(ranking.rows if most is None else ranking.rows[ranking.ranks <= most])
    tried = scanned.best.take(rows)
    groups, layer_groups = query_groups(len(run.queries), inputs.layers, config.query_group_bytes)
    units = refine_units(tried, groups, SEQUENCES_PER_UNIT, _PAIRS_PER_UNIT)
    digest = fingerprint(
        [
            ["targets", tried.sequence_ids.tolist(), tried.queries.tolist()],
            [factors.fingerprint, factors.inverse.fingerprint, inputs.refine_dtype, scanned.fingerprint],
        ]
    )
    cells = [(unit, layers) for unit in range(len(units)) for layers in range(len(layer_groups))]
    path_of = {cell: unit_path(digest, number) for number, cell in enumerate(cells)}
    there = whole_units(run, digest)
    gradients = full_rank_key(run, factors, config.query_group_bytes)

    def task(cell: Cell) -> RefineTask:
        unit, layers = units[cell[0]], layer_groups[cell[1]]
        return RefineTask(
            run=run.store,
            path=path_of[cell],
            group=f"{gradients}/{unit.group}/{cell[1]}",
            queries=tuple(run.queries[query] for query in groups[unit.group]),
            layers=layers,
            inverse=factors.inverse,
            shards=tuple(plan.by_shard(unit.sequence_ids)),
            wanted=unit.wanted,
            tokens_per_batch=config.tokens_per_batch,
            fingerprint=scanned.fingerprint,
        )

    step = Step(
        name="targets",
        unit_name="units",
        units=cells,
        function=targets_task,
        task=task,
        is_done=lambda cell: path_of[cell] in there,
        progress=lambda cell, tokens: (len(np.unique(units[cell[0]].sequence_ids)), tokens),
    )
    if not all(map(step.is_done, cells)):
        # As the published scores are made.
        run.hold_model_in(config.refine_dtype)
        run.executor.run(step)
    paths: list[list[list[str]]] = [[[] for _ in layer_groups] for _ in groups]
    for unit, layers in cells:
        paths[units[unit].group][layers].append(path_of[unit, layers])
    names = [layer.name for layer in inputs.layers]
    return Targets(tried, RefinedRows(run.store, groups, paths, names, inputs.query_ids, tried))


@multiplying("exact")
def targets_task(worker: ModelWorker, task: RefineTask) -> int:
    """<P_q, grad l_t> of every wanted pair for a group of layers, by token, written by rank 0. Returns the tokens.

    The unit's files are those of refining, with these in the place of scores by input position; by layer there is
    nothing.
    """
    P = worker.cached("full-rank", task.group, lambda: preconditioned(worker, task.queries, task.layers, task.inverse))
    sequences = stored_candidates(task.run, task.shards, task.fingerprint)
    wanted = [task.wanted[sequence.sequence_id] for sequence in sequences]
    found_nt = pair_targets(worker, sequences, wanted, task.layers, P, task.tokens_per_batch)
    by_token = worker.reduce(found_nt).float()
    if worker.leads:
        write_pairs(task, sequences, np.zeros((len(by_token), len(task.layers)), np.float32), by_token.cpu().numpy())
    return sum(len(sequences[row]) for row, _ in pairs_of(wanted))


def pair_targets(
    worker: ModelWorker,
    sequences: Sequences[Sequence],
    wanted: Sequences[Sequences[int]],
    layers: Sequences[Layer],
    P: Mapping[str, Tensor],
    tokens_per_batch: int,
) -> Tensor:
    """<P_q, grad l_t> of every wanted pair (`pairs_of`) by token: [n, T of the longest], float32 or wider.

    P: [Q, O, I] by layer, full rank. Each rank of a group has its own micro-batches' rows; those of others are zero.
    """
    place_of = {pair: place for place, pair in enumerate(pairs_of(wanted))}
    longest = max(len(sequence) for sequence in sequences)
    found_nt = torch.zeros(len(place_of), longest, dtype=worker.wide, device=worker.device)
    for queries, rows in passes(wanted):
        P_k = {layer.name: _some(P[layer.name], queries) for layer in layers}
        # A pass has as many tokens with its tangents as one query's would.
        for batch in worker.batches([sequences[row] for row in rows], tokens_per_batch // len(queries)):
            influence_kbt = target_influence(worker, batch, layers, P_k, batch.loss())
            for place, row in enumerate(batch.rows.tolist()):
                at = [place_of[rows[row], query] for query in queries]
                # Of token t + 1 where position t predicts it.
                found_nt[at, 1 : influence_kbt.shape[2]] = influence_kbt[:, place, :-1]
    return found_nt


def passes(wanted: Sequences[Sequences[int]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """(queries, rows) of every pass over rows: every pair once. wanted: by row, its queries, ascending.

    Rows that have the same queries go together, with a tangent for each; a few pairs go with other rows of their query.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for row, queries in enumerate(wanted):
        for block in sorted({query // TOGETHER for query in queries}):
            some = tuple(query for query in queries if query // TOGETHER == block)
            alike.setdefault(some, []).append(row)
    found: dict[tuple[int, ...], list[int]] = {}
    for queries, rows in sorted(alike.items()):
        for some in [queries] if len(queries) * len(rows) >= _FEWEST else [(query,) for query in queries]:
            found.setdefault(some, []).extend(rows)
    return [(queries, sorted(rows)) for queries, rows in found.items()]


def _some(P_qoi: Tensor, queries: tuple[int, ...]) -> Tensor:
    """[K, O, I]; of adjacent queries without a copy."""
    first, last = queries[0], queries[-1]
    return P_qoi[first : last + 1] if last - first + 1 == len(queries) else P_qoi[list(queries)]
