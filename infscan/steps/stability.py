"""How much a row's score depends on what stands before it: the strongest rows again, after other contexts.

A sequence of a corpus was seen by training after whatever came before it, which is not known. Where its score changes
sign with it, the sign says nothing (docs/reading.md). Contexts are nothing, the separator, and the beginnings of two
other sequences drawn by the seed; only the row's own tokens have a loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infscan.config import fingerprint
from infscan.corpus.plan import Plan
from infscan.results.publish import Ranking
from infscan.results.refined import RefinedRows, unit_path
from infscan.results.shard_file import GIVEN, read_candidates
from infscan.steps.corpus_inputs import separators
from infscan.steps.factors import Factors
from infscan.steps.preconditioner import query_groups
from infscan.steps.ranking import Ranked
from infscan.steps.refine import (
    Context,
    RefineTask,
    full_rank_key,
    refine_units,
    score_again,
    whole_units,
)
from infscan.steps.run import Run
from infscan.steps.scan import Scanned

_SEQUENCES_PER_UNIT, _PAIRS_PER_UNIT = 64, 1 << 12
# Tokens of another sequence's beginning, and how many such; with nothing and the separator, so many contexts at most.
NEUTRAL, _NEUTRALS = 16, 2
MOST_CONTEXTS = 2 + _NEUTRALS


@dataclass(frozen=True)
class Stability:
    """Of the rows that were tried, the lowest and the highest score, the published one among them: columns.

    queries: int32. sequence_ids: int64. low, high: float32.
    """

    queries: NDArray[np.int32]
    sequence_ids: NDArray[np.int64]
    low: NDArray[np.float32]
    high: NDArray[np.float32]

    def of(self, ranking: Ranking) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(low, high) of a ranking's rows; NaN for those that were not tried."""
        pairs = zip(self.queries.tolist(), self.sequence_ids.tolist(), strict=True)
        known = dict(zip(pairs, zip(self.low.tolist(), self.high.tolist(), strict=True), strict=True))
        unknown = (float("nan"), float("nan"))
        wanted = zip(ranking.queries.tolist(), ranking.sequence_ids.tolist(), strict=True)
        bounds = np.asarray([known.get(pair, unknown) for pair in wanted], np.float32).reshape(-1, 2)
        return bounds[:, 0], bounds[:, 1]


def stability(run: Run, plan: Plan, scanned: Scanned, ranked: Ranked, factors: Factors) -> Stability | None:
    """Score the scan.stability strongest rows of every query and side again after each context; None for 0 rows."""
    config, inputs = run.config, run.inputs
    if not config.scan.stability:
        return None
    layers = [layer.name for layer in inputs.layers]
    scores, ranking = ranked.rows.scores, ranked.ranking
    rows = np.sort(ranking.rows[ranking.ranks <= config.scan.stability])
    tried, published = scanned.best.take(rows), scores[rows]
    contexts = _contexts(run, plan, scanned)
    groups, layer_groups = query_groups(len(run.queries), inputs.layers, config.refine_group_bytes)
    units = refine_units(tried, groups, _SEQUENCES_PER_UNIT, _PAIRS_PER_UNIT)
    rest = [factors.fingerprint, factors.inverse.fingerprint, inputs.refine_dtype, scanned.fingerprint]
    pairs = [tried.sequence_ids.tolist(), tried.queries.tolist()]
    digest = fingerprint([[list(context.tokens) for context in contexts], pairs, rest])
    cells = [(unit, l, c) for unit in range(len(units)) for l in range(len(layer_groups)) for c in range(len(contexts))]
    path_of = {cell: unit_path(digest, number) for number, cell in enumerate(cells)}
    there = whole_units(run, digest)
    gradients = full_rank_key(run, factors, config.refine_group_bytes)

    def task(cell: tuple[int, int, int]) -> RefineTask:
        unit, layers_, context = cell
        return RefineTask(
            run=run.store,
            path=path_of[cell],
            # As refine has it, so that a rank keeps the queries' gradients.
            group=f"{gradients}/{units[unit].group}/{layers_}",
            queries=tuple(run.queries[query] for query in groups[units[unit].group]),
            layers=layer_groups[layers_],
            inverse=factors.inverse,
            shards=tuple(plan.by_shard(units[unit].sequence_ids)),
            wanted=units[unit].wanted,
            tokens_per_batch=config.tokens_per_batch,
            fingerprint=scanned.fingerprint,
            before=contexts[context],
        )

    score_again(run, "stability", cells, units, task, lambda cell: path_of[cell] in there)
    low, high = published.copy(), published.copy()
    for context in range(len(contexts)):
        paths: list[list[list[str]]] = [[[] for _ in layer_groups] for _ in groups]
        for unit, l, c in cells:
            if c == context:
                paths[units[unit].group][l].append(path_of[unit, l, c])
        found = RefinedRows(run.store, groups, paths, layers, inputs.query_ids, tried).scores
        low, high = np.fmin(low, found), np.fmax(high, found)
    return Stability(tried.queries, tried.sequence_ids, low, high)


def _contexts(run: Run, plan: Plan, scanned: Scanned) -> list[Context]:
    """Nothing, the separator, and the beginnings of other candidates, which shard files have."""
    inputs = run.inputs
    own = separators(run.config.corpus, run.architecture, inputs.tokenizer)
    there = np.unique(scanned.best.sequence_ids)
    chosen = np.random.default_rng(run.config.seed).choice(there, min(_NEUTRALS, len(there)), replace=False)
    found: list[tuple[int, ...]] = [(), *((token,) for token in own[:1])]
    for name, sequence_ids in plan.by_shard(chosen):
        table = read_candidates(run.store, name, sequence_ids, columns=GIVEN, fingerprint=scanned.fingerprint)
        found += [tuple(ids[:NEUTRAL]) for ids in table["token_ids"].to_pylist()]
    return [Context(tokens, own, run.architecture.context) for tokens in found]
