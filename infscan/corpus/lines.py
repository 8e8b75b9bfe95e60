"""Documents out of lines: JSONL, and plain text by the line or by the file; plain, gzip or zstd."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from infscan.config import CorpusConfig, TextRecords
from infscan.corpus.decompress import COMPRESSIONS, DAMAGES, damaged, decompressed
from infscan.corpus.files import folder_below, name_below
from infscan.corpus.json_lines import BOM, parse_object
from infscan.corpus.rows import Document, document_of
from infscan.corpus.splits import FileRange
from infscan.corpus.tally import Tally
from infscan.errors import BadDocumentError

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class _Line:
    """A line that is neither blank nor too long: where it is, what it is called, its first byte, what it says."""

    where: str
    name: str
    offset: int
    data: bytes


def read_jsonl(
    uri: str, stream: BinaryIO, config: CorpusConfig, tally: Tally, max_line_bytes: int, stretch: FileRange
) -> Iterator[Document]:
    fix = ": is the file JSONL, one object per line? Split longer documents."
    for line in _lines(uri, name_below(uri, config.path), stream, tally, max_line_bytes, stretch, fix):
        try:
            document = _from_json(uri, line, config)
        except BadDocumentError as error:
            tally.leave_out(error)
        else:
            yield document


def read_text(
    uri: str, stream: BinaryIO, config: CorpusConfig, tally: Tally, max_bytes: int, stretch: FileRange
) -> Iterator[Document]:
    """The whole file as one document, or every line that is not blank (corpus.text_records)."""
    by_line, name = config.text_records is TextRecords.line, name_below(uri, config.path)
    source = name if by_line else folder_below(uri, config.path)
    found = (
        _lines(uri, name, stream, tally, max_bytes, stretch, "; split it.")
        if by_line
        else _whole(uri, name, stream, tally, max_bytes)
    )
    for record in found:
        try:
            text = record.data.rstrip(b"\r\n").decode() if by_line else record.data.decode()
        except UnicodeDecodeError as error:
            reason = f"{record.where}: byte {error.start} is not UTF-8; convert the file."
            tally.leave_out(BadDocumentError(reason, "not UTF-8"))
            continue
        if "\0" in text:
            # UTF-16 of Latin letters, and much of what is no text, is UTF-8 with these between.
            reason = f"{record.where} holds NUL characters: it is UTF-16, or no text; convert or remove it."
            tally.leave_out(BadDocumentError(reason, "NUL characters"))
            continue
        yield Document(record.name, source, text, None, uri, record.offset)


def _lines(
    uri: str, file: str, stream: BinaryIO, tally: Tally, max_line_bytes: int, stretch: FileRange, fix: str
) -> Iterator[_Line]:
    """The lines whose first byte is in the stretch; in a file that was cut they are named by that byte."""
    number = 0
    where = uri
    try:
        lines, offset = _at(uri, stream, stretch.start)
        while stretch.stop is None or offset < stretch.stop:
            where = f"{uri}, line {number + 1}" if stretch.whole else f"{uri}, the line at byte {offset}"
            line = lines.readline(max_line_bytes + 1)
            if not line:
                return
            number += 1
            tally.records += 1
            if offset == 0 and line.startswith(BOM):
                line, offset = line[len(BOM) :], len(BOM)
            begin, offset = offset, offset + len(line)
            if len(line) > max_line_bytes:
                tally.leave_out(BadDocumentError(f"{where} is longer than {max_line_bytes} bytes{fix}", "too long"))
                offset += _rest_of_line(lines, line)
                continue
            if not line.strip():
                tally.blank += 1
                continue
            name = f"{file}#{number}" if stretch.whole else f"{file}@{begin}"
            yield _Line(where, name, begin, line)
    except DAMAGES as error:
        raise damaged(where, error) from error


def _at(uri: str, stream: BinaryIO, start: int) -> tuple[BinaryIO, int]:
    """The plain stream where the first line at or after `start` begins, and that byte.

    What cannot be sought in is read and dropped.
    """
    if start == 0:
        return decompressed(uri, stream), 0
    # From the byte before: where that one ends a line, the next line begins at `start` itself.
    left = start - 1
    if not uri.endswith(COMPRESSIONS):
        stream.seek(left)
        left = 0
    lines = decompressed(uri, stream)
    while left and (dropped := lines.read(min(left, _READ_BYTES))):
        left -= len(dropped)
    return lines, start - 1 - left + _rest_of_line(lines, b"")


def _rest_of_line(lines: BinaryIO, line: bytes) -> int:
    """Read to the end of a line of which `line` has been read; how many bytes that was."""
    count = 0
    while not line.endswith(b"\n") and (line := lines.readline(_READ_BYTES)):
        count += len(line)
    return count


def _whole(uri: str, name: str, stream: BinaryIO, tally: Tally, max_bytes: int) -> Iterator[_Line]:
    lines = decompressed(uri, stream)
    try:
        data = lines.read(max_bytes + 1)
        tally.records += 1
        if len(data) > max_bytes:
            fix = "split it, or make documents of its lines with corpus.text_records=line"
            tally.leave_out(BadDocumentError(f"{uri} is longer than {max_bytes} bytes; {fix}.", "too long"))
            # To its end, where a damage would show.
            while lines.read(_READ_BYTES):
                pass
            return
    except DAMAGES as error:
        raise damaged(uri, error) from error
    begin = len(BOM) if data.startswith(BOM) else 0
    yield _Line(uri, name, begin, data[begin:])


def _from_json(uri: str, line: _Line, config: CorpusConfig) -> Document:
    row = parse_object(line.data, line.where)
    return document_of(uri, line.where, line.name, line.offset, row, config)
