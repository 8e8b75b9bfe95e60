"""The order of rows and the threshold of a query and side.

The order is total: a proponent is stronger with a higher score, an opponent with a lower one; equal scores go by the
smaller sequence_id. So the best C rows do not depend on the order in which shards arrive
(docs/design.md, mechanisms 2 and 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PROPONENT, OPPONENT = "proponent", "opponent"
SIDES = (PROPONENT, OPPONENT)


@dataclass(frozen=True)
class Threshold:
    """(scan score, sequence_id) of the C-th best row so far of one query and side."""

    score: float
    sequence_id: int


def strength(scores: NDArray[np.float32], side: str) -> NDArray[np.float32]:
    """Scores turned so that larger is stronger on this side."""
    return scores if side == PROPONENT else -scores


def best_rows(
    scores: NDArray[np.float32],
    sequence_ids: NDArray[np.int64],
    side: str,
    capacity: int,
    threshold: Threshold | None = None,
) -> NDArray[np.intp]:
    """Positions of the at most `capacity` strongest rows, strongest first.

    A row takes part when its score is finite, has the side's sign, and is not strictly weaker than the threshold.
    scores: [n]; sequence_ids: [n].
    """
    turned = strength(scores, side)
    keep = np.isfinite(turned) & (turned > 0)
    if threshold is not None:
        bar = threshold.score if side == PROPONENT else -threshold.score
        keep &= (turned > bar) | ((turned == bar) & (sequence_ids <= threshold.sequence_id))
    positions = np.flatnonzero(keep)
    order = np.lexsort((sequence_ids[positions], -turned[positions]))
    return positions[order[:capacity]]
