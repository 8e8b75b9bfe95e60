"""Which rows state a completion: its words, or its tokens where there is no text, occur in them, and where.

And how each row stands beside the run's other questions: a hub is among the strongest of many of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Nats a token below which a model hardly knows a completion: a chance of one in 150 for each of its tokens.
UNLIKELY = -5.0
# A row counts as near the top of a question up to this rank.
HUB_RANK = 10


@dataclass(frozen=True)
class Asked:
    """Of one query, what publishing has to know.

    question: the same for all measurements of one prompt and completion. completion: its text, None where only ids
    came; token_ids: of the measured tokens. nats: -log p of what is measured, NaN where nobody knows.
    """

    question: str
    completion: str | None
    token_ids: tuple[int, ...]
    nats: float = float("nan")

    @property
    def unlikely(self) -> bool:
        """Whether the model hardly knows what is measured."""
        return -self.nats / len(self.token_ids) < UNLIKELY

    def place(self, token_ids: Sequences[int], texts: Sequences[str] | None) -> int | None:
        """The position of the first token at which a sequence states the completion; None where it does not.

        Words are compared without case, and whatever stands between them counts as one space.
        """
        if self.completion is not None and texts is not None:
            words = re.findall(r"\w+", self.completion)
            if not words:
                return None
            pattern = r"\W+".join(map(re.escape, words))
            found = re.search(rf"(?<!\w){pattern}(?!\w)", "".join(texts), re.IGNORECASE)
            if found is None:
                return None
            ends = np.cumsum([len(text) for text in texts])
            return int(np.searchsorted(ends, found.start(), side="right"))
        ids, wanted = list(token_ids), list(self.token_ids)
        starts = (start for start in range(len(ids) - len(wanted) + 1) if ids[start : start + len(wanted)] == wanted)
        return next(starts, None)


def hubs(
    questions: Sequences[str],
    queries: NDArray[np.int32],
    sides: NDArray[np.int8],
    ranks: NDArray[np.int32],
    sequence_ids: NDArray[np.int64],
    background: Sequences[tuple[int, int, int]] = (),
) -> NDArray[np.int32]:
    """Of every published row, how many *other* questions have its sequence among their HUB_RANK strongest of its side.

    questions: by query. The others are columns of one length, a published row each. background: (question, side,
    sequence_id) of further questions' strongest rows.
    """
    near: dict[tuple[int, int], set[str | int]] = {}
    for number, side, sequence_id in background:
        near.setdefault((sequence_id, side), set()).add(number)
    rows = list(zip(queries.tolist(), sides.tolist(), ranks.tolist(), sequence_ids.tolist(), strict=True))
    for query, side, rank, sequence_id in rows:
        if rank <= HUB_RANK:
            near.setdefault((sequence_id, side), set()).add(questions[query])
    found = [len(near.get((sequence_id, side), set()) - {questions[query]}) for query, side, _, sequence_id in rows]
    return np.asarray(found, np.int32)


def ranks_by_size(
    queries: NDArray[np.int32], scores: NDArray[np.float32], sequence_ids: NDArray[np.int64]
) -> NDArray[np.int32]:
    """Each row's rank by |score| over both sides of its query, from 1; equal ones by sequence_id."""
    order = np.lexsort((sequence_ids, -np.abs(scores), queries))
    starts = np.searchsorted(queries[order], queries[order], side="left")
    ranks = np.empty(len(order), np.int32)
    ranks[order] = np.arange(len(order)) - starts + 1
    return ranks


def relatif_ranks(
    queries: NDArray[np.int32],
    sides: NDArray[np.int8],
    scores: NDArray[np.float32],
    self_influences: NDArray[np.float64],
    sequence_ids: NDArray[np.int64],
) -> NDArray[np.int32]:
    """Each row's rank by |score| / sqrt(self-influence) within its query and side, from 1; equal ones by sequence_id.

    Rows whose self-influence is not a positive number take no part, and get 0.
    """
    known = np.isfinite(self_influences) & (self_influences > 0)
    ranks = np.zeros(len(scores), np.int32)
    relative = np.abs(scores[known]) / np.sqrt(self_influences[known])
    order = np.lexsort((sequence_ids[known], -relative, sides[known], queries[known]))
    groups = (queries[known].astype(np.int64) * 2 + sides[known])[order]
    places = np.empty(len(order), np.int32)
    places[order] = np.arange(len(order)) - np.searchsorted(groups, groups, side="left") + 1
    ranks[known] = places
    return ranks
