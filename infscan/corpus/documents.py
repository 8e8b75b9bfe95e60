"""Read documents from JSONL and text (plain, gzip, zstd), Parquet and Arrow as a stream; say where a bad one lies."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infscan.config import CorpusConfig, TextRecords
from infscan.corpus.decompress import COMPRESSIONS, DAMAGES, damaged, decompressed
from infscan.corpus.files import check_same_file, file_name
from infscan.corpus.tally import Tally
from infscan.errors import BadDocumentError, BadFileError, CorpusError, StorageError
from infscan.storage import InputFile, expand, open_input

MAX_LINE_BYTES = 64 << 20
# Ids and sources are repeated in every sequence of their document.
MAX_LABEL_CHARACTERS = 4096
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".txt": "text",
}
_FORMATS = ("jsonl", "parquet", "arrow", "text")
# What datasets' save_to_disk writes beside its tables.
_BESIDE_ARROW = ("state.json", "dataset_info.json", "dataset_dict.json")
_ARROW_FILE = b"ARROW1"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_READ_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
# Few rows at a time: a dictionary can make every one of them as long as the longest.
_ROWS_PER_BATCH = 16
_LARGE_COLUMN = 64 << 20


@dataclass(frozen=True, eq=False)
class Document:
    """One document: its text, or its token ids (int [n]) where the corpus brings them.

    `prompt`: a text that comes before, without a loss (corpus.prompt_field). `loss`: bool [n], where it has one, of
    token ids that are not all of them in the loss; None where they are.
    `offset` is the byte of the decompressed stream where its line starts (JSONL, text), or its row from 0 (tables).
    """

    id: str
    source: str
    text: str | None
    token_ids: np.ndarray | None
    path: str
    offset: int
    prompt: str | None = None
    loss: np.ndarray | None = None


def read_documents(
    file: InputFile, config: CorpusConfig, tally: Tally | None = None, *, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Document]:
    """Stream the documents of one file, empty ones included.

    A row without an id gets `<file name>#<line or row>` (lines count from 1, rows from 0), one without a source the
    file's name. `tally` counts every line or row, and says how many bad documents may be left out (None: none).

    Raises:
        BadDocumentError: with the file, the line or row and the mend, for anything that is not a document.
        BadFileError: for a file that cannot be read to its end.
        CorpusError: for a file that is not the one that was listed, before or after reading it.
    """
    tally = Tally() if tally is None else tally
    check_same_file(file)
    try:
        with open_input(file.uri) as stream:
            kind = file_format(file.uri, config.format)
            if kind == "parquet":
                yield from _read_table("Parquet", file.uri, _parquet_batches(file.uri, stream, config), config, tally)
            elif kind == "arrow":
                yield from _read_table("Arrow", file.uri, _arrow_batches(file.uri, stream, config), config, tally)
            elif kind == "text":
                yield from _read_text(file.uri, stream, config, tally, max_line_bytes)
            else:
                yield from _read_jsonl(file.uri, stream, config, tally, max_line_bytes)
    except OSError as error:
        raise StorageError(
            f"{file.uri}, after record {tally.records}: {error}; check the disk or the store."
        ) from error
    check_same_file(file)


def document_files(config: CorpusConfig) -> list[InputFile]:
    """The files of a corpus of documents, in the order of their addresses.

    Beside Arrow tables, what datasets' save_to_disk and its caches leave in the folder is no document.

    Raises:
        StorageError: where nothing is there.
        CorpusError: where a file's format is unknown.
    """
    files = expand(config.path)
    if config.format == "auto" and any(file.uri.endswith(".arrow") for file in files):
        files = [file for file in files if not _is_beside_arrow(file_name(file.uri))]
    for file in files:
        file_format(file.uri, config.format)
    return files


def _is_beside_arrow(name: str) -> bool:
    return name in _BESIDE_ARROW or (name.startswith("cache-") and name.endswith(".arrow"))


def file_format(uri: str, setting: str = "auto") -> str:
    """`jsonl`, `parquet`, `arrow` or `text`: the setting, or what the file's suffix says.

    Raises:
        CorpusError: for an unknown setting or suffix.
    """
    if setting != "auto":
        if setting not in _FORMATS:
            raise CorpusError(f"corpus.format={setting!r} is unknown; give auto, {', '.join(_FORMATS)}.")
        return setting
    name = uri
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    for suffix, kind in _SUFFIXES.items():
        if name.endswith(suffix):
            return kind
    raise CorpusError(
        f"{uri}: the suffix says nothing about the format; rename it ({', '.join(_SUFFIXES)}, JSONL and text also with "
        f"{' or '.join(COMPRESSIONS)}), or set corpus.format to one of {', '.join(_FORMATS)}."
    )


# JSONL


def _read_jsonl(
    uri: str, stream: BinaryIO, config: CorpusConfig, tally: Tally, max_line_bytes: int
) -> Iterator[Document]:
    lines = decompressed(uri, stream)
    offset = 0
    while True:
        where = f"{uri}, line {tally.records + 1}"
        try:
            line = lines.readline(max_line_bytes + 1)
            if not line:
                return
            tally.records += 1
            if offset == 0 and line.startswith(_BOM):
                line, offset = line[len(_BOM) :], len(_BOM)
            begin, offset = offset, offset + len(line)
            if len(line) > max_line_bytes:
                tally.leave_out(_too_long(where, max_line_bytes))
                while not line.endswith(b"\n") and (line := lines.readline(_READ_BYTES)):
                    offset += len(line)
                continue
        except DAMAGES as error:
            raise damaged(where, error) from error
        if not line.strip():
            tally.blank += 1
            continue
        try:
            document = _from_json(uri, tally.records, begin, line, config)
        except BadDocumentError as error:
            tally.leave_out(error)
        else:
            yield document


def _too_long(where: str, max_line_bytes: int) -> BadDocumentError:
    return BadDocumentError(
        f"{where} is longer than {max_line_bytes} bytes: is the file JSONL, one object per line? "
        "Split longer documents.",
        "too long",
    )


def _from_json(uri: str, number: int, offset: int, line: bytes, config: CorpusConfig) -> Document:
    where = f"{uri}, line {number}"
    try:
        row = json.loads(line.decode("utf-8"))
        if _SURROGATE.search(line):
            # JSON can spell half a surrogate pair, which no tokenizer and no Parquet file can hold.
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise BadDocumentError(
            f"{where}: byte {error.start} of the line is not UTF-8; convert the file, or give a compressed one its "
            "suffix (.gz, .zst).",
            "not UTF-8",
        ) from None
    except UnicodeEncodeError:
        raise BadDocumentError(
            f"{where}: half a surrogate pair (\\ud800 to \\udfff) is no character; remove it.", "half a surrogate pair"
        ) from None
    except RecursionError:
        raise BadDocumentError(
            f"{where}: nested too deeply to be read; a row is a flat object with a text.", "nested too deeply"
        ) from None
    except ValueError as error:
        raise BadDocumentError(f"{where} is not JSON ({error}); mend or remove the line.", "not JSON") from None
    if not isinstance(row, dict):
        raise BadDocumentError(
            f"{where} is {_kind(row)}, not an object; write one JSON object per line.", "not an object"
        )
    return _document(uri, where, number, offset, row, config)


# Text


def _read_text(uri: str, stream: BinaryIO, config: CorpusConfig, tally: Tally, max_bytes: int) -> Iterator[Document]:
    """The whole file as one document, or every line that is not blank (corpus.text_records)."""
    lines = decompressed(uri, stream)
    by_line = config.text_records is TextRecords.line
    name = file_name(uri)
    offset = 0
    while True:
        where = f"{uri}, line {tally.records + 1}" if by_line else uri
        try:
            data = lines.readline(max_bytes + 1) if by_line else lines.read(max_bytes + 1)
        except DAMAGES as error:
            raise damaged(where, error) from error
        if not data and (by_line or tally.records):
            return
        tally.records += 1
        begin, offset = offset, offset + len(data)
        if len(data) > max_bytes:
            mend = "split it" if by_line else "split it, or make documents of its lines with corpus.text_records=line"
            tally.leave_out(BadDocumentError(f"{where} is longer than {max_bytes} bytes; {mend}.", "too long"))
            while not (by_line and data.endswith(b"\n")) and (data := _more(lines, by_line)):
                offset += len(data)
            continue
        if begin == 0 and data.startswith(_BOM):
            data, begin = data[len(_BOM) :], len(_BOM)
        if by_line and not data.strip():
            tally.blank += 1
            continue
        try:
            text = data.rstrip(b"\r\n").decode() if by_line else data.decode()
        except UnicodeDecodeError as error:
            reason = f"{where}: byte {error.start} is not UTF-8; convert the file."
            tally.leave_out(BadDocumentError(reason, "not UTF-8"))
            continue
        yield Document(f"{name}#{tally.records}" if by_line else name, name, text, None, uri, begin)


def _more(lines: BinaryIO, by_line: bool) -> bytes:
    return lines.readline(_READ_BYTES) if by_line else lines.read(_READ_BYTES)


# Tables


def _read_table(
    name: str, uri: str, batches: Iterator[pa.RecordBatch], config: CorpusConfig, tally: Tally
) -> Iterator[Document]:
    """A document per row; every error of reading the table, `name`, says after which row."""
    try:
        for batch in batches:
            for index in range(batch.num_rows):
                tally.records += 1
                try:
                    document = _from_row(uri, tally.records - 1, batch, index, config)
                except BadDocumentError as error:
                    tally.leave_out(error)
                else:
                    yield document
    except (pa.ArrowException, OSError, EOFError, MemoryError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise BadFileError(
            f"{uri}, after row {tally.records}: not {name}, truncated or corrupt ({reason}); copy the file again."
        ) from error


def _parquet_batches(uri: str, stream: BinaryIO, config: CorpusConfig) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(stream, buffer_size=_READ_BYTES, page_checksum_verification=True) as parquet:
        columns = _columns(uri, parquet.schema_arrow.names, config)
        rows = _rows_per_batch(parquet.metadata, columns)
        # Without threads, which would decode batches ahead.
        yield from parquet.iter_batches(batch_size=rows, columns=columns, use_threads=False)


def _arrow_batches(uri: str, stream: BinaryIO, config: CorpusConfig) -> Iterator[pa.RecordBatch]:
    """An IPC file (it begins with ARROW1) or stream, one record batch in memory at a time."""
    is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
    stream.seek(0)
    with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(stream) as reader:
        columns = _columns(uri, reader.schema.names, config)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            batch.validate(full=True)
            yield batch.select(columns)


def _columns(uri: str, names: list[str], config: CorpusConfig) -> list[str]:
    wanted = [config.text_field, config.id_field, config.source_field, config.tokens_field]
    wanted += [config.prompt_field, config.mask_field]
    columns = [name for name in dict.fromkeys(wanted) if name in names]
    if config.text_field not in columns and config.tokens_field not in columns:
        raise CorpusError(
            f"{uri} has the columns {', '.join(map(repr, names[:10]))}, and no {config.text_field!r}; "
            "name one in corpus.text_field, or one with token ids in corpus.tokens_field."
        )
    for name in columns:
        if names.count(name) > 1:
            raise CorpusError(f"{uri} has the column {name!r} {names.count(name)} times; write it with distinct names.")
    return columns


def _rows_per_batch(metadata: pq.FileMetaData, columns: list[str]) -> int:
    """One row at a time where a column is large and compressed beyond what text is: it may be a bomb."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            size = max(column.total_uncompressed_size, column.num_values)
            wanted = column.path_in_schema.partition(".")[0] in columns
            if wanted and size > _LARGE_COLUMN and size > 100 * column.total_compressed_size:
                return 1
    return _ROWS_PER_BATCH


