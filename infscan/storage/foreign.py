"""JSON that somebody else may have written, read in one place: no file of it ends in a traceback."""

from __future__ import annotations

import json
from typing import Any

from infscan.errors import StorageError


def parse_json(data: bytes | str) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: for what is no JSON, is nested deeper than Python goes, or holds half of a surrogate pair, which no
            file and no terminal takes.
    """
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    escape = b"\\u" if isinstance(data, bytes) else "\\u"
    if escape in data:  # type: ignore[operator]
        _refuse_half_surrogates(value)
    return value


def parse_stored(data: bytes, where: str) -> Any:
    """The value of a stored JSON file; StorageError, by its address, where it is none."""
    try:
        return parse_json(data)
    except ValueError as error:
        raise StorageError(f"{where} is not valid JSON ({error}); restore or remove it") from error


def _refuse_half_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
