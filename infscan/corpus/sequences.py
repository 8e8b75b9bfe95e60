"""What the rest of infscan calls a sequence: up to T token ids, and the documents they came from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens [start, end) of a sequence that belong to one document; separators (BOS, EOS) belong to none.

    A sequence that holds separators only has one empty span, of the document whose separator comes first.
    """

    id: str
    source: str
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Sequence:
    """One training sequence.

    Attributes:
        sequence_id: its number in the addressable corpus.
        token_ids: int64 [length], 1 <= length <= T.
        documents: the spans, in order; never empty.
        byte_offset: where its first document begins in `path`: the byte of the decompressed JSONL stream at which the
            line starts, or the row number (from 0) of a Parquet file.
        path: the file the first document was read from.
    """

    sequence_id: int
    token_ids: np.ndarray
    documents: tuple[Span, ...]
    byte_offset: int
    path: str

    @property
    def document_id(self) -> str:
        return self.documents[0].id

    @property
    def source(self) -> str:
        return self.documents[0].source

    def __len__(self) -> int:
        return len(self.token_ids)
