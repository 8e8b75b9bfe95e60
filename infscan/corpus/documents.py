"""Read documents from JSONL (plain, gzip, zstd) and Parquet as a stream, and say exactly where a bad one lies."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from infscan.config import CorpusConfig
from infscan.errors import CorpusError
from infscan.storage import InputFile, open_input

MAX_LINE_BYTES = 64 << 20
_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
_COMPRESSIONS = (".gz", ".zst")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_READ_BYTES = 1 << 20
_ROWS_PER_BATCH = 1024


@dataclass(frozen=True, eq=False)
class Document:
    """One document: its text, or its token ids (int [n]) where the corpus brings them.

    `offset` is the byte of the decompressed stream where its line starts (JSONL), or its row number from 0 (Parquet).
    """

    id: str
    source: str
    text: str | None
    token_ids: np.ndarray | None
    path: str
    offset: int


def read_documents(
    file: InputFile, config: CorpusConfig, *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Document]:
    """Stream the documents of one file, empty ones included.

    A row without an id gets `<file name>#<line or row>` (lines count from 1, rows from 0), one without a source the
    file's name.

    Raises:
        CorpusError: with the file, the line or row and the mend, for anything that is not a document.
    """
    with open_input(file.uri) as stream:
        _check_unchanged(file, stream)
        if file_format(file.uri, config.format) == "parquet":
            yield from _read_parquet(file.uri, stream, config)
        else:
            yield from _read_jsonl(file.uri, stream, config, max_line_bytes)


def file_format(uri: str, setting: str = "auto") -> str:
    """`jsonl` or `parquet`: the setting, or what the file's suffix says.

    Raises:
        CorpusError: for an unknown setting or suffix.
    """
    if setting != "auto":
        if setting not in _SUFFIXES.values():
            raise CorpusError(f"corpus.format={setting!r} is unknown; give auto, jsonl or parquet.")
        return setting
    name = uri
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    for suffix, kind in _SUFFIXES.items():
        if name.endswith(suffix):
            return kind
    raise CorpusError(
        f"{uri}: the suffix says nothing about the format; rename it ({', '.join(_SUFFIXES)}, JSONL also with "
        f"{' or '.join(_COMPRESSIONS)}), or set corpus.format to jsonl or parquet."
    )


def _check_unchanged(file: InputFile, stream: BinaryIO) -> None:
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if file.size is not None and size != file.size:
        raise CorpusError(
            f"{file.uri} has {size} bytes now and had {file.size} when the corpus was listed: it changed under the "
            "run; put the old file back, or start a new output."
        )


def _file_name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


# JSONL


def _read_jsonl(uri: str, stream: BinaryIO, config: CorpusConfig, max_line_bytes: int) -> Iterator[Document]:
    lines = _decompressed(uri, stream)
    offset = 0
    number = 0
    while True:
        number += 1
        where = f"{uri}, line {number}"
        try:
            line = lines.readline(max_line_bytes + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise CorpusError(
                f"{where}: the compressed stream is truncated or corrupt ({error}); copy the file again."
            ) from error
        if not line:
            return
        if len(line) > max_line_bytes:
            raise CorpusError(
                f"{where} is longer than {max_line_bytes} bytes: is the file JSONL, one object per line? "
                "Split longer documents."
            )
        if not line.isspace():
            yield _from_json(uri, number, offset, line, config)
        offset += len(line)


def _decompressed(uri: str, stream: BinaryIO) -> BinaryIO:
    if not uri.endswith(_COMPRESSIONS):
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), _READ_BYTES))
    if not stream.read(1):
        raise CorpusError(f"{uri} is empty, and a compressed file never is: it was cut off; copy the file again.")
    stream.seek(0)
    if uri.endswith(".gz"):
        return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=stream), _READ_BYTES))
    return cast(BinaryIO, io.BufferedReader(_ZstdReader(stream), _READ_BYTES))


class _ZstdReader(io.RawIOBase):
    """Decompress concatenated zstd frames; EOFError where the last one is cut off.

    zstandard's own stream reader ends quietly in the middle of a frame, which would lose documents without a word.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._context = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            if not self._compressed:
                # Small bites: one that expands a thousandfold must still fit in memory.
                self._compressed = self._stream.read(1 << 16)
                if not self._compressed:
                    if self._frame is not None:
                        raise EOFError("it ends in the middle of a frame")
                    return 0
            if self._frame is None:
                self._frame = self._context.decompressobj()
            self._plain = memoryview(self._frame.decompress(self._compressed))
            self._compressed = b""
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count


