"""Whatever a foreign file has in place of a number or a text is told by its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from infscan.storage.shapes import check_types


@dataclass(frozen=True)
class Inner:
    size: int
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    parts: tuple[Inner, ...]
    counts: Mapping[str, int]
    whole: bool
    share: float
    rest: dict[str, Any]


GOOD: dict[str, Any] = {"parts": (Inner(1), Inner(2, "a")), "counts": {"a": 1}, "whole": True, "share": 1, "rest": {}}


def test_what_fits_passes() -> None:
    check_types(Outer(**GOOD), Outer)
    check_types(Outer(**GOOD | {"parts": [], "share": 0.5, "rest": {"x": [None]}}), Outer)


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("parts", None, "parts"),
        ("parts", "ab", "parts"),
        ("parts", ({"size": 1},), "parts"),
        ("parts", (Inner(True),), "parts.size"),
        ("parts", (Inner(1.0),), "parts.size"),  # type: ignore[arg-type]
        ("parts", (Inner(1 << 62),), "parts.size"),
        ("parts", (Inner(1, 2),), "parts.name"),  # type: ignore[arg-type]
        ("counts", [1], "counts"),
        ("counts", {1: 1}, "counts"),
        ("counts", {"a": "1"}, "counts.a"),
        ("whole", 1, "whole"),
        ("share", "1", "share"),
        ("rest", None, "rest"),
    ],
)
def test_what_does_not_is_named(key: str, value: Any, place: str) -> None:
    with pytest.raises(TypeError, match=rf"^{place} is "):
        check_types(Outer(**GOOD | {key: value}), Outer)
