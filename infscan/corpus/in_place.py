"""Corpora of token ids that are scanned where they lie, without a copy: Megatron, npy arrays, MDS.

A small file, addressable.json, says how they are read: the files with sizes and tags, T, the packing, the fingerprint.
The fingerprint covers what can be known without reading terabytes: every file's name, size and header, and blocks of it
spread evenly from its first byte to its last.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from infscan.config import Attention, Packing
from infscan.corpus.files import check_same_file, file_name
from infscan.corpus.reading import AS_STORED, Reading
from infscan.corpus.sequences import Sequence, Span, TokenBlock, check_numbers, document_starts
from infscan.errors import ChangedCorpusError, CorpusError, StorageError
from infscan.storage import InputFile, Store, read_range, stamp_of
from infscan.storage.identity import Stamp
from infscan.storage.shapes import check_types

DESCRIPTION = "addressable.json"
SCHEMA_VERSION = 1
_RUN_TOKENS = 1 << 20  # decoded at a time
_GAP = 4  # so many sequences are rather read and dropped than asked for in a request of their own
_SAMPLE_BYTES = 4096
_SAMPLES = 4096  # of all files together, but at least two of each


@dataclass(frozen=True)
class TokenFile:
    """One file of token ids.

    sequences: how many it has. facts: what its format wants to know of it again. digests: `sampled_digest` of it, and
    of its index where it has one; empty in descriptions of infscan 0.1.
    """

    data: InputFile
    sequences: int
    tokens: int
    facts: dict[str, Any]
    digests: tuple[str, ...] = ()
    # What ids and sources are made of: its path below corpus.path. Earlier versions took the file's name.
    label: str = ""

    @property
    def pieces(self) -> tuple[InputFile, ...]:
        """The files whose bytes, one after another, are the token ids: the one, or all that it was cut into."""
        cut = self.facts.get("pieces")
        return tuple(InputFile(**one) for one in cut) if cut else (self.data,)

    @property
    def name(self) -> str:
        return self.label or file_name(self.data.uri)

    @property
    def sources(self) -> tuple[InputFile, ...]:
        """The files of its token ids, and its index."""
        index = self.facts.get("index")
        return (*self.pieces, *([InputFile(**index)] if index else ()))


@dataclass(frozen=True)
class Description:
    """The content of addressable.json for token arrays."""

    format: str
    packing: Packing
    sequence_length: int
    vocab_size: int
    eos_id: int | None
    bos_id: int | None
    documents: int | None
    tokens_truncated: int
    fingerprint: str
    files: tuple[TokenFile, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self), "packing": self.packing.value}

    @classmethod
    def from_json(cls, value: Any, where: str) -> Description:
        """Raises CorpusError for another schema version, or what is no description."""
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != SCHEMA_VERSION:
            raise CorpusError(
                f"{where} has schema version {version!r} and this infscan reads {SCHEMA_VERSION}; remove it, and it is "
                "written again."
            )
        try:
            fields = {key: value[key] for key in cls.__dataclass_fields__}
            fields["packing"] = Packing(fields["packing"])
            fields["files"] = tuple(
                TokenFile(**(file | {"data": InputFile(**file["data"]), "digests": tuple(file.get("digests", ()))}))
                for file in fields["files"]
            )
            found = cls(**fields)
            check_types(found, cls)
            if min(found.sequence_length, found.vocab_size, len(found.files)) < 1:
                raise ValueError("it has no sequences")
            for number, file in enumerate(found.files):
                _check_facts(found.format, file.facts, f"files.{number}.facts")
            return found
        except (KeyError, TypeError, ValueError) as error:
            raise CorpusError(
                f"{where} describes no corpus ({error!r}); remove it, and it is written again."
            ) from error


# What files of each format have, and the types of whatever they may have.
_REQUIRED = {
    "npy": ("begin", "dtype"),
    "megatron": ("begin", "dtype", "index", "shape"),
    "mds": ("windows", "raw_bytes", "compressed", "samples", "names", "encodings", "sizes", "tokens_field"),
}
_FACTS: dict[str, Any] = {
    **dict.fromkeys(("begin", "windows", "raw_bytes", "samples"), int),
    **dict.fromkeys(("dtype", "tokens_field", "id_field", "source_field"), str | None),
    **dict.fromkeys(("uneven", "compressed"), bool),
    **dict.fromkeys(("names", "encodings"), list[str]),
    "sizes": list[int],
}


def _check_facts(kind: str, facts: Mapping[str, Any], where: str) -> None:
    """Raises KeyError, TypeError or ValueError for what no file of a format has."""
    for name in _REQUIRED[kind]:
        facts[name]
    for name, value in facts.items():
        check_types(value, _FACTS.get(name, Any), f"{where}.{name}")
    if facts.get("begin", 0) < 0 or facts.get("windows", 1) < 1:
        raise ValueError(f"{where} has a number below its least")
    if facts.get("dtype") is not None and np.dtype(facts["dtype"]).kind not in "iu":
        raise ValueError(f"{where}.dtype is {facts['dtype']!r}, which token ids do not have")
    if "shape" in facts:
        check_types(facts["shape"], Mapping[str, Any], f"{where}.shape")
    for one in [*facts.get("pieces", ()), *([facts["index"]] if "index" in facts else ())]:
        check_types(InputFile(**one), InputFile, where)


def sampled_digest(file: InputFile, files: int) -> str:
    """SHA-256 of a file's size and of blocks spread evenly over it; fewer where there are many files, two at least."""
    blocks = max(2, min(16, _SAMPLES // files))
    digest = sha256(str(file.size).encode())
    last = max(0, file.size - _SAMPLE_BYTES)
    starts = sorted({last * n // (blocks - 1) for n in range(blocks)})
    if file.size <= blocks * _SAMPLE_BYTES:
        digest.update(read_range(file.uri, 0, file.size))
        return digest.hexdigest()
    for start in starts:
        digest.update(read_range(file.uri, start, start + _SAMPLE_BYTES))
    return digest.hexdigest()


def read_bytes(pieces: tuple[InputFile, ...], start: int, stop: int) -> bytes:
    """Bytes [start, stop) of files that follow one another."""
    found: list[bytes] = []
    at = 0
    for piece in pieces:
        low, high = max(start - at, 0), min(stop - at, piece.size)
        if low < high:
            found.append(read_range(piece.uri, low, high))
        at += piece.size
    return found[0] if len(found) == 1 else b"".join(found)


class InPlace(ABC):
    """Token files numbered through. A format says what the tokens of a run of one file's sequences are, and whose."""

    def __init__(self, store: Store, description: Description, reading: Reading = AS_STORED) -> None:
        self.store = store
        self.description = description
        self.reading = reading
        self._forget()

    def _forget(self) -> None:
        sizes = [file.sequences for file in self.description.files]
        self._first = np.cumsum([0, *sizes], dtype=np.int64)
        # Of every file that was opened, by address: what it was when its content was looked at.
        self._stamps: dict[str, Stamp | None] = {}

    @abstractmethod
    def block(self, index: int, start: int, stop: int) -> TokenBlock:
        """The token ids of file `index`'s sequences [start, stop), as they are stored."""

    @abstractmethod
    def spans(self, index: int, start: int, stop: int, block: TokenBlock) -> Iterator[tuple[tuple[Span, ...], int]]:
        """Their documents, and the byte of the file at which the first document begins."""

    @property
    def _separators(self) -> tuple[int | None, int | None]:
        return self.description.bos_id, self.description.eos_id

    @property
    def sequences(self) -> int:
        return int(self._first[-1])

    @property
    def tokens(self) -> int:
        """Of MDS samples that may be uneven: as many as there are if all were like the first."""
        return sum(file.tokens for file in self.description.files)

    @property
    def sequence_length(self) -> int:
        return self.description.sequence_length

    @property
    def vocab_size(self) -> int:
        return self.description.vocab_size

    @property
    def fingerprint(self) -> str:
        return self.description.fingerprint

    @property
    def tokenizer(self) -> None:
        """Token arrays do not say which tokenizer made them."""
        return None

    @property
    def chosen(self) -> None:
        """Every number has a sequence."""
        return None

    @property
    def counts(self) -> dict[str, Any]:
        """documents_read is null where the format has no index of documents, tokens where samples say theirs alone."""
        truncated = self.description.tokens_truncated
        if any(file.facts.get("uneven") for file in self.description.files):
            return {"documents_read": None, "tokens_read": None, "sequences": self.sequences, "tokens": None}
        return {
            "documents_read": self.description.documents,
            "tokens_read": self.tokens + truncated,
            "tokens_truncated": truncated,
            "tokens_added": 0,
            "sequences": self.sequences,
            "tokens": self.tokens,
        }

    def read(self, ids: np.ndarray) -> list[Sequence]:
        ids = np.asarray(ids, np.int64)
        check_numbers(self.store.uri, ids, self.sequences)
        found: dict[int, Sequence] = {}
        touched: set[int] = set()
        with self._watching(touched):
            for index, wanted in self._runs(np.unique(ids)):
                touched.add(index)
                found |= self._sequences(index, wanted)
        return [found[int(number)] for number in ids]

    def _sequences(self, index: int, wanted: np.ndarray) -> dict[int, Sequence]:
        """Some of a file's sequences, by their numbers among all."""
        start, stop = int(wanted[0]), int(wanted[-1]) + 1
        block = self._checked_block(index, start, stop)
        first, path = int(self._first[index]), self.description.files[index].data.uri
        within, keep = self.reading.attention is Attention.within, set(wanted.tolist())
        found: dict[int, Sequence] = {}
        for row, (spans, offset) in enumerate(self.spans(index, start, stop, block)):
            if start + row in keep:
                tokens = block.tokens[block.offsets[row] : block.offsets[row + 1]].astype(np.int64)
                number = first + start + row
                starts = document_starts(tokens, spans, self._separators) if within else None
                found[number] = Sequence(number, tokens, spans, offset, path, starts=starts)
        return found

    @contextmanager
    def _watching(self, touched: set[int]) -> Iterator[None]:
        """Hold files to what they were, once they were read: of what is read before, nothing changes any more.

        What is wrong with a file that changed is that it changed.
        """
        try:
            yield
        except (CorpusError, StorageError):
            self._check_unchanged(touched)
            raise
        self._check_unchanged(touched)

    def _check_unchanged(self, touched: set[int]) -> None:
        for source in (source for index in sorted(touched) for source in self.description.files[index].sources):
            if source.uri in self._stamps and stamp_of(source.uri) != self._stamps[source.uri]:
                check_same_file(source)
                raise ChangedCorpusError(
                    f"{source.uri} was replaced or written to, with its size and times kept: it changed under the run; "
                    "run the same command again, which looks at its content anew."
                )

    def token_blocks(self, start: int, stop: int) -> Iterator[TokenBlock]:
        check_numbers(self.store.uri, np.array([start, stop - 1] if stop > start else [], np.int64), self.sequences)
        step = max(1, _RUN_TOKENS // self.sequence_length)
        while start < stop:
            index = int(np.searchsorted(self._first, start, side="right")) - 1
            first, after = int(self._first[index]), int(self._first[index + 1])
            end = min(stop, after, start + step)
            with self._watching({index}):
                block = self._checked_block(index, start - first, end - first)
            yield block
            start = end

    def _runs(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Ascending numbers as (file, its own numbers), cut where a gap or the room for decoded tokens says so."""
        step = max(1, _RUN_TOKENS // self.sequence_length)
        files = np.searchsorted(self._first, ids, side="right") - 1
        local = ids - self._first[files]
        begin = 0
        for at in range(1, len(ids) + 1):
            if (
                at == len(ids)
                or files[at] != files[begin]
                or local[at] - local[at - 1] > _GAP
                or local[at] - local[begin] >= step
            ):
                yield int(files[begin]), local[begin:at]
                begin = at

    def _checked_block(self, index: int, start: int, stop: int) -> TokenBlock:
        file = self.description.files[index]
        self._look_at(file)
        block = self.block(index, start, stop)
        self.check_vocabulary(file.data.uri, block.tokens)
        return block

    def _look_at(self, file: TokenFile) -> None:
        """Hold a file's content to what was described, when it is first opened. On an object store its ETag says it.

        Raises:
            ChangedCorpusError: where it is another.
        """
        for number, source in enumerate(file.sources):
            if source.uri in self._stamps:
                continue
            stamp = stamp_of(source.uri)
            check_same_file(source)
            on_disk = stamp is not None and stamp[3] is not None
            files = len(self.description.files)
            if on_disk and file.digests and sampled_digest(source, files) != file.digests[number]:
                raise ChangedCorpusError(
                    f"{source.uri} holds other tokens than when it was described, with its size and times kept: it "
                    "changed under the run; put the old file back, or start a new output."
                )
            self._stamps[source.uri] = stamp

    def check_vocabulary(self, uri: str, tokens: np.ndarray) -> None:
        """Raises CorpusError for a token id that the model does not have."""
        if len(tokens):
            check_vocabulary(uri, tokens, self.vocab_size)

    def close(self) -> None:
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"store": self.store, "description": self.description, "reading": self.reading}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def check_vocabulary(uri: str, tokens: np.ndarray, vocab_size: int) -> None:
    """Raises CorpusError for a token id that the model does not have."""
    for value in (int(tokens.min()), int(tokens.max())):
        if not 0 <= value < vocab_size:
            raise CorpusError(
                f"{uri} holds token id {value}, outside the vocabulary of {vocab_size} tokens; was it tokenised for "
                "another model, or is its dtype another (corpus.dtype)?"
            )


def document_spans(
    starts: np.ndarray,
    names: list[str],
    source: str,
    window: tuple[int, int],
    tokens: np.ndarray,
    separators: tuple[int | None, int | None],
) -> tuple[tuple[Span, ...], int]:
    """The documents of one window, without their separators, and which of `starts` the first one is.

    starts: int64, ascending: where documents begin; the first at or before the window, the last perhaps at its end.
    window: [begin, end) in the same count. separators: (BOS, EOS) token ids, None if there is none.
    """
    begin, end = window
    low = int(np.searchsorted(starts, begin, side="right")) - 1
    high = int(np.searchsorted(starts, end, side="left"))
    bos_id, eos_id = separators
    found: list[tuple[int, Span]] = []
    for at in range(low, high):
        after = int(starts[at + 1]) if at + 1 < len(starts) else None
        first = max(int(starts[at]), begin)
        last = end if after is None else min(after, end)
        if last > first and last == after and tokens[last - 1 - begin] == eos_id:
            last -= 1
        if last > first and first == starts[at] and tokens[first - begin] == bos_id:
            first += 1
        if last > first:
            found.append((at, Span(names[at], source, first - begin, last - begin)))
    if not found:
        return (Span(names[low], source, 0, 0),), low
    return tuple(span for _, span in found), found[0][0]