def _from_json(uri: str, number: int, offset: int, line: bytes, config: CorpusConfig) -> Document:
    where = f"{uri}, line {number}"
    try:
        row = json.loads(line.decode("utf-8"))
        if _SURROGATE.search(line):
            # JSON can spell half a surrogate pair, which no tokenizer and no Parquet file can hold.
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{where}: byte {error.start} of the line is not UTF-8; convert the file, or give a compressed one its "
            "suffix (.gz, .zst)."
        ) from None
    except UnicodeEncodeError:
        raise CorpusError(f"{where}: half a surrogate pair (\\ud800 to \\udfff) is no character; remove it.") from None
    except RecursionError:
        raise CorpusError(f"{where}: nested too deeply to be read; a row is a flat object with a text.") from None
    except ValueError as error:
        raise CorpusError(f"{where} is not JSON ({error}); mend or remove the line.") from None
    if not isinstance(row, dict):
        raise CorpusError(f"{where} is {_kind(row)}, not an object; write one JSON object per line.")
    return _document(uri, where, number, offset, row, config)


# Parquet


def _read_parquet(uri: str, stream: BinaryIO, config: CorpusConfig) -> Iterator[Document]:
    row_number = 0
    try:
        with pq.ParquetFile(stream, buffer_size=_READ_BYTES, page_checksum_verification=True) as parquet:
            names = parquet.schema_arrow.names
            wanted = (config.text_field, config.id_field, config.source_field, config.tokens_field)
            columns = [name for name in dict.fromkeys(wanted) if name in names]
            if config.text_field not in columns and config.tokens_field not in columns:
                raise CorpusError(
                    f"{uri} has the columns {', '.join(names[:10])}, and no {config.text_field!r}; "
                    "name one in corpus.text_field, or one with token ids in corpus.tokens_field."
                )
            for batch in parquet.iter_batches(batch_size=_ROWS_PER_BATCH, columns=columns):
                for index in range(batch.num_rows):
                    yield _from_row(uri, row_number, batch, index, config)
                    row_number += 1
    except (pa.ArrowException, OSError, EOFError) as error:
        raise CorpusError(
            f"{uri}, after row {row_number}: not Parquet, truncated or corrupt ({error}); copy the file again."
        ) from error


def _from_row(uri: str, number: int, batch: pa.RecordBatch, index: int, config: CorpusConfig) -> Document:
    where = f"{uri}, row {number}"
    row: dict[str, Any] = {}
    for name in batch.schema.names:
        value = batch.column(name)[index]
        try:
            # Token ids stay an Arrow array: turning them into Python numbers would cost more than all the rest.
            row[name] = (
                value.values if name == config.tokens_field and isinstance(value, pa.ListScalar) else value.as_py()
            )
        except UnicodeDecodeError as error:
            raise CorpusError(f"{where}: {name!r} is not UTF-8 at byte {error.start}; write the file again.") from None
    return _document(uri, where, number, number, row, config)


# Both


def _document(uri: str, where: str, number: int, offset: int, row: dict[str, Any], config: CorpusConfig) -> Document:
    text: str | None = None
    token_ids: np.ndarray | None = None
    if config.tokens_field is not None and row.get(config.tokens_field) is not None:
        token_ids = _token_ids(where, config.tokens_field, row[config.tokens_field])
    else:
        text = _text(where, row, config)
    return Document(
        id=_label(where, row, config.id_field, f"{_file_name(uri)}#{number}"),
        source=_label(where, row, config.source_field, _file_name(uri)),
        text=text,
        token_ids=token_ids,
        path=uri,
        offset=offset,
    )


def _text(where: str, row: dict[str, Any], config: CorpusConfig) -> str:
    text = row.get(config.text_field)
    if isinstance(text, str):
        return text
    if config.text_field in row:
        raise CorpusError(f"{where}: {config.text_field!r} is {_kind(text)}, not a text; mend or remove the row.")
    fields = ", ".join(map(repr, list(row)[:10])) or "none"
    neither = f" nor {config.tokens_field!r}" if config.tokens_field else ""
    raise CorpusError(
        f"{where} has no field {config.text_field!r}{neither}; it has {fields}. Name the text's field in "
        "corpus.text_field, or the token ids' in corpus.tokens_field."
    )


def _label(where: str, row: dict[str, Any], field: str, missing: str) -> str:
    value = row.get(field)
    if value is None:
        return missing
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise CorpusError(f"{where}: {field!r} is {_kind(value)}; give a text or a whole number, or leave it out.")


def _token_ids(where: str, field: str, value: Any) -> np.ndarray:
    """int [n] in whatever width holds them; whether they lie in the vocabulary is the packer's question."""
    if isinstance(value, pa.Array):
        if not len(value):
            return np.empty(0, np.int64)
        if not pa.types.is_integer(value.type) or value.null_count:
            kind = "empty values" if value.null_count else f"values of type {value.type}"
            raise CorpusError(f"{where}: {field!r} holds {kind}; token ids are whole numbers.")
        return value.to_numpy(zero_copy_only=False)
    if not isinstance(value, list):
        raise CorpusError(f"{where}: {field!r} is {_kind(value)}, not a list of token ids; mend or remove the row.")
    for position, token in enumerate(value):
        if type(token) is not int:
            raise CorpusError(
                f"{where}: {field!r} holds {repr(token)[:40]} at position {position}; token ids are whole numbers."
            )
    try:
        return np.array(value, np.int64)
    except OverflowError:
        raise CorpusError(f"{where}: {field!r} holds a number beyond 64 bits; is it a list of token ids?") from None


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")