def _from_row(uri: str, number: int, batch: pa.RecordBatch, index: int, config: CorpusConfig) -> Document:
    where = f"{uri}, row {number}"
    row: dict[str, Any] = {}
    for name in batch.schema.names:
        value = batch.column(name)[index]
        try:
            # Token ids stay an Arrow array: turning them into Python numbers would cost more than all the rest.
            lists = (config.tokens_field, config.prompt_field, config.mask_field)
            row[name] = value.values if name in lists and isinstance(value, pa.ListScalar) else value.as_py()
        except UnicodeDecodeError as error:
            raise BadDocumentError(
                f"{where}: {name!r} is not UTF-8 at byte {error.start}; write the file again.", "not UTF-8"
            ) from None
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise BadDocumentError(
                f"{where}: {name!r} cannot be read ({error}); mend or remove the row.", "not readable"
            ) from None
    return _document(uri, where, number, number, row, config)


# Both


def _document(uri: str, where: str, number: int, offset: int, row: dict[str, Any], config: CorpusConfig) -> Document:
    text: str | None = None
    prompt: str | None = None
    token_ids: np.ndarray | None = None
    loss: np.ndarray | None = None
    if config.tokens_field is not None and row.get(config.tokens_field) is not None:
        token_ids = _token_ids(where, config.tokens_field, row[config.tokens_field])
        if config.masked:
            token_ids, loss = _with_loss(where, token_ids, row, config)
    else:
        text = _text(where, row, config)
        if config.prompt_field is not None:
            prompt = _prompt(where, row, config.prompt_field)
    return Document(
        id=_label(where, row, config.id_field, f"{file_name(uri)}#{number}"),
        source=_label(where, row, config.source_field, file_name(uri)),
        text=text,
        token_ids=token_ids,
        path=uri,
        offset=offset,
        prompt=prompt,
        loss=loss,
    )


