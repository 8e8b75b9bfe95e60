"""Which document of a packed sequence carries a row: its token scores, summed over the tokens of each document."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True)
class RowDocuments:
    """The documents of some rows, row by row, as columns of one length; `strongest` and `shares` are by row.

    rows: int64, of which row. places: int64, in `SequenceDocuments`. scores: float32, sums of the row's token scores.
    strongest: int64, the place of each row's document with the largest score of the row's sign, the first of equals.
    shares: float32, that document's part of the row's score; above 1 where other documents act against it, NaN where
    the score is 0.
    """

    rows: NDArray[np.int64]
    places: NDArray[np.int64]
    scores: NDArray[np.float32]
    strongest: NDArray[np.int64]
    shares: NDArray[np.float32]


def strongest_span(
    spans: Sequences[tuple[int, int]], token_scores: NDArray[np.floating], score: float
) -> tuple[int, NDArray[np.float64]]:
    """Which of a sequence's documents has the largest sum of token scores in the score's sign, and all sums, [n].

    spans: the documents' positions [start, end), one at least; the first of equals is taken.
    """
    before = np.concatenate([[0.0], np.cumsum(token_scores, dtype=np.float64)])
    summed = np.asarray([before[end] - before[start] for start, end in spans])
    return int(np.argmax(summed if score > 0 else -summed)), summed


class SequenceDocuments:
    """The documents of every published sequence, one after the other, by sequence_id.

    sequence_ids: int64, ascending. starts: int64 [n + 1], where each sequence's documents begin in the other columns.

    Attributes:
        weights: float64, by document, what its scores add up to in size over the rows that were split.
    """

    def __init__(self, tables: Iterable[pa.Table]) -> None:
        """tables: sequence_id and documents (`infscan.results.schema.DOCUMENTS`), a sequence once in all of them."""
        parts = [table.select(["sequence_id", "documents"]) for table in tables]
        ids, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        flat: list[pa.StructArray] = []
        for part in parts:
            ids.append(part["sequence_id"].to_numpy())
            counts.append(pc.list_value_length(part["documents"]).to_numpy())
            flat += [chunk.flatten() for chunk in part["documents"].chunks]
        sequence_ids, lengths = np.concatenate(ids), np.concatenate(counts).astype(np.int64)
        before = np.concatenate([[0], np.cumsum(lengths)])
        order = np.argsort(sequence_ids)
        self.sequence_ids = sequence_ids[order]
        self.starts = np.concatenate([[0], np.cumsum(lengths[order])])
        # Of each document of the ordered sequences, where it is among those that were given.
        taken = np.concatenate(
            [np.empty(0, np.int64), *(np.arange(before[one], before[one + 1]) for one in order.tolist())]
        )

        def column(name: str, kind: pa.DataType) -> pa.Array:
            chunks = [pc.struct_field(one, name).cast(kind) for one in flat]
            return pa.chunked_array(chunks, kind).combine_chunks().take(pa.array(taken))

        self.ids = column("id", pa.string())
        # Few in number, however many documents.
        self.sources = column("source", pa.string()).dictionary_encode()
        self.begins = column("start", pa.int32()).to_numpy()
        self.ends = column("end", pa.int32()).to_numpy()
        self.weights = np.zeros(len(taken), np.float64)

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def split(
        self, sequence_ids: NDArray[np.int64], scores: NDArray[np.float32], token_scores: list[NDArray[np.float32]]
    ) -> RowDocuments:
        """Split rows over the documents of their sequences, and add to `weights`. token_scores: [length] by row.

        A token counts for the document that it lies in; separators count for none.
        """
        count = len(sequence_ids)
        strongest, shares = np.zeros(count, np.int64), np.zeros(count, np.float32)
        rows, places, found = [], [], []
        for row, sequence in enumerate(np.searchsorted(self.sequence_ids, sequence_ids).tolist()):
            mine = np.arange(self.starts[sequence], self.starts[sequence + 1])
            spans = list(zip(self.begins[mine].tolist(), self.ends[mine].tolist(), strict=True))
            best, summed = strongest_span(spans, token_scores[row], float(scores[row]))
            self.weights[mine] += np.abs(summed)
            strongest[row] = mine[best]
            shares[row] = summed[best] / float(scores[row]) if scores[row] else np.nan
            rows.append(np.full(len(mine), row))
            places.append(mine)
            found.append(summed.astype(np.float32))
        nothing = np.empty(0, np.int64)
        return RowDocuments(
            np.concatenate([nothing, *rows]),
            np.concatenate([nothing, *places]),
            np.concatenate([np.empty(0, np.float32), *found]),
            strongest,
            shares,
        )

    def heaviest(self, sequence_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of each sequence, the place of the document with the largest weight, the first of equals."""
        sequences = np.searchsorted(self.sequence_ids, sequence_ids)
        spans = zip(self.starts[sequences].tolist(), self.starts[sequences + 1].tolist(), strict=True)
        return np.asarray([start + int(np.argmax(self.weights[start:stop])) for start, stop in spans], np.int64)
