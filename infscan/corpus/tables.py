"""Documents out of tables: Parquet, and Arrow's IPC files and streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from infscan.config import CorpusConfig
from infscan.corpus.arrow_messages import checked_messages, is_arrow_file
from infscan.corpus.files import name_below
from infscan.corpus.parquet_pages import CheckedPages
from infscan.corpus.rows import MAX_LINE_BYTES, Document, document_of, heads_of
from infscan.corpus.splits import FileRange
from infscan.corpus.tally import Tally
from infscan.errors import BadDocumentError, BadFileError, CorpusError

_READ_BYTES = 1 << 20
# Few rows at a time: a dictionary can make every one of them as long as the longest.
_ROWS_PER_BATCH = 16
_LARGE_COLUMN = 64 << 20


class _TooLongError(Exception):
    """A cell is longer than any document may be."""


# Rows, with the names of all the file's columns.
_Batch = tuple[pa.RecordBatch, tuple[str, ...]]


def read_parquet(
    uri: str, stream: BinaryIO, config: CorpusConfig, tally: Tally, stretch: FileRange
) -> Iterator[Document]:
    yield from _documents("Parquet", uri, _parquet_batches(uri, stream, config, stretch), config, tally, stretch.start)


def read_arrow(uri: str, stream: BinaryIO, config: CorpusConfig, tally: Tally) -> Iterator[Document]:
    yield from _documents("Arrow", uri, _arrow_batches(uri, stream, config), config, tally, 0)


def _documents(
    name: str, uri: str, batches: Iterator[_Batch], config: CorpusConfig, tally: Tally, row: int
) -> Iterator[Document]:
    """A document per row, from number `row` on; every error of reading the table, `name`, says after which row."""
    try:
        for batch, fields in batches:
            for index in range(batch.num_rows):
                row += 1
                tally.records += 1
                try:
                    document = _from_row(uri, row - 1, batch, index, fields, config)
                except BadDocumentError as error:
                    tally.leave_out(error)
                else:
                    yield document
    except (pa.ArrowException, OSError, EOFError, MemoryError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise BadFileError(
            f"{uri}, after row {row}: not {name}, truncated or corrupt ({reason}); copy the file again."
        ) from error


def _parquet_batches(uri: str, stream: BinaryIO, config: CorpusConfig, stretch: FileRange) -> Iterator[_Batch]:
    pages = CheckedPages(uri, stream)
    with pq.ParquetFile(pages, buffer_size=_READ_BYTES, page_checksum_verification=True) as parquet:
        metadata = parquet.metadata
        columns, fields = _columns(uri, parquet.schema_arrow.names, config), _fields(parquet.schema_arrow)
        rows = _rows_per_batch(metadata, columns)
        stop = metadata.num_rows if stretch.stop is None else stretch.stop
        first = 0
        for group in range(metadata.num_row_groups):
            after = first + metadata.row_group(group).num_rows
            if first < stop and after > stretch.start:
                at = first
                repeats = pages.watch(metadata.row_group(group), columns)
                at_once = 1 if repeats else rows
                # Without threads, which would decode batches ahead.
                for batch in parquet.iter_batches(at_once, row_groups=[group], columns=columns, use_threads=False):
                    begin, end = max(stretch.start - at, 0), min(stop - at, batch.num_rows)
                    at += batch.num_rows
                    if end > begin:
                        yield batch.slice(begin, end - begin), fields
                    if at >= stop:
                        break
            first = after


def _arrow_batches(uri: str, stream: BinaryIO, config: CorpusConfig) -> Iterator[_Batch]:
    """An IPC file or stream, one record batch in memory at a time: a file is read as the stream that it holds."""
    is_file = is_arrow_file(stream)
    left = pa.ipc.open_file(stream).num_record_batches if is_file else 0
    with pa.ipc.open_stream(checked_messages(uri, stream, is_file=is_file)) as reader:
        columns, fields = _columns(uri, reader.schema.names, config), _fields(reader.schema)
        for batch in reader:
            batch.validate(full=True)
            yield batch.select(columns), fields
            left -= 1
    if is_file and left:
        raise EOFError(f"its footer lists {left} more record batches")


def _fields(schema: pa.Schema) -> tuple[str, ...]:
    """The names of all columns, those of objects in them dotted."""
    found: list[str] = []
    for column in schema:
        inner = list(column.type) if pa.types.is_struct(column.type) else []
        found += [f"{column.name}.{one.name}" for one in inner] or [column.name]
    return tuple(found)


def _columns(uri: str, names: list[str], config: CorpusConfig) -> list[str]:
    text = [column_of(field, names) for field in (config.text_field, config.tokens_field) if field]
    others = (config.id_field, config.source_field, config.prompt_field, config.mask_field)
    wanted = [*text, *(column_of(field, names) for field in others if field)]
    columns = list(dict.fromkeys(name for name in wanted if name is not None))
    if not any(text):
        raise CorpusError(
            f"{uri} has the columns {', '.join(map(repr, names[:10]))}, and no {config.text_field!r}; "
            "name one in corpus.text_field, or one with token ids in corpus.tokens_field."
        )
    for name in columns:
        if names.count(name) > 1:
            raise CorpusError(f"{uri} has the column {name!r} {names.count(name)} times; write it with distinct names.")
    return columns


def column_of(field: str, names: Sequence[str]) -> str | None:
    """The column that holds a field: of that name, or the object that a dotted path begins with."""
    return next((head for head in (field, *(head for head, _ in heads_of(field))) if head in names), None)


def _rows_per_batch(metadata: pq.FileMetaData, columns: list[str]) -> int:
    """One row at a time where a column is large and compressed beyond what text is: it may be a bomb."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            size = max(column.total_uncompressed_size, column.num_values)
            wanted = column.path_in_schema.partition(".")[0] in columns
            if wanted and size > _LARGE_COLUMN and size > 100 * column.total_compressed_size:
                return 1
    return _ROWS_PER_BATCH


def _plain(value: pa.Scalar) -> Any:
    """Raises _TooLongError for a text that is longer than any document, before it is copied."""
    inner = value.value if isinstance(value, pa.DictionaryScalar) else value
    if isinstance(inner, pa.BinaryScalar) and inner.is_valid and len(inner.as_buffer()) > MAX_LINE_BYTES:
        raise _TooLongError(f"it has {len(inner.as_buffer())} bytes, above {MAX_LINE_BYTES}")
    return dict(value.as_py() or ()) if isinstance(value, pa.MapScalar) else value.as_py()


def _from_row(
    uri: str, number: int, batch: pa.RecordBatch, index: int, fields: tuple[str, ...], config: CorpusConfig
) -> Document:
    where = f"{uri}, row {number}"
    row: dict[str, Any] = {}
    for name in batch.schema.names:
        value = batch.column(name)[index]
        try:
            # Token ids stay an Arrow array: turning them into Python numbers would cost more than all the rest.
            lists = (config.tokens_field, config.prompt_field, config.mask_field)
            row[name] = value.values if name in lists and isinstance(value, pa.ListScalar) else _plain(value)
        except UnicodeDecodeError as error:
            raise BadDocumentError(
                f"{where}: {name!r} is not UTF-8 at byte {error.start}; write the file again.", "not UTF-8"
            ) from None
        except _TooLongError as error:
            reason = f"{where}: {name!r} is too long ({error}); split the document."
            raise BadDocumentError(reason, "too long") from None
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise BadDocumentError(
                f"{where}: {name!r} cannot be read ({error}); fix or remove the row.", "not readable"
            ) from None
    return document_of(uri, where, f"{name_below(uri, config.path)}#{number}", number, row, config, fields)
