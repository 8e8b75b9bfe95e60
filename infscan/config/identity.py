"""What tells one run, input or file from another: canonical values, their fingerprints, and how two settings differ."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from enum import Enum
from typing import Any

# Fields that may differ when a run is resumed: they change where and how fast, never what.
RUN_TIME_FIELDS = (
    "output",
    "cluster.",
    "resume.",
    "model.sharding",
    "model.zero.",
    "model.gradient_checkpointing",
    "scan.allow_quarantined",
    "corpus.allow_bad_",
    "factors.corpus.allow_bad_",
    "scan.max_nonfinite",
    "factors.max_group_bytes",
    "scan.query_group_bytes",
    "scan.refine_group_bytes",
    # A path says where an input is; what is there is compared by its content's fingerprint.
    "model.path",
    "model.revision",
    "corpus.path",
    "queries.path",
    "factors.path",
    "factors.corpus.path",
)
_STAGE = re.compile(r"stages\.\d+\.(model$|revision$)?")


def plain(value: Any) -> Any:
    """Dataclasses and enums as plain JSON values."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of a value's canonical JSON: sorted keys, no spaces, dataclasses and enums made plain."""
    return _digest(plain(value))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


_SEAL = "seal"


def with_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the fingerprint of its content, by which damage shows."""
    return value | {_SEAL: fingerprint(value)}


def checksum_ok(value: Any) -> bool:
    """Whether a value read back from JSON is an object that `with_checksum` gave, unchanged."""
    if not isinstance(value, dict):
        return False
    try:
        return value.get(_SEAL) == _digest(without_checksum(value))
    except RecursionError:
        return False


def seal_of(value: dict[str, Any]) -> str:
    """The fingerprint that `with_checksum` added."""
    return str(value[_SEAL])


def without_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """What was given to `with_checksum`."""
    return {key: item for key, item in value.items() if key != _SEAL}


def differences(before: Any, after: Any) -> list[str]:
    """`key: before -> after` for every leaf that differs between two plain settings, run-time fields left out."""
    old, new = dict(resume_keys(before)), dict(resume_keys(after))
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def resume_keys(settings: Any) -> list[tuple[str, Any]]:
    """(key, value) of every leaf of plain settings that a resume may not change, by key."""
    return sorted(
        (key, value) for key, value in leaves(plain(settings)) if not unstaged(key).startswith(RUN_TIME_FIELDS)
    )


def unstaged(key: str) -> str:
    """A stage's key as it would be called at the top: stages.1.corpus.path is corpus.path, stages.1.model is
    model.path, stages.1.revision is model.revision."""
    names = {"model": "model.path", "revision": "model.revision", None: ""}
    return _STAGE.sub(lambda found: names[found[1]], key)


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {str(number): item for number, item in enumerate(value)}
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
