"""JSON that somebody else may have written: a value, or one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.errors import StorageError
from infscan.storage import Store
from infscan.storage.foreign import parse_json

HOSTILE = [b"[" * 100_000, b'{"a":' * 100_000, rb'{"a": "\ud800"}', b'"\xff"', b"", b"nul", b"1" * 10_000, b"\x00"]
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda some: st.lists(some) | st.dictionaries(st.text(), some),
)


@pytest.mark.parametrize("data", HOSTILE, ids=lambda data: repr(data[:12]))
def test_what_cannot_be_used_is_one_sentence(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(StorageError, match=r"x\.json is not valid JSON \(.+\); restore or remove it"):
        Store(str(tmp_path)).read_json("x.json")


@given(_JSON, st.booleans())
def test_what_json_writes_is_read(value: object, escaped: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=escaped)) == value
