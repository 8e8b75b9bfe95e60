"""JSON that somebody else may have written, read in one place: no file of it ends in a traceback, or takes all memory.

A value costs up to 80 bytes however short it is (`[],` is three), so texts of more values than `MOST_VALUES` are not
read: what does not count towards it costs as much as its text.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

import numpy as np

from infscan.errors import StorageError

MOST_VALUES = 8 << 20
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# Every value but the first comes after one of these, where they are in no string.
_BEFORE_VALUES = (b",", b"[", b"{", b":")
_PIECE = 1 << 20


class BadJsonError(ValueError):
    """What is no JSON that can be read. kind: why, in a word or two, the same for every such text. at: the byte."""

    def __init__(self, kind: str, said: str = "", at: int = 0) -> None:
        super().__init__(said or f"it is {kind}")
        self.kind, self.at = kind, at


def parse_json(data: bytes | str, *, most_values: int = MOST_VALUES) -> Any:
    """The value of JSON text (UTF-8).

    Raises:
        BadJsonError: a ValueError, for what is no JSON, is nested deeper than Python goes, has more values than
            `most_values`, or holds half of a surrogate pair, which no file and no terminal takes.
    """
    data = data.encode(errors="surrogatepass") if isinstance(data, str) else data.removeprefix(codecs.BOM_UTF8)
    if _has_more(data, most_values):
        raise BadJsonError("too many values", f"it has more than {most_values} values")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise BadJsonError("not UTF-8", f"byte {error.start} is not UTF-8", error.start) from None
    try:
        value = json.loads(text)
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise BadJsonError("nested too deeply") from None
    except UnicodeEncodeError:
        raise BadJsonError("half a surrogate pair", "it holds half of a surrogate pair") from None
    except ValueError as error:
        raise BadJsonError("not JSON", str(error)) from None
    return value


def parse_stored(data: bytes, where: str) -> Any:
    """The value of a stored JSON file; StorageError, by its address, where it is none."""
    try:
        # A manifest may well have more values, and the file is as large as it is.
        return parse_json(data, most_values=len(data))
    except ValueError as error:
        raise StorageError(f"{where} is not valid JSON ({error}); restore or remove it") from error


def parse_lines(data: bytes, where: str) -> list[dict[str, Any]]:
    """The objects of stored JSON Lines; StorageError, by their address, where they are none."""
    try:
        rows = [parse_json(line) for line in data.splitlines()]
    except ValueError as error:
        raise StorageError(f"{where} is not valid JSON Lines ({error}); restore it") from error
    if not all(isinstance(row, dict) for row in rows):
        raise StorageError(f"{where} has a line that is no object; restore it")
    return rows


def _has_more(data: bytes, most: int) -> bool:
    """Whether a text has more values than `most`: what is in strings does not count, and is only left out if it has
    to be."""
    if len(data) <= most or sum(map(data.count, _BEFORE_VALUES)) < most:
        return False
    count, in_string, backslashes = 0, False, 0
    for start in range(0, len(data), _PIECE):
        piece = np.frombuffer(data, np.uint8, min(_PIECE, len(data) - start), start)
        index = np.arange(len(piece))
        # How many backslashes come right before each byte: a quote after an odd number of them ends no string.
        last_other = np.maximum.accumulate(np.where(piece == ord("\\"), -1 - backslashes, index))
        before = index - 1 - np.concatenate([[-1 - backslashes], last_other[:-1]])
        quotes = (piece == ord('"')) & (before % 2 == 0)
        inside = np.bitwise_xor.accumulate(quotes) ^ in_string
        count += int((np.isin(piece, list(b"".join(_BEFORE_VALUES))) & ~inside).sum())
        if count >= most:
            return True
        in_string, backslashes = bool(inside[-1]), int(len(piece) - 1 - last_other[-1])
    return False
