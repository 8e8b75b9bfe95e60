"""Every setting with its type, default and meaning, read from the classes that define it: for help, docs and
suggestions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from inspect import cleandoc, getsource
from typing import Any, get_type_hints

from infscan.config.schema import MISSING, not_given


@dataclass(frozen=True)
class Setting:
    """One key. choices: of an enum. is_text: whether its value is taken as it is typed. is_open: whether keys below
    it are the user's own (labels)."""

    key: str
    type: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()
    is_text: bool = False
    is_open: bool = False


def settings_of(kind: type, prefix: str = "", given: Any = None) -> Iterator[Setting]:
    """Every setting of a dataclass and of the groups within it, in the order of the fields; lists of groups under `N`.

    given: the group as an outer class sets it; a key that it leaves open is inherited.
    """
    hints, meanings = get_type_hints(kind), _meanings(kind)
    # A group of mandatory keys alone is open by itself.
    is_inherited = given is not None and given == not_given(kind) != kind()
    for one in fields(kind):
        key, hint = f"{prefix}{one.name}", hints[one.name]
        default = one.default_factory() if callable(one.default_factory) else one.default
        own = default if given is None else getattr(given, one.name)
        if is_dataclass(default):
            yield from settings_of(type(default), f"{key}.", own)
            continue
        yield Setting(
            key=key,
            type=_type_name(hint),
            default="inherited"
            if own == MISSING and is_inherited
            else str(one.metadata.get("default", _default(default))),
            meaning=meanings.get(one.name, ""),
            choices=_choices(hint),
            is_text=_is_text(hint),
            is_open=isinstance(default, dict),
        )
        for item in getattr(hint, "__args__", ()):
            if is_dataclass(item) and isinstance(item, type):
                yield from settings_of(item, f"{key}.N.", item())


@cache
def _module(name: str) -> ast.Module:
    return ast.parse(getsource(sys.modules[name]))


@cache
def _meanings(kind: type) -> dict[str, str]:
    """The string below each field of a dataclass, its bases' fields included."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        if not is_dataclass(one):
            continue
        for node in ast.walk(_module(one.__module__)):
            if isinstance(node, ast.ClassDef) and node.name == one.__name__:
                found |= dict(_documented(node))
    return found


def _documented(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field_, below in zip(node.body, node.body[1:], strict=False):
        if not isinstance(field_, ast.AnnAssign) or not isinstance(field_.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            yield field_.target.id, " ".join(cleandoc(str(below.value.value)).split())


def _is_text(hint: Any) -> bool:
    """Text, text or null, text by label; a list or a number is Hydra's to read."""
    parts = {part for part in getattr(hint, "__args__", None) or (hint,) if part is not type(None)}
    return parts in ({str}, {Any}) and getattr(hint, "__origin__", None) is not list


def _enum(hint: Any) -> type[Enum] | None:
    for one in (hint, *getattr(hint, "__args__", ())):
        if isinstance(one, type) and issubclass(one, Enum):
            return one
    return None


def _choices(hint: Any) -> tuple[str, ...]:
    enum = _enum(hint)
    return tuple(str(member.value) for member in enum) if enum else ()


def _type_name(hint: Any) -> str:
    """`int`, `int or null`, `text`, `one of a, b`."""
    parts = getattr(hint, "__args__", ()) if type(None) in getattr(hint, "__args__", ()) else (hint,)
    known = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "Any": "text or list"}
    named = []
    for part in parts:
        if part is type(None):
            continue
        if _choices(part):
            named.append(" | ".join(_choices(part)))
        elif getattr(part, "__origin__", None) is list:
            item = part.__args__[0]
            named.append("list" if is_dataclass(item) else f"list of {known.get(item.__name__, item.__name__)}s")
        elif getattr(part, "__origin__", None) is dict:
            named.append("text by label")
        else:
            named.append(known.get(getattr(part, "__name__", str(part)), str(part)))
    return " or ".join(named)


def _default(value: Any) -> str:
    if value == MISSING:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list) and any(isinstance(one, Enum) for one in value):
        return str([one.value for one in value])
    return str(value) if value not in ({}, []) else "empty"
