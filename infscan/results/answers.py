"""Is the answer there? Each query's strongest row beside all scanned sequences, in robust standard deviations.

z = (score - median) / (1.4826 MAD), median and MAD of the scan scores of all sequences. Influence has heavy tails, so
the threshold lies far above a normal distribution's (docs/reading.md has what it was set on).
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infscan.influence.spread import Spread
from infscan.influence.topk import PROPONENT, SIDES
from infscan.results.schema import ANSWERS

# A row stands out from here on; below, the strongest one of a question without an answer would do as well. One that
# states the completion does so earlier, or where it reads so like the question.
STANDS_OUT, STANDS_OUT_STATING, ALIKE_STATING = 21.0, 10.0, 5.0
# Of fewer sequences a median distance says little.
FEWEST = 32
NOT_FOUND = "no sequence stands out: the answer is probably not in this corpus"
NOT_KNOWN = "the model hardly knows this completion: scores are large whatever the corpus has, and rows say little"


@dataclass(frozen=True)
class Standing:
    """How rows stand among all scanned sequences, as columns of one length.

    z: float32, NaN where it is not known (fewer than FEWEST sequences, or scores that do not vary). shares: float32, of
    all scores of the row's sign; NaN where not known. states: which rows state the completion. alike: float32, their
    similarity's z (`infscan.influence.similarity.standing`), NaN where not known. stands_out: |z| is at least
    STANDS_OUT, or of rows that state the completion |z| at least STANDS_OUT_STATING or similarity's ALIKE_STATING.
    """

    z: NDArray[np.float32]
    shares: NDArray[np.float32]
    states: NDArray[np.bool_]
    alike: NDArray[np.float32]

    @property
    def stands_out(self) -> pa.Array:
        known = np.isfinite(self.z)
        least = np.where(self.states, STANDS_OUT_STATING, STANDS_OUT)
        strong = np.abs(np.where(known, self.z, 0)) >= least
        like = is_alike(self.states, self.alike)
        return pa.array(strong | like, pa.bool_(), mask=~known & ~like)


def is_alike(states: NDArray[np.bool_], alike: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which rows state the completion and read like the question. states, alike: as of `Standing`."""
    return states & (np.where(np.isfinite(alike), alike, 0) >= ALIKE_STATING)


class Scale:
    """What the scan says of each query's scores. spread: None where shards of infscan 0.2 and before do not say."""

    def __init__(self, spread: Spread | None, queries: int) -> None:
        unknown = np.full(queries, np.nan)
        self.sequences = np.zeros(queries, np.int64) if spread is None else spread.counts_qb.sum(axis=1)
        enough = self.sequences >= FEWEST
        self.centres = unknown if spread is None else spread.centres_q
        scales = unknown if spread is None else spread.scales_q
        self.scales = np.where(enough & (scales > 0), scales, np.nan)
        self.sums_qs = np.full((queries, 2), np.nan) if spread is None else spread.sums_qs

    def standing(
        self,
        queries: NDArray[np.int32],
        sides: NDArray[np.int8],
        scores: NDArray[np.float32],
        states: NDArray[np.bool_] | None = None,
        alike: NDArray[np.float32] | None = None,
    ) -> Standing:
        """Rows, by query, side, refined score, whether they state the completion and how like the question they are
        (None: nobody knows)."""
        z = (scores - self.centres[queries]) / self.scales[queries]
        sums = self.sums_qs[queries, sides]
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where(sums != 0, scores / sums, np.nan)
        states = np.zeros(len(scores), np.bool_) if states is None else states
        alike = np.full(len(scores), np.nan, np.float32) if alike is None else alike
        return Standing(z.astype(np.float32), shares.astype(np.float32), states, alike)


@dataclass(frozen=True)
class Alike:
    """Of a query's published rows of both sides, the most similar one: its document and z; and whether one of them
    reads like the question and states the completion."""

    document_id: str
    z: float
    stating: bool


def most_alike(document_ids: Sequences[str], alike: NDArray[np.float32], states: NDArray[np.bool_]) -> Alike | None:
    """None where no row was compared. alike, states: as of `Standing`."""
    if not np.isfinite(alike).any():
        return None
    at = int(np.nanargmax(alike))
    return Alike(document_ids[at], float(alike[at]), bool(is_alike(states, alike).any()))


@dataclass(frozen=True)
class Best:
    """A query's strongest proponent. ratio: of its score to that of the strongest row of another document, None where
    none is published. stating: score and rank of the strongest proponent that states the completion, None where no
    published one does."""

    document_id: str
    source: str
    score: float
    ratio: float | None
    stating: tuple[float, int] | None = None


def best_of(
    document_ids: Sequences[str], sources: Sequences[str], scores: Sequences[float], states: Sequences[bool]
) -> Best | None:
    """Of a query's proponents, all of them, strongest first. states: which state the completion."""
    if not len(scores):
        return None
    first = document_ids[0], sources[0]
    named = zip(document_ids, sources, scores, strict=True)
    other = next((score for document, source, score in named if (document, source) != first), None)
    ratio = None if other is None else float(scores[0]) / float(other)
    at = next((row for row, one in enumerate(states) if one), None)
    return Best(*first, float(scores[0]), ratio, None if at is None else (float(scores[at]), at + 1))


def answers_table(
    query_ids: Sequences[str],
    scale: Scale,
    best: Mapping[int, Best],
    unlikely: Sequences[bool] = (),
    alike: Mapping[int, Alike] | None = None,
) -> pa.Table:
    """One row per query, whether or not anything was published for it. unlikely: whose completion the model hardly
    knows; none where nobody measured it. alike: by query, where rows were compared."""
    rows = []
    for query, query_id in enumerate(query_ids):
        mine = best.get(query)
        row: dict[str, object] = {
            "query_id": query_id,
            "sequences": int(scale.sequences[query]),
            "median": _known(scale.centres[query]),
            "scale": _known(scale.scales[query]),
            "positive": _known(scale.sums_qs[query, 0]),
            "negative": _known(scale.sums_qs[query, 1]),
        }
        if row["scale"] is not None:
            row["found"] = False
        if mine is not None:
            # The strongest row, and the strongest that states the completion: a hub may be ahead of it.
            scores = [mine.score, *([mine.stating[0]] if mine.stating else [])]
            query_, side = np.full(len(scores), query, np.int32), np.full(len(scores), SIDES.index(PROPONENT), np.int8)
            stating = np.asarray([mine.stating is not None and mine.stating[1] == 1, True][: len(scores)])
            standing = scale.standing(query_, side, np.asarray(scores, np.float32), stating)
            stands_out = standing.stands_out.to_pylist()
            row |= {
                "document_id": mine.document_id,
                "source": mine.source,
                "score": mine.score,
                "ratio": mine.ratio,
                "z": _known(standing.z[0]),
                "share": _known(standing.shares[0]),
                "found": None if stands_out[0] is None else any(stands_out),
                "stating_rank": mine.stating[1] if mine.stating else None,
            }
        if alike is not None and query in alike:
            like = alike[query]
            row |= {"similar_document_id": like.document_id, "similarity_z": like.z}
            if like.stating:
                row["found"] = True
        if len(unlikely) and unlikely[query]:
            row |= {"found": None, "verdict": NOT_KNOWN}
        elif row.get("found") is False:
            row["verdict"] = NOT_FOUND
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=ANSWERS)


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
