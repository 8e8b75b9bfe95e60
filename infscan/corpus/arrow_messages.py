"""Arrow's IPC as a stream of messages, each held to a size before Arrow decompresses it.

A message is its metadata (a flatbuffer: Message.fbs, Schema.fbs of the Arrow format) and a body of buffers. In a
compressed body each buffer begins with the bytes that it stands for, which Arrow allocates: 64 kB can stand for 2 GB.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from infscan.errors import BadFileError

# Of one record batch with the dictionaries that it needs, decompressed.
MAX_BATCH_BYTES = 1 << 30
_MAX_METADATA = 64 << 20
_FILE = b"ARROW1"
_LONG = b"\xff\xff\xff\xff"
_READ_BYTES = 1 << 20
_DICTIONARY, _RECORDS = 2, 3  # MessageHeader


def is_arrow_file(stream: BinaryIO) -> bool:
    """Whether a stream is an IPC file, which has a footer; else it is a stream of messages alone."""
    stream.seek(0)
    found = stream.read(len(_FILE)) == _FILE
    stream.seek(0)
    return found


def checked_messages(uri: str, stream: BinaryIO, *, is_file: bool) -> BinaryIO:
    """The messages of an IPC file or stream, as a stream; reading raises BadFileError at one that is too large,
    OSError at what is none."""
    return cast(BinaryIO, io.BufferedReader(_Checked(uri, stream, is_file), _READ_BYTES))


@contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except (struct.error, IndexError, ValueError) as error:
        raise OSError(f"a message that is none: {error}") from None


class _Checked(io.RawIOBase):
    def __init__(self, uri: str, stream: BinaryIO, is_file: bool) -> None:
        self.uri, self.stream = uri, stream
        self.end = stream.seek(0, io.SEEK_END)
        if is_file:
            # Behind the messages: the footer, its size and the magic bytes.
            stream.seek(max(0, self.end - len(_FILE) - 4))
            size, magic = stream.read(4), stream.read()
            if magic != _FILE or len(size) < 4:
                raise EOFError("it ends without a footer")
            self.end -= len(_FILE) + 4 + struct.unpack("<I", size)[0]
        stream.seek(8 if is_file else 0)
        self.dictionaries: dict[int, int] = {}
        self.ready: list[memoryview] = []

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready and self.stream.tell() < self.end:
            self.ready = [memoryview(piece) for piece in self._message() if piece]
        if not self.ready:
            return 0
        piece = self.ready[0]
        count = min(len(buffer), len(piece))
        buffer[:count] = piece[:count]
        self.ready[:1] = [piece[count:]] if count < len(piece) else []
        return count

    def _message(self) -> list[bytes]:
        """The next message: its lengths, metadata and body."""
        head = self.stream.read(4)
        # Before Arrow 0.15 the length came without a mark before it.
        head += self.stream.read(4) if head == _LONG else b""
        size = int.from_bytes(head[-4:], "little")
        if size == 0:
            self.stream.seek(self.end)
            return [head]
        if size > _MAX_METADATA:
            raise OSError(f"a message with metadata of {size} bytes")
        metadata = self.stream.read(size)
        with _parsing():
            body, table, dictionary = _facts(metadata)
        self._check(body)
        data = self.stream.read(body)
        if table is not None:
            with _parsing():
                bytes_of = _decompressed(table, data)
            if dictionary is not None:
                number, is_delta = dictionary
                self.dictionaries[number] = bytes_of + (self.dictionaries.get(number, 0) if is_delta else 0)
                bytes_of = 0
            self._check(bytes_of + sum(self.dictionaries.values()))
        return [head, metadata, data]

    def _check(self, size: int) -> None:
        if not 0 <= size <= MAX_BATCH_BYTES:
            raise BadFileError(
                f"{self.uri}: a record batch of {size} bytes, above {MAX_BATCH_BYTES}; write the file with fewer rows "
                "in a batch."
            )


class _Table:
    """A flatbuffer's table: the places of its fields."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self.at = at
        self.fields = at - self._int("<i", at)

    def _int(self, code: str, at: int) -> int:
        if at < 0:
            raise IndexError("a place before the beginning")
        return int(struct.unpack_from(code, self.data, at)[0])

    def place(self, number: int) -> int | None:
        """Where a field's value is; None where it has none."""
        entry = 4 + 2 * number
        if entry >= self._int("<H", self.fields):
            return None
        offset = self._int("<H", self.fields + entry)
        return self.at + offset if offset else None

    def number(self, number: int, code: str) -> int:
        at = self.place(number)
        return 0 if at is None else self._int(code, at)

    def table(self, number: int) -> _Table | None:
        at = self.place(number)
        return None if at is None else _Table(self.data, at + self._int("<I", at))

    def buffers(self, number: int) -> list[tuple[int, int]]:
        """A vector of (offset, length)."""
        at = self.place(number)
        if at is None:
            return []
        at += self._int("<I", at)
        count = self._int("<I", at)
        if count * 16 > len(self.data):
            raise ValueError("more buffers than its metadata holds")
        return [(self._int("<q", one), self._int("<q", one + 8)) for one in range(at + 4, at + 4 + 16 * count, 16)]


def _facts(metadata: bytes) -> tuple[int, _Table | None, tuple[int, bool] | None]:
    """Of a message: the bytes of its body, its RecordBatch, and of which dictionary that is (its id, whether it adds
    to it)."""
    message = _Table(metadata, int(struct.unpack_from("<I", metadata)[0]))
    kind, body = message.number(1, "<B"), message.number(3, "<q")
    header = message.table(2)
    if header is None or kind not in (_DICTIONARY, _RECORDS):
        return body, None, None
    if kind == _RECORDS:
        return body, header, None
    return body, header.table(1), (header.number(0, "<q"), bool(header.number(2, "<B")))


def _decompressed(batch: _Table, body: bytes) -> int:
    """Bytes of a RecordBatch's buffers as Arrow allocates them."""
    if batch.table(3) is None:
        return len(body)
    total = 0
    for offset, length in batch.buffers(2):
        # -1: this buffer is stored as it is.
        declared = struct.unpack_from("<q", body, offset)[0] if length >= 8 and 0 <= offset <= len(body) - 8 else -1
        total += max(0, length) if declared < 0 else declared
    return total
