"""Megatron's indexed datasets: name.bin holds the tokens, name.idx says where sequences and documents begin.

name.idx: b"MMIDIDX\\0\\0", version (u64, 1), dtype code (u8), numbers of sequences n and document indices d (u64 each);
then n lengths (i32), n pointers into name.bin in bytes (i64), and d document indices (i64): document j is the sequences
[d[j], d[j + 1]). Everything little-endian. Only the parts of the index that a window needs are read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from infscan.errors import CorpusError
from infscan.storage import InputFile, look_up, read_range

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_BLOCK = 4096


@dataclass(frozen=True)
class Shape:
    """An index's header: dtype of the tokens, sequences, document indices."""

    dtype: str
    sequences: int
    indices: int


def read_header(index: InputFile) -> Shape:
    """The index's header.

    Raises:
        CorpusError: for a file that is no Megatron index, is cut off, or holds something else than token ids.
    """
    data = read_range(index.uri, 0, min(index.size, _HEADER.size))
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise CorpusError(f"{index.uri} is no Megatron index (it does not begin with MMIDIDX); is it another .idx?")
    _, version, code, sequences, indices = _HEADER.unpack(data)
    if version != 1:
        raise CorpusError(f"{index.uri} has version {version}, and infscan reads version 1; write it again.")
    if code not in _DTYPES:
        raise CorpusError(f"{index.uri} has dtype code {code}, which is none of token ids; write it again.")
    expected = _HEADER.size + 12 * sequences + 8 * indices
    # A multimodal index has a byte per sequence behind that.
    if index.size not in (expected, expected + sequences) or indices < 1:
        raise CorpusError(
            f"{index.uri} has {index.size} bytes, and its header says {expected}: it was cut off; copy it again."
        )
    return Shape(_DTYPES[code], sequences, indices)


class Index:
    """The starts of documents, found by bisection in ranged reads."""

    def __init__(self, file: InputFile, shape: Shape) -> None:
        self.file = file
        self.shape = shape
        self._itemsize = np.dtype(shape.dtype).itemsize
        self._probes: dict[tuple[str, int], int] = {}
        self._tokens: int | None = None

    def to_facts(self) -> dict[str, Any]:
        return {"index": asdict(self.file), "shape": asdict(self.shape), "dtype": self.shape.dtype, "begin": 0}

    @classmethod
    def of_facts(cls, facts: dict[str, Any]) -> Index:
        return cls(InputFile(**facts["index"]), Shape(**facts["shape"]))

    def tokens(self) -> int:
        """How many tokens the last pointer and length come to.

        Raises:
            CorpusError: where document indices do not run from 0 to the number of sequences.
        """
        if self._tokens is not None:
            return self._tokens
        n = self.shape.sequences
        ends = [int(self._read("indices", at, at + 1)[0]) for at in (0, self.shape.indices - 1)]
        if ends != [0, n]:
            raise CorpusError(
                f"{self.file.uri}: documents run from sequence {ends[0]} to {ends[1]} of {n}; write the index again."
            )
        last = int(self._read("pointers", n - 1, n)[0]) // self._itemsize if n else 0
        self._tokens = last + int(self._read("lengths", n - 1, n).sum()) if n else 0
        return self._tokens

    def lengths(self) -> Iterator[np.ndarray]:
        """Tokens per document, int64, in blocks."""
        for start in range(0, self.shape.indices - 1, 1 << 18):
            stop = min(start + (1 << 18), self.shape.indices - 1)
            yield np.diff(self.documents(start, stop + 1))

    def documents(self, start: int, stop: int) -> np.ndarray:
        """int64: the tokens at which documents [start, stop) begin; document `number of documents` is the end."""
        return self._begin(self._read("indices", start, stop))

    def starts(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Where the documents of tokens [begin, end) begin, from the one that has `begin` to a start at `end`.

        Returns (int64 tokens, int64 numbers of the documents).
        """
        sequence = self._last_at_most("pointers", self.shape.sequences, begin * self._itemsize)
        document = self._last_at_most("indices", self.shape.indices, sequence)
        starts = self.documents(document, document + 1)
        while starts[-1] < end and document + len(starts) < self.shape.indices:
            at = document + len(starts)
            starts = np.concatenate([starts, self.documents(at, min(at + _BLOCK, self.shape.indices))])
        if (np.diff(starts) < 0).any():
            raise CorpusError(f"{self.file.uri}: documents begin before their predecessors; write the index again.")
        kept = int(np.searchsorted(starts, end, side="right"))
        return starts[:kept], np.arange(document, document + kept)

    def _begin(self, sequences: np.ndarray) -> np.ndarray:
        """The tokens at which ascending sequences begin."""
        if not len(sequences):
            return np.empty(0, np.int64)
        low, high = int(sequences.min()), int(sequences.max())
        if low < 0 or high > self.shape.sequences:
            raise CorpusError(
                f"{self.file.uri} names sequence {low if low < 0 else high}, which it lacks; write it again."
            )
        pointers = self._read("pointers", low, min(high + 1, self.shape.sequences))
        if high == self.shape.sequences:
            pointers = np.append(pointers, self.tokens() * self._itemsize)
        return pointers[sequences - low] // self._itemsize

    def _last_at_most(self, kind: str, count: int, value: int) -> int:
        """The last position of an ascending column whose entry is at most `value`."""
        low, high = 0, count
        while high - low > _BLOCK:
            middle = (low + high) // 2
            key = (kind, middle)
            if key not in self._probes:
                self._probes[key] = int(self._read(kind, middle, middle + 1)[0])
            low, high = (middle, high) if self._probes[key] <= value else (low, middle)
        return low + int(np.searchsorted(self._read(kind, low, high), value, side="right")) - 1

    def _read(self, kind: str, start: int, stop: int) -> np.ndarray:
        n = self.shape.sequences
        at = _HEADER.size + {"lengths": 0, "pointers": 4 * n, "indices": 12 * n}[kind]
        dtype = np.dtype("<i4" if kind == "lengths" else "<i8")
        data = read_range(self.file.uri, at + start * dtype.itemsize, at + stop * dtype.itemsize)
        return np.frombuffer(data, dtype).astype(np.int64)


_PIECE = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.bin")


def is_piece(uri: str) -> bool:
    """Whether a .bin is one of several that have one index."""
    match = _PIECE.fullmatch(uri)
    return match is not None and look_up(f"{match[1]}.idx") is not None


def pieces_of(uris: Iterable[str]) -> dict[str, list[str]]:
    """By what they are pieces of: .bin files that were cut into `<stem>-00000-of-00020.bin`, as Pythia's are, in order.

    Raises:
        CorpusError: where one of them is missing.
    """
    found: dict[str, dict[int, str]] = {}
    counts: dict[str, int] = {}
    for uri in uris:
        if match := _PIECE.fullmatch(uri):
            # Whole data sets may be numbered in this way too: each then has an index of its own.
            if look_up(f"{uri.removesuffix('.bin')}.idx") is not None or not is_piece(uri):
                continue
            found.setdefault(match[1], {})[int(match[2])] = uri
            counts[match[1]] = int(match[3])
    for stem, pieces in found.items():
        # Some tools say how many there are, Pythia's the last one's number.
        missing = sorted(set(range(max(counts[stem], max(pieces) + 1))) - pieces.keys())
        if missing:
            raise CorpusError(
                f"{stem}-{missing[0]:05d}-of-{counts[stem]:05d}.bin is missing, a piece of what {stem}.idx lists; copy "
                "it too."
            )
    return {stem: [pieces[number] for number in sorted(pieces)] for stem, pieces in found.items()}
