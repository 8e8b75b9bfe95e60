"""The documents of token arrays, to be prepared: Megatron's by its index, npy's by EOS, MDS's a sample each.

A document keeps its trailing EOS, which packing does not double. A stretch is bytes of the file: the documents whose
first token is in it; MDS shards are read whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from infscan.config import CorpusConfig
from infscan.corpus import mds, megatron, npy
from infscan.corpus.files import name_below
from infscan.corpus.rows import MAX_LINE_BYTES, Document
from infscan.corpus.splits import FileRange
from infscan.corpus.tally import Tally
from infscan.errors import BadDocumentError, CorpusError
from infscan.storage import InputFile, look_up, read_range

# What is beside the files of tokens and holds none.
INDICES = (".idx", f"/{mds.INDEX}")
_BLOCK_TOKENS = 1 << 20
_BLOCK_DOCUMENTS = 1024


def read_array_documents(
    kind: str, file: InputFile, config: CorpusConfig, tally: Tally, stretch: FileRange
) -> Iterator[Document]:
    """Documents of token ids, or of MDS's text where corpus.tokens_field names no column.

    Raises:
        CorpusError: for a file that is damaged, or npy without an EOS (corpus.eos_id) to tell its documents by.
    """
    if kind == "mds":
        yield from _samples(file, config, tally)
        return
    found = _indexed(file, stretch) if kind == "megatron" else _separated(file, config, stretch)
    name = name_below(file.uri, config.path)
    for label, offset, tokens in found:
        tally.records += 1
        if len(tokens) > MAX_LINE_BYTES:
            where = f"{file.uri}: the document at byte {offset}"
            tally.leave_out(BadDocumentError(f"{where} has more than {MAX_LINE_BYTES} tokens; split it.", "too long"))
            continue
        yield Document(f"{name}{label}", name, None, tokens, file.uri, offset)


def _indexed(file: InputFile, stretch: FileRange) -> Iterator[tuple[str, int, np.ndarray]]:
    stem = file.uri.removesuffix(".bin")
    beside = look_up(f"{stem}.idx")
    if beside is None and megatron.is_piece(file.uri):
        raise CorpusError(
            f"{file.uri} is a piece of a data set with one index; it is read where it is, so leave "
            "corpus.in_place=true, or join the pieces first."
        )
    if beside is None:
        raise CorpusError(f"{stem}.idx is missing: Megatron's tokens (.bin) and index (.idx) go together.")
    shape = megatron.read_header(beside)
    index = megatron.Index(beside, shape)
    dtype = np.dtype(shape.dtype)
    if index.tokens() * dtype.itemsize != file.size:
        raise CorpusError(
            f"{file.uri} has {file.size} bytes, and its index says {index.tokens() * dtype.itemsize}: one of the two "
            "was cut off or belongs to another; copy both again."
        )
    documents = shape.indices - 1
    number = _first_from(index, documents, -(-stretch.start // dtype.itemsize))
    end = documents
    if stretch.stop is not None:
        end = _first_from(index, documents, -(-stretch.stop // dtype.itemsize))
    for start in range(number, end, _BLOCK_DOCUMENTS):
        starts = index.documents(start, min(start + _BLOCK_DOCUMENTS, end) + 1)
        if (np.diff(starts) < 0).any():
            raise CorpusError(f"{beside.uri}: documents begin before their predecessors; write the index again.")
        for at, (low, high) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True), start):
            data = read_range(file.uri, low * dtype.itemsize, high * dtype.itemsize)
            yield f"#{at}", low * dtype.itemsize, np.frombuffer(data, dtype)


def _first_from(index: megatron.Index, documents: int, token: int) -> int:
    """The first document that begins at or after a token; empty ones before it included."""
    low, high = 0, documents
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if int(index.documents(middle, middle + 1)[0]) >= token else (middle + 1, high)
    return low


def _separated(file: InputFile, config: CorpusConfig, stretch: FileRange) -> Iterator[tuple[str, int, np.ndarray]]:
    if config.eos_id is None:
        raise CorpusError(
            f"{file.uri}: npy arrays have no index of documents, and no EOS token is known to tell them by; set "
            "corpus.eos_id."
        )
    # A vocabulary of 1 << 16 says uint16; whoever asks has said corpus.dtype where it is larger.
    tokens, facts = npy.read_layout(file, config.dtype, 1 << 16, 1)
    begin, dtype = facts["begin"], np.dtype(facts["dtype"])
    npy.check_dtype(file, begin, tokens, facts["dtype"])

    def token_at(byte: int) -> int:
        return min(tokens, max(0, -(-(byte - begin) // dtype.itemsize)))

    first = token_at(stretch.start)
    stop = tokens if stretch.stop is None else token_at(stretch.stop)
    # From the token before: where that one is EOS, a document begins at `first` itself.
    at = max(first - 1, 0)
    start: int | None = 0 if first == 0 < stop else None
    held: list[np.ndarray] = []
    while at < tokens and not (start is None and at >= stop):
        after = min(at + _BLOCK_TOKENS, tokens)
        block = np.frombuffer(read_range(file.uri, begin + at * dtype.itemsize, begin + after * dtype.itemsize), dtype)
        low = 0
        for end in (np.flatnonzero(block == config.eos_id) + 1).tolist():
            if start is not None:
                yield f"@{start}", begin + start * dtype.itemsize, np.concatenate([*held, block[low:end]])
            held, low = [], end
            start = at + end if at + end < stop else None
            if start is None and at + end >= stop:
                return
        if start is not None and low < len(block):
            held.append(block[low:])
            if sum(map(len, held)) > MAX_LINE_BYTES:
                raise CorpusError(
                    f"{file.uri}: more than {MAX_LINE_BYTES} tokens from {start} on without EOS ({config.eos_id}); is "
                    "corpus.eos_id what its documents end with?"
                )
        at = after
    if start is not None and held:
        yield f"@{start}", begin + start * dtype.itemsize, np.concatenate(held)


def _samples(file: InputFile, config: CorpusConfig, tally: Tally) -> Iterator[Document]:
    name = name_below(file.uri, config.path)
    index, shard = mds.read_shard(file)
    column = config.tokens_field or config.text_field
    encoding = shard.encoding(column)
    if encoding is None:
        raise CorpusError(
            f"{index.uri} has the columns {', '.join(shard.names)}, and no {column!r}; name one in corpus.tokens_field "
            "or corpus.text_field."
        )
    reader = mds.ShardReader(shard)
    columns_of = {key: mds.label_column(shard, config, key) for key in ("id_field", "source_field")}
    for start in range(0, shard.samples, _BLOCK_DOCUMENTS):
        samples = reader.samples(start, min(start + _BLOCK_DOCUMENTS, shard.samples))
        for number, (offset, columns) in enumerate(samples, start):
            where = f"{file.uri}, sample {number}"

            def label(key: str, missing: str, where: str = where, columns: dict[str, bytes] = columns) -> str:
                own = columns_of[key]
                return missing if own is None else mds.text_of(where, shard.encoding(own), columns[own])

            tokens = text = None
            if config.tokens_field:
                tokens = mds.token_ids(where, encoding, columns[column], config.dtype)
            else:
                text = mds.text_of(where, encoding, columns[column])
            tally.records += 1
            yield Document(
                label("id_field", f"{name}#{number}"), label("source_field", name), text, tokens, file.uri, offset
            )