def _prompt(where: str, row: dict[str, Any], field: str) -> str:
    if isinstance(prompt := row.get(field), str):
        return prompt
    if field in row:
        raise BadDocumentError(
            f"{where}: {field!r} is {_kind(row[field])}, not a text; give the prompt's text, empty for no prompt.",
            "no prompt",
        )
    raise _no_field(where, row, field, "prompt_field")


def _no_field(where: str, row: dict[str, Any], field: str, key: str) -> BadDocumentError:
    fields = ", ".join(map(repr, list(row)[:10])) or "none"
    return BadDocumentError(
        f"{where} has no field {field!r}; it has {fields}. Every row says where its loss is; name the field in "
        f"corpus.{key}, or give null for a corpus whose loss is everywhere.",
        "no prompt",
    )


def _with_loss(
    where: str, token_ids: np.ndarray, row: dict[str, Any], config: CorpusConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with the prompt's before them where those come apart, and bool [n]: which of them have a loss."""
    if config.mask_field is not None:
        if config.mask_field not in row:
            raise _no_field(where, row, config.mask_field, "mask_field")
        value = row[config.mask_field]
        mask = value if isinstance(value, list) else value.to_pylist() if isinstance(value, pa.Array) else None
        if mask is None or len(mask) != len(token_ids) or not all(one in (0, 1) for one in mask):
            found = _kind(value) if mask is None else f"{len(mask)} values for {len(token_ids)} token ids"
            raise BadDocumentError(
                f"{where}: {config.mask_field!r} is {found}; give a 0 (no loss) or a 1 for every one of the token ids.",
                "no loss mask",
            )
        return token_ids, np.array(mask, np.bool_)
    assert config.prompt_field is not None
    if config.prompt_field not in row:
        raise _no_field(where, row, config.prompt_field, "prompt_field")
    value = row[config.prompt_field]
    if type(value) is int:
        if not 0 <= value <= len(token_ids):
            raise BadDocumentError(
                f"{where}: {config.prompt_field!r} is {value}, and there are {len(token_ids)} token ids; give how many "
                "of them are the prompt.",
                "no prompt",
            )
        return token_ids, np.arange(len(token_ids)) >= value
    if isinstance(value, str | bool) or value is None:
        raise BadDocumentError(
            f"{where}: {config.prompt_field!r} is {_kind(value)} beside token ids; give the prompt's token ids, or how "
            "many of the row's are the prompt.",
            "no prompt",
        )
    before = _token_ids(where, config.prompt_field, value)
    if not len(token_ids):
        return token_ids, np.empty(0, np.bool_)
    return np.concatenate([before, token_ids]), np.arange(len(before) + len(token_ids)) >= len(before)


def _text(where: str, row: dict[str, Any], config: CorpusConfig) -> str:
    text = row.get(config.text_field)
    if isinstance(text, str):
        if len(text) > MAX_LINE_BYTES:
            raise BadDocumentError(
                f"{where}: a text of {len(text)} characters; split documents of more than {MAX_LINE_BYTES}.", "too long"
            )
        return text
    if config.text_field in row:
        raise BadDocumentError(
            f"{where}: {config.text_field!r} is {_kind(text)}, not a text; mend or remove the row.", "not a text"
        )
    fields = ", ".join(repr(name)[:80] for name in list(row)[:10]) or "none"
    neither = f" nor {config.tokens_field!r}" if config.tokens_field else ""
    raise BadDocumentError(
        f"{where} has no field {config.text_field!r}{neither}; it has {fields}. Name the text's field in "
        "corpus.text_field, or the token ids' in corpus.tokens_field.",
        "no text",
    )


def _label(where: str, row: dict[str, Any], field: str, missing: str) -> str:
    value = row.get(field)
    if value is None:
        return missing
    if isinstance(value, str | int) and not isinstance(value, bool):
        label = str(value)
        if len(label) <= MAX_LABEL_CHARACTERS:
            return label
        raise BadDocumentError(
            f"{where}: {field!r} has {len(label)} characters; give at most {MAX_LABEL_CHARACTERS}.", "not a label"
        )
    raise BadDocumentError(
        f"{where}: {field!r} is {_kind(value)}; give a text or a whole number, or leave it out.", "not a label"
    )


def _token_ids(where: str, field: str, value: Any) -> np.ndarray:
    """int [n] in whatever width holds them; whether they lie in the vocabulary is the packer's question."""
    if isinstance(value, pa.Array):
        if not len(value):
            return np.empty(0, np.int64)
        if not pa.types.is_integer(value.type) or value.null_count:
            kind = "empty values" if value.null_count else f"values of type {value.type}"
            raise BadDocumentError(f"{where}: {field!r} holds {kind}; token ids are whole numbers.", "no token ids")
        return value.to_numpy(zero_copy_only=False)
    if not isinstance(value, list):
        raise BadDocumentError(
            f"{where}: {field!r} is {_kind(value)}, not a list of token ids; mend or remove the row.", "no token ids"
        )
    for position, token in enumerate(value):
        if type(token) is not int:
            raise BadDocumentError(
                f"{where}: {field!r} holds {repr(token)[:40]} at position {position}; token ids are whole numbers.",
                "no token ids",
            )
    try:
        return np.array(value, np.int64)
    except OverflowError:
        raise BadDocumentError(
            f"{where}: {field!r} holds a number beyond 64 bits; is it a list of token ids?", "no token ids"
        ) from None


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
