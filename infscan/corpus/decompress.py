"""Compressed files as plain streams, in bounded memory: whatever a file expands to, it is never held whole."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import Any, BinaryIO, cast

from infscan.errors import BadFileError


class ZstdDamageError(Exception):
    """A zstd stream cannot be decompressed."""


COMPRESSIONS = (".gz", ".zst")
# What a damaged stream raises while it is read.
DAMAGES = (EOFError, gzip.BadGzipFile, zlib.error, ZstdDamageError)
_READ_BYTES = 1 << 20
# A zstd block of 4 bytes can stand for 128 KiB: a bite of 1 KiB gives at most 32 MiB.
_ZSTD_BITE = 1 << 10


def decompressed(uri: str, stream: BinaryIO) -> BinaryIO:
    """The plain bytes of a file, by its suffix; reading may raise one of `DAMAGES`.

    Raises:
        BadFileError: for a compressed file without a byte.
    """
    if not uri.endswith(COMPRESSIONS):
        return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, stream), _READ_BYTES))
    if not stream.read(1):
        raise BadFileError(f"{uri} is empty, and a compressed file never is: it was cut off; copy the file again.")
    stream.seek(0)
    if uri.endswith(".gz"):
        return cast(BinaryIO, io.BufferedReader(gzip.GzipFile(fileobj=stream), _READ_BYTES))
    return cast(BinaryIO, io.BufferedReader(_ZstdReader(stream), _READ_BYTES))


def damaged(where: str, error: Exception) -> BadFileError:
    """The sentence for a stream that raised one of `DAMAGES`."""
    if "too much memory" in str(error):
        return BadFileError(
            f"{where}: its zstd window needs more than 128 MiB of memory; compress the file again without --long, or "
            "with --long=27 at most."
        )
    return BadFileError(f"{where}: the compressed stream is truncated or corrupt ({error}); copy the file again.")


class _ZstdReader(io.RawIOBase):
    """Decompress concatenated zstd frames; EOFError where the last one is cut off.

    zstandard's own stream reader ends quietly in the middle of a frame, which would lose documents without a word.
    """

    def __init__(self, stream: BinaryIO) -> None:
        # Only who reads such a file needs it.
        import zstandard

        self._stream = stream
        self._broken = zstandard.ZstdError
        self._context = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            if not self._compressed:
                self._compressed = self._stream.read(_ZSTD_BITE)
                if not self._compressed:
                    if self._frame is not None:
                        raise EOFError("it ends in the middle of a frame")
                    return 0
            if self._frame is None:
                self._frame = self._context.decompressobj()
            try:
                self._plain = memoryview(self._frame.decompress(self._compressed))
            except self._broken as error:
                raise ZstdDamageError(str(error)) from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = None
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count
