"""What the rest of infscan calls a sequence (up to T token ids, and the documents they came from), and a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from infscan.corpus.reading import Reading
from infscan.errors import CorpusError
from infscan.storage import Store


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
        byte_offset: where its first document begins in `path`, as the format counts (docs/corpora.md): the byte of the
            decompressed stream at which the line starts, the row of a table, the byte of an array's first token.
        path: the file the first document was read from.
        loss: bool [length], the tokens whose prediction training's loss counted; None where it counted them all.
        starts: int64, ascending from 0: where attention and positions begin anew; None where they run through.
    """

    sequence_id: int
    token_ids: np.ndarray
    documents: tuple[Span, ...]
    byte_offset: int
    path: str
    loss: np.ndarray | None = None
    starts: np.ndarray | None = None

    @property
    def document_id(self) -> str:
        return self.documents[0].id

    @property
    def source(self) -> str:
        return self.documents[0].source

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, eq=False)
class TokenBlock:
    """Consecutive sequences' token ids and nothing else: sequence i is tokens[offsets[i]:offsets[i + 1]].

    tokens: any integer dtype. offsets: int64 [n + 1], ascending.
    """

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def part(self, start: int, stop: int) -> TokenBlock:
        """Sequences [start, stop) of the block."""
        offsets = self.offsets[start : stop + 1]
        return TokenBlock(self.tokens[offsets[0] : offsets[-1]], offsets - offsets[0])


class AddressableCorpus(Protocol):
    """A corpus whose sequences are numbered 0..sequences-1 for good. It pickles, and opens files when first read."""

    @property
    def store(self) -> Store:
        """The folder that `open_corpus` opens it from: what a task is given instead of the corpus."""
        ...

    @property
    def reading(self) -> Reading:
        """How its sequences are read."""
        ...

    @property
    def sequences(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def sequence_length(self) -> int:
        """T: no sequence is longer."""
        ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """Of the content: equal for equal token ids and document ids, wherever they lie."""
        ...

    @property
    def tokenizer(self) -> str | None:
        """Digest of the tokenizer that made the token ids, where it is known."""
        ...

    @property
    def counts(self) -> dict[str, Any]:
        """What was read and what became of it; at least `sequences` and `tokens`."""
        ...

    @property
    def chosen(self) -> np.ndarray | None:
        """int64, ascending: the only numbers that are to be scanned; None for all of them."""
        ...

    def read(self, ids: np.ndarray) -> list[Sequence]:
        """The sequences with these numbers (int64 [n]), in the order asked for.

        Raises:
            CorpusError: for a file that is missing, changed or damaged, by name.
        """
        ...

    def token_blocks(self, start: int, stop: int) -> Iterator[TokenBlock]:
        """The token ids of the sequences [start, stop), in order, in blocks that are cut as they lie."""
        ...

    def close(self) -> None:
        """Let go of open files; reading opens them again."""
        ...


def check_numbers(where: str, ids: np.ndarray, sequences: int) -> None:
    """Raises CorpusError where a number is none of 0..sequences-1."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < sequences:
        raise CorpusError(
            f"{where} has the sequences 0 to {sequences - 1}, and {int(ids.min())} to {int(ids.max())} "
            "were asked for; is this plan of another corpus?"
        )


def document_starts(
    token_ids: np.ndarray, documents: tuple[Span, ...], separators: tuple[int | None, int | None]
) -> np.ndarray:
    """Where the documents of a sequence begin, int64, ascending from 0: what corpus.attention=within restarts at.

    A document has the BOS before it and the EOS after it. An EOS that ends no document of the sequence (an empty one,
    or one that the sequence before had the rest of) is apart from what follows it. An EOS inside of a document is a
    token like any other.

    separators: (BOS, EOS) token ids, None if there is none.
    """
    bos_id, eos_id = separators
    spans = [(span.start, span.end) for span in documents if span.end > span.start]
    found, before = [0], 0
    for start, end in (*spans, (len(token_ids), len(token_ids))):
        gap = token_ids[before:start]
        # Where BOS and EOS are one token, a single one after a document is its EOS.
        told = bos_id != eos_id or len(gap) > 1 or not before
        first = start - int(len(gap) > 0 and gap[-1] == bos_id and told)
        found += (np.flatnonzero(token_ids[before:first] == eos_id) + before + 1).tolist()
        found.append(first)
        before = end
    return np.unique(np.array([at for at in found if at < len(token_ids)], np.int64))
