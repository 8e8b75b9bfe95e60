"""Pack documents into sequences of at most T tokens, and count what becomes of every token. Pure: no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import zip_longest

import numpy as np

from infscan.config import CorpusConfig, Packing
from infscan.corpus.rows import Document
from infscan.corpus.sequences import Sequence, Span
from infscan.corpus.tally import Tally
from infscan.errors import BadDocumentError, CorpusError


@dataclass
class Counts:
    """What was read and what became of it.

    Always: tokens_read + tokens_added - tokens_truncated == tokens, and of every file that was read
    records_blank + documents_bad + documents_duplicate + documents_read == records_read. A record is a line (JSONL) or
    a row (Parquet). `documents_duplicate` were dropped (corpus.deduplicate). `tokens_added` are separators (BOS, EOS);
    `documents_empty` had no token and are in no sequence. `documents_spanning` have a token that begins in the prompt
    and ends after it. `labels_aside` are ids and sources that are made up in place of what rows bring, or should. Of a
    bad file nothing is kept, and nothing else is counted. `files_aside` lie beside the data (licences, checksums).
    `tokens_masked` are those of the sequences' tokens whose prediction has no loss (prompts); a sequence of such alone
    scores 0.
    """

    files_read: int = 0
    files_bad: int = 0
    files_aside: int = 0
    records_read: int = 0
    records_blank: int = 0
    documents_bad: int = 0
    documents_duplicate: int = 0
    documents_read: int = 0
    documents_empty: int = 0
    documents_truncated: int = 0
    documents_spanning: int = 0
    labels_aside: int = 0
    tokens_read: int = 0
    tokens_truncated: int = 0
    tokens_added: int = 0
    sequences: int = 0
    tokens: int = 0
    tokens_masked: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Counts)})


@dataclass(frozen=True)
class Lengths:
    """How long documents are, before they are packed or cut: counts[b] have from 2^(b-1) up to 2^b - 1 tokens."""

    counts: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, bins: Counter[int]) -> Lengths:
        return cls([bins[b] for b in range(max(bins, default=-1) + 1)])

    def __add__(self, other: Lengths) -> Lengths:
        return Lengths([one + two for one, two in zip_longest(self.counts, other.counts, fillvalue=0)])

    def to_json(self) -> dict[str, int]:
        """By the shortest and longest length of each bin: {"0": 3, "1": 0, "2-3": 5, "4-7": 1, ...}."""
        names = ["0", "1", *(f"{1 << b}-{(2 << b) - 1}" for b in range(1, len(self.counts)))]
        return dict(zip(names, self.counts, strict=False))


@dataclass(frozen=True)
class PackSettings:
    """How documents become sequences: T, the vocabulary's size, and the separators; `bos_id` None puts none.

    masked: whether some documents' tokens have no loss; sequences then say which have one. EOS has one, BOS has none.
    """

    packing: Packing
    sequence_length: int
    vocab_size: int
    eos_id: int | None = None
    bos_id: int | None = None
    masked: bool = False


def pack_settings(
    config: CorpusConfig, sequence_length: int, vocab_size: int, eos_id: int | None, bos_id: int | None
) -> PackSettings:
    """The corpus's packing with the model's own ids; `sequence_length` is T after the model's limit is known.

    Raises:
        CorpusError: if a separator is needed that the model does not have.
    """
    concat = config.packing is Packing.concat
    if concat and eos_id is None:
        raise CorpusError(
            "corpus.packing=concat joins documents with EOS, and neither the tokenizer nor the model's config names "
            "one; add eos_token_id to the model's config.json, or use corpus.packing=document."
        )
    if config.bos and bos_id is None:
        raise CorpusError(
            "corpus.bos=true, and neither the tokenizer nor the model's config names a BOS token; add bos_token_id to "
            "the model's config.json, or set corpus.bos=false."
        )
    for name, value in (("eos", eos_id if concat else None), ("bos", bos_id if config.bos else None)):
        if value is not None and not 0 <= value < vocab_size:
            raise CorpusError(
                f"{name}_token_id {value} is outside the model's vocabulary of {vocab_size} tokens; "
                "fix the model's config.json or tokenizer."
            )
    return PackSettings(
        packing=config.packing,
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        eos_id=eos_id if concat else None,
        bos_id=bos_id if config.bos else None,
        masked=config.masked,
    )


class Packer:
    """Packs one file's documents; the sequences are numbered from 0. Afterwards `counts` says what happened.

    `document`: [BOS?] doc, one sequence each, cut at T. `concat`: [BOS?] doc EOS [BOS?] doc EOS ... cut every T tokens,
    the shorter tail of the file kept. A BOS or EOS that a document brings itself is not doubled.
    """

    def __init__(self, settings: PackSettings, tally: Tally | None = None) -> None:
        """tally: says how many bad documents may be left out (None: none)."""
        self.settings = settings
        self.tally = Tally() if tally is None else tally
        self.counts = Counts()
        self._lengths: Counter[int] = Counter()
        separators = (settings.bos_id, settings.eos_id if settings.packing is Packing.concat else None)
        self._before, self._after = (np.array([t for t in (i,) if t is not None], np.int64) for i in separators)

    def pack(self, documents: Iterable[Document]) -> Iterator[Sequence]:
        """Yield the sequences of documents that carry token ids (int [n]), in order, reading no further than needed.

        Raises:
            BadDocumentError: for a token id outside the vocabulary, with the document's id and the value.
        """
        concat = self.settings.packing is Packing.concat
        room = self.settings.sequence_length
        pieces = _Pieces()
        for document in documents:
            try:
                tokens, loss = self._own(document)
            except BadDocumentError as error:
                self.tally.leave_out(error)
                continue
            self.counts.documents_read += 1
            self.counts.tokens_read += len(tokens)
            self.counts.documents_spanning += document.spans
            self.counts.labels_aside += document.aside
            self._lengths[len(tokens).bit_length()] += 1
            if not len(tokens):
                self.counts.documents_empty += 1
                continue
            stream = np.concatenate([self._before, tokens, self._after])
            own = len(self._before), len(self._before) + len(tokens)
            self.counts.tokens_added += len(self._before) + len(self._after)
            if not concat:
                kept = min(room, len(stream))
                self.counts.documents_truncated += kept < len(stream)
                self.counts.tokens_truncated += len(stream) - kept
                pieces.add(document, stream, loss, 0, kept, own)
                yield self._sequence(pieces)
                pieces = _Pieces()
                continue
            begin = 0
            while begin < len(stream):
                end = min(len(stream), begin + room - pieces.length)
                pieces.add(document, stream, loss, begin, end, own)
                begin = end
                if pieces.length == room:
                    yield self._sequence(pieces)
                    pieces = _Pieces()
        if pieces.length:
            yield self._sequence(pieces)

    @property
    def lengths(self) -> Lengths:
        """Of the documents that were read."""
        return Lengths.of(self._lengths)

    def _own(self, document: Document) -> tuple[np.ndarray, np.ndarray | None]:
        """A document's tokens without separators that it brings itself, which are put back once; and which tokens of
        its stream have a loss (bool; None where nothing is masked)."""
        tokens = self._checked(document)
        loss = np.ones(len(tokens), np.bool_) if document.loss is None else document.loss
        ends = len(self._after) and len(tokens) and tokens[-1] == self._after[0]
        after = loss[-1:] if ends else np.ones(len(self._after), np.bool_)
        tokens, loss = (tokens[:-1], loss[:-1]) if ends else (tokens, loss)
        if len(self._before) and len(tokens) and tokens[0] == self._before[0]:
            tokens, loss = tokens[1:], loss[1:]
        before = np.zeros(len(self._before), np.bool_)
        return tokens, np.concatenate([before, loss, after]) if self.settings.masked else None

    def _checked(self, document: Document) -> np.ndarray:
        tokens = document.token_ids
        assert tokens is not None, f"document {document.id} reached the packer without token ids"
        for value in (int(tokens.min()), int(tokens.max())) if len(tokens) else ():
            if not 0 <= value < self.settings.vocab_size:
                raise BadDocumentError(
                    f"{document.path}: document {document.id!r} (at {document.offset}) has token id {value}, outside "
                    f"the vocabulary of {self.settings.vocab_size} tokens; was the corpus tokenised for another model?",
                    "token outside the vocabulary",
                )
        return tokens.astype(np.int64, copy=False)

    def _sequence(self, pieces: _Pieces) -> Sequence:
        loss = np.concatenate(pieces.losses) if self.settings.masked else None
        self.counts.tokens_masked += 0 if loss is None else int((~loss).sum())
        number = self.counts.sequences
        self.counts.sequences += 1
        self.counts.tokens += pieces.length
        first = next((d for d, span in pieces.spans if span.end > span.start), pieces.spans[0][0])
        spans = tuple(span for _, span in pieces.spans if span.end > span.start)
        return Sequence(
            sequence_id=number,
            token_ids=np.concatenate(pieces.tokens),
            documents=spans or (pieces.spans[0][1],),
            byte_offset=first.offset,
            path=first.path,
            loss=loss,
        )


class _Pieces:
    """The parts of documents that make up the sequence being filled."""

    def __init__(self) -> None:
        self.length = 0
        self.tokens: list[np.ndarray] = []
        self.losses: list[np.ndarray] = []
        self.spans: list[tuple[Document, Span]] = []

    def add(
        self,
        document: Document,
        stream: np.ndarray,
        loss: np.ndarray | None,
        begin: int,
        end: int,
        own: tuple[int, int],
    ) -> None:
        """Append stream[begin:end], and the loss's where there is one.

        own: the document's own range in the stream, no separators.
        """
        start = self.length + max(begin, own[0]) - begin
        stop = self.length + min(end, own[1]) - begin
        span = (
            Span(document.id, document.source, start, stop)
            if stop > start
            else Span(document.id, document.source, 0, 0)
        )
        self.tokens.append(stream[begin:end])
        if loss is not None:
            self.losses.append(loss[begin:end])
        self.spans.append((document, span))
        self.length += end - begin
