"""A line of JSON as an object, or the sentence for what it is in place of one: of a corpus, of queries, of texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from infscan.corpus.decompress import DAMAGES, damaged, decompressed
from infscan.errors import BadDocumentError, BadFileError
from infscan.storage import open_input
from infscan.storage.foreign import BadJsonError, parse_json

BOM = b"\xef\xbb\xbf"
# What people have rows in, and is not read for them.
_OTHERS = (".csv", ".tsv", ".parquet", ".arrow", ".yaml", ".yml", ".xlsx", ".toml", ".zip", ".bz2", ".xz")
# Lines that people write: what is beyond is no such file.
_MOST_BYTES = 256 << 20
# What is said of a line that is no JSON, by its kind.
_SAID = {
    "not UTF-8": "{where}: byte {at} of the line is not UTF-8; convert the file, or give a compressed one its suffix "
    "(.gz, .zst).",
    "half a surrogate pair": "{where}: half a surrogate pair (\\ud800 to \\udfff) is no character; remove it.",
    "nested too deeply": "{where}: nested too deeply to be read; a row is a flat object with a text.",
    "too many values": "{where}: {said}; split the row, or write its token ids as Parquet.",
    "part of a value": "{where} is not JSON by itself; write one object per line (`jq -c .`, of a list `jq -c '.[]'`).",
    "not JSON": "{where} is not JSON ({said}); fix or remove the line.",
}


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that a line holds.

    Raises:
        BadDocumentError: saying `where`, for anything else, for half a surrogate pair in it, and for more values than
            memory is allowed for.
    """
    try:
        row = parse_json(data)
    except BadJsonError as error:
        kind = "part of a value" if error.kind == "not JSON" and data.strip() in (b"[", b"{") else error.kind
        raise BadDocumentError(_SAID[kind].format(where=where, said=error, at=error.at), error.kind) from None
    if not isinstance(row, dict):
        fix = " (`jq -c '.[]'` does)" if isinstance(row, list) else ""
        raise BadDocumentError(
            f"{where} is {kind_of(row)}, not an object; write one JSON object per line{fix}.", "not an object"
        )
    return row


def lines_of(path: str) -> Iterator[tuple[int, bytes]]:
    """A small file's lines that are not blank, with their numbers; plain, gzip or zstd by its suffix.

    Raises:
        StorageError: where it is missing or refused.
        BadFileError: where it is cut off, corrupt, or no file that a person wrote.
    """
    other = next((suffix for suffix in _OTHERS if path.lower().endswith(suffix)), None)
    if other is not None:
        raise BadFileError(f"{path}: {other} is not read here; write one JSON object per line, as .jsonl.")
    try:
        with open_input(path) as stream:
            data = decompressed(path, stream).read(_MOST_BYTES + 1)
    except DAMAGES as error:
        raise damaged(path, error) from error
    if len(data) > _MOST_BYTES:
        raise BadFileError(f"{path} is longer than {_MOST_BYTES >> 20} MiB; is it a corpus? Split it.")
    lines = data.removeprefix(BOM).split(b"\n")
    yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def kind_of(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")
