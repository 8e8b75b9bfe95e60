"""Which candidates are published: the best of every query and side by refined score."""

from __future__ import annotations

from dataclasses import dataclass

from infscan.results.publish import Ranking, rank_rows
from infscan.results.refined import RefinedRows
from infscan.steps.refine import Refined
from infscan.steps.run import Run
from infscan.steps.scan import Scanned


@dataclass(frozen=True)
class Ranked:
    """All candidates' refined scores, and the published rows among them."""

    rows: RefinedRows
    ranking: Ranking


def rank(run: Run, scanned: Scanned, refined: Refined) -> Ranked:
    """The top_k candidates of each query and side by refined score."""
    layers = [layer.name for layer in run.inputs.layers]
    rows = RefinedRows(run.store, refined.groups, refined.paths, layers, run.inputs.query_ids, scanned.best)
    return Ranked(rows, rank_rows(scanned.best, rows.scores, run.config.scan.top_k))
