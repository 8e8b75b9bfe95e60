"""Values of foreign JSON held to the types of the dataclasses that are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_MOST = 1 << 62
_LISTS = (tuple, list, Sequence)


def check_types(value: Any, hint: Any, where: str = "") -> None:
    """Raises TypeError, naming the place in it, where a value is not of a type: int, str, X | None, tuple[X, ...],
    Mapping[str, X], or a dataclass of such. Whole numbers lie within 62 bits."""
    origin = get_origin(hint)
    if hint is Any:
        return
    if origin in (Union, UnionType):
        for one in get_args(hint):
            if one is not type(None) and value is not None:
                check_types(value, one, where)
        if value is None and type(None) not in get_args(hint):
            raise _other(value, hint, where)
    elif origin in _LISTS:
        if not isinstance(value, list | tuple):
            raise _other(value, hint, where)
        for one in value:
            check_types(one, get_args(hint)[0], where)
    elif origin in (dict, Mapping):
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise _other(value, hint, where)
        for key, one in value.items():
            check_types(one, get_args(hint)[1], f"{where}.{key}")
    elif is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, hint):
            raise _other(value, hint, where)
        for name, of_field in _hints(hint):
            check_types(getattr(value, name), of_field, f"{where}.{name}")
    elif not _is_plain(value, hint):
        raise _other(value, hint, where)


def _is_plain(value: Any, hint: Any) -> bool:
    if hint is int:
        return type(value) is int and abs(value) < _MOST
    if hint is float:
        return type(value) in (int, float)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, hint)
    return type(value) is (get_origin(hint) or hint)


@lru_cache(maxsize=64)
def _hints(kind: type) -> list[tuple[str, Any]]:
    known = get_type_hints(kind)
    return [(field.name, known[field.name]) for field in fields(kind)]


def _other(value: Any, hint: Any, where: str) -> TypeError:
    name = getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)
    return TypeError(f"{where.lstrip('.') or 'it'} is {str(value)[:40]!r}, not of type {name}")
