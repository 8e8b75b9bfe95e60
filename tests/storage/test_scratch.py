"""Scratch files: room that is taken at once, and that nothing is left of."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from infscan.errors import UnwritableError
from infscan.storage import scratch_file


def test_its_room_is_taken_at_once_and_what_has_it_mapped_keeps_it(tmp_path: Path) -> None:
    with scratch_file(str(tmp_path), 1 << 20) as path:
        assert Path(path).stat().st_blocks * 512 >= 1 << 20
        with open(path, "r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
    assert list(tmp_path.iterdir()) == []
    mapped[-4:] = b"kept"
    assert mapped[-4:] == b"kept"


@pytest.mark.parametrize(("folder", "size"), [("missing", 1), ("", 1 << 60)])
def test_a_place_without_room_is_named(folder: str, size: int, tmp_path: Path) -> None:
    with (
        pytest.raises(UnwritableError, match=f"{tmp_path / folder} takes no file of"),
        scratch_file(str(tmp_path / folder), size),
    ):
        raise AssertionError("never reached")
    assert not any(tmp_path.iterdir())
