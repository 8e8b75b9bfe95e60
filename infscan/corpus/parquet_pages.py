"""Parquet's pages, each held to a size before Arrow decompresses it.

A page begins with a header (Thrift's compact protocol, parquet.thrift): its bytes compressed, and those that it stands
for, which Arrow allocates: 89 kB can stand for 2 GB. The file's footer says sizes too, and a stranger's may lie.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow.parquet as pq

from infscan.errors import BadFileError

MAX_PAGE_BYTES = 512 << 20
# Of pages whose bytes a few more can repeat: a dictionary's, or where a value begins as the one before it does.
MAX_REPEATED_BYTES = 64 << 20
_HEADER_BYTES = 4096
_MAX_HEADER = 16 << 20
_DEEPEST = 8
_DICTIONARY_PAGE, _DELTA_BYTE_ARRAY = 2, 7


@dataclass
class _Chunk:
    """A column's bytes in a row group, and where its next page begins."""

    next: int
    stop: int


@dataclass(frozen=True)
class _Page:
    size: int
    compressed: int
    repeats: bool


class CheckedPages(io.RawIOBase):
    """A file as Arrow reads it; reading raises BadFileError at a page that is too large, OSError at what is
    none."""

    def __init__(self, uri: str, stream: BinaryIO) -> None:
        self.uri, self.stream = uri, stream
        self.chunks: list[_Chunk] = []

    def watch(self, group: pq.RowGroupMetaData, columns: list[str]) -> bool:
        """Look at the pages of a row group's columns from now on; whether one begins with a large dictionary."""
        self.chunks.clear()
        large = False
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.partition(".")[0] in columns and column.total_compressed_size > 0:
                start = column.data_page_offset
                if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
                    start = column.dictionary_page_offset
                self.chunks.append(_Chunk(start, start + column.total_compressed_size))
                page, _ = self._page(start, b"")
                large |= page.repeats and page.size > MAX_REPEATED_BYTES >> 4
        return large

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        start = self.stream.tell()
        data = self.stream.read(size)
        stop = start + len(data)
        for chunk in self.chunks:
            if start < chunk.stop and stop > chunk.next:
                while chunk.next < min(stop, chunk.stop):
                    page, length = self._page(chunk.next, data[chunk.next - start :] if chunk.next >= start else b"")
                    self._check(page)
                    chunk.next += length + page.compressed
        self.stream.seek(stop)
        return data

    def _check(self, page: _Page) -> None:
        most = MAX_REPEATED_BYTES if page.repeats else MAX_PAGE_BYTES
        if page.size > most:
            raise BadFileError(
                f"{self.uri}: a page of {page.size} bytes, above {most}; write the file with smaller pages "
                "(data_page_size, dictionary_pagesize_limit)."
            )

    def _page(self, at: int, data: bytes) -> tuple[_Page, int]:
        """The page whose header begins at a byte, and the header's length. data: from there on, where it was read."""
        wanted = _HEADER_BYTES
        while True:
            if not data:
                self.stream.seek(at)
                data = self.stream.read(wanted)
            try:
                fields, length = _struct(data, 0, 0)
            except IndexError:
                if wanted >= _MAX_HEADER or len(data) < wanted // 16:
                    raise OSError(f"no page begins at byte {at}") from None
                data, wanted = b"", wanted * 16
                continue
            details = fields.get(5) or fields.get(8) or {}
            encoding = details.get(2 if 5 in fields else 4)
            size, compressed = fields.get(2, -1), fields.get(3, -1)
            if size < 0 or compressed < 0:
                raise OSError(f"no page begins at byte {at}")
            repeats = fields.get(1) == _DICTIONARY_PAGE or encoding == _DELTA_BYTE_ARRAY
            return _Page(size, compressed, repeats), length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError("a number without an end")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """The numbers and structs of a struct, by field; IndexError where the bytes end before it does."""
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head = data[at]
        at += 1
        if head == 0:
            return fields, at
        if head >> 4:
            number += head >> 4
        else:
            number, at = _zigzag(data, at)
        fields[number], at = _value(data, at, head & 15, depth)


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise IndexError("nested too deeply")
    if kind in (1, 2):
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _zigzag(data, at)
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind in (9, 10):
        head = data[at]
        count, at = (head >> 4, at + 1) if head >> 4 < 15 else _varint(data, at + 1)
        for _ in range(count):
            _, at = _element(data, at, head & 15, depth)
        return None, at
    if kind == 12:
        return _struct(data, at, depth + 1)
    raise IndexError(f"no kind {kind}")


def _element(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """A list's element: a truth value takes a byte there."""
    return (None, at + 1) if kind in (1, 2) and data[at] is not None else _value(data, at, kind, depth + 1)
