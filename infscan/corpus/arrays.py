"""Flat files of token ids, cut into windows of T: Megatron's .bin with its .idx, and npy arrays."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from infscan.config import Packing
from infscan.corpus.in_place import InPlace, TokenFile, document_spans, read_bytes
from infscan.corpus.megatron import Index
from infscan.corpus.sequences import Span, TokenBlock
from infscan.errors import CorpusError

# A document without an index begins after the EOS before it, which is looked for this far back, block by block.
_SEARCH_TOKENS = 1 << 22
_STEP_TOKENS = 1 << 15


class TokenArrays(InPlace):
    """Windows [i T, (i + 1) T) of every file's tokens; with an index also one sequence per document, cut at T."""

    def _forget(self) -> None:
        super()._forget()
        self._indices: dict[int, Index] = {}

    def block(self, index: int, start: int, stop: int) -> TokenBlock:
        if self.description.packing is Packing.document:
            return self._documents_block(index, start, stop)
        length = self.sequence_length
        begin, end = start * length, min(stop * length, self.description.files[index].tokens)
        offsets = np.minimum(np.arange(stop - start + 1, dtype=np.int64) * length, end - begin)
        return TokenBlock(self._tokens(index, begin, end), offsets)

    def _documents_block(self, index: int, start: int, stop: int) -> TokenBlock:
        starts = self._index(index).documents(start, stop + 1)
        lengths = np.minimum(np.diff(starts), self.sequence_length)
        tokens = self._tokens(index, int(starts[0]), int(starts[-1]))
        kept = [tokens[s : s + n] for s, n in zip((starts[:-1] - starts[0]).tolist(), lengths.tolist(), strict=True)]
        return TokenBlock(np.concatenate(kept), np.cumsum([0, *lengths], dtype=np.int64))

    def spans(self, index: int, start: int, stop: int, block: TokenBlock) -> Iterator[tuple[tuple[Span, ...], int]]:
        file = self.description.files[index]
        size = np.dtype(file.facts["dtype"]).itemsize
        separators = (self.description.bos_id, self.description.eos_id)
        if self.description.packing is Packing.document:
            starts = self._index(index).documents(start, stop + 1)
            numbers = np.arange(start, stop + 1)
            windows = list(zip(starts[:-1].tolist(), (starts[:-1] + np.diff(block.offsets)).tolist(), strict=True))
        else:
            begin = start * self.sequence_length
            starts, numbers = self._starts(index, begin, begin + int(block.offsets[-1]), block.tokens)
            windows = [
                (begin + low, begin + high)
                for low, high in zip(block.offsets[:-1].tolist(), block.offsets[1:].tolist(), strict=True)
            ]
        mark = "#" if "index" in file.facts else "@"
        names = [f"{file.name}{mark}{number}" for number in numbers.tolist()]
        for row, window in enumerate(windows):
            tokens = block.tokens[block.offsets[row] : block.offsets[row + 1]]
            found, first = document_spans(starts, names, file.name, window, tokens, separators)
            yield found, file.facts["begin"] + int(starts[first]) * size

    def _starts(self, index: int, begin: int, end: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the documents of tokens [begin, end) begin, the one before included, and what they are called by."""
        if "index" in self.description.files[index].facts:
            return self._index(index).starts(begin, end)
        if self.description.eos_id is None:
            starts = np.zeros(1, np.int64)
        else:
            inside = np.flatnonzero(tokens == self.description.eos_id) + begin + 1
            starts = np.array([self._start_before(index, begin), *inside], np.int64)
        return starts, starts

    def _start_before(self, index: int, begin: int) -> int:
        """Where the document that has token `begin` starts: after the last EOS before it, at most some blocks back."""
        limit = max(0, (begin // _SEARCH_TOKENS - 1) * _SEARCH_TOKENS)
        stop = begin
        while stop > limit:
            start = max(limit, stop - _STEP_TOKENS)
            found = np.flatnonzero(self._tokens(index, start, stop) == self.description.eos_id)
            if len(found):
                return start + int(found[-1]) + 1
            stop = start
        return limit

    def _tokens(self, index: int, begin: int, end: int) -> np.ndarray:
        return read_tokens(self.description.files[index], begin, end)

    def _index(self, index: int) -> Index:
        if index not in self._indices:
            self._indices.clear()
            self._indices[index] = Index.of_facts(self.description.files[index].facts)
        return self._indices[index]


def read_tokens(file: TokenFile, begin: int, end: int) -> np.ndarray:
    """Tokens [begin, end) of a file, in its own dtype."""
    dtype = np.dtype(file.facts["dtype"])
    first = file.facts["begin"]
    data = read_bytes(file.pieces, first + begin * dtype.itemsize, first + end * dtype.itemsize)
    if len(data) != (end - begin) * dtype.itemsize:
        raise CorpusError(f"{file.data.uri} ends before token {end}, which its description says it has; write it anew.")
    return np.frombuffer(data, dtype)
