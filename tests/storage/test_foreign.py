"""JSON of strangers: what is no JSON is said to be none, and what would take all memory is not read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.errors import StorageError
from infscan.storage import foreign
from infscan.storage.foreign import BadJsonError, parse_json, parse_lines, parse_stored

JSON = st.recursive(
    st.text(alphabet='a\\",[]{}:é\x00', max_size=9) | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='b\\",[{:', max_size=3), inner),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        ('{"a": "\ud800"}', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"\xff", "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b"[" + b"[]," * (9 << 20) + b"[]]", "too many values"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_word(data: bytes | str, kind: str) -> None:
    with pytest.raises(BadJsonError) as found:
        parse_json(data)
    assert found.value.kind == kind


def test_a_text_full_of_commas_is_one_value() -> None:
    text = "1,2,[{:" * (2 << 20)
    assert parse_json(json.dumps({"text": text})) == {"text": text}


@given(JSON)
def test_values_are_counted_outside_of_strings_alone(value: Any) -> None:
    def marks(value: Any) -> int:
        inner = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else None
        if inner is None:
            return 0
        return 1 + max(0, len(inner) - 1) + (len(inner) if isinstance(value, dict) else 0) + sum(map(marks, inner))

    for ensure_ascii in (True, False):
        data = json.dumps(value, ensure_ascii=ensure_ascii).encode()
        with pytest.MonkeyPatch.context() as patch:
            # Strings and escapes cross pieces.
            patch.setattr(foreign, "_PIECE", 5)
            assert parse_json(data, most_values=marks(value) + 1) == value
            if 0 < marks(value) < len(data):
                with pytest.raises(BadJsonError, match="more than"):
                    parse_json(data, most_values=marks(value))


def test_stored_files_are_refused_by_their_address() -> None:
    for data in (b"{", b"[" * 100_000, b"\xff"):
        with pytest.raises(StorageError, match=r"s3://a/b\.json is not valid JSON"):
            parse_stored(data, "s3://a/b.json")
    for data in (b"{}\n{", b"{}\n[1]\n"):
        with pytest.raises(StorageError, match=r"s3://a/b\.jsonl"):
            parse_lines(data, "s3://a/b.jsonl")
    assert parse_lines(b'{"a": 1}\n{"a": 2}\n', "x") == [{"a": 1}, {"a": 2}]
