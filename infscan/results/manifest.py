"""_SUCCESS: the manifest of a finished run. It is created last, by one conditional put, and readers follow it.

It lists every part that was published, with rows, bytes and SHA-256, the counts, what made the run, and the token of
the driver that committed it. An empty _SUCCESS is of infscan 0.1: such a run's parts are those that lie there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from infscan.config import checksum_ok, with_checksum
from infscan.errors import DamagedError, RunError
from infscan.storage import MissingError, Store
from infscan.storage.foreign import parse_json
from infscan.storage.shapes import check_types

SUCCESS = "_SUCCESS"
TABLES = ("top", "layers", "tokens", "documents", "answers", "sequences")
_SCHEMA_VERSION = 1
_NAME = re.compile(r"part-\d{5}(-[0-9a-f]{12})?\.parquet")


@dataclass(frozen=True)
class Part:
    """A file of a publication. rows: None where it is no table."""

    size: int
    sha256: str
    rows: int | None = None

    @staticmethod
    def of(data: bytes, rows: int | None = None) -> Part:
        return Part(len(data), sha256(data).hexdigest(), rows)

    def check(self, where: str, data: bytes) -> None:
        """Raises DamagedError where a file's bytes are not those that were committed."""
        if len(data) != self.size or sha256(data).hexdigest() != self.sha256:
            raise DamagedError(
                f"{where} is not what {SUCCESS} says was published ({self.size} bytes, SHA-256 {self.sha256[:12]}); "
                "give the run's own command again, which publishes it again, or restore it."
            )


@dataclass(frozen=True)
class Manifest:
    """A committed publication.

    parts: by name. scores: bytes of every part of scores/, by name; None where the run has none. scan: the fingerprint
    that every shard's footer has. made_by: as of `infscan.steps.provenance`.
    """

    token: str
    parts: Mapping[str, Part]
    scores: Mapping[str, int] | None
    scan: str
    counts: Mapping[str, Any]
    made_by: Mapping[str, Any]

    def names(self, folder: str) -> list[str]:
        """The parts of a table, in order."""
        return sorted(name for name in self.parts if name.startswith(f"{folder}/") and name.endswith(".parquet"))

    def to_bytes(self) -> bytes:
        value = with_checksum({"schema_version": _SCHEMA_VERSION, **asdict(self)})
        return json.dumps(value, indent=1).encode() + b"\n"


def table_part_name(folder: str, part: int, data: bytes) -> str:
    """What a part is called: after its content, so that no writer ever puts other bytes under a name that is taken."""
    return f"{folder}/part-{part:05d}-{sha256(data).hexdigest()[:12]}.parquet"


def is_table_part(name: str) -> bool:
    """Whether infscan makes names such as this one (folder and all); what else is there is somebody's own."""
    folder, _, file = name.rpartition("/")
    return folder in TABLES and _NAME.fullmatch(file) is not None


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a finished run; None where infscan 0.1 finished it.

    Raises:
        MissingError: where the run is not finished.
        DamagedError: where it is not what was written.
        RunError: for one that a newer infscan wrote.
    """
    data = store.read(SUCCESS)
    if not data:
        return None
    try:
        value = parse_json(data)
    except ValueError:
        value = None
    damaged = f"{store.uri}/{SUCCESS} is damaged; give the run's own command again, which publishes again."
    if not checksum_ok(value):
        raise DamagedError(damaged)
    version = value.get("schema_version")
    if type(version) is int and version > _SCHEMA_VERSION:
        raise RunError(f"{store.uri}/{SUCCESS} is of a newer infscan; upgrade infscan to read this run.")
    try:
        parts = {name: Part(**part) for name, part in value["parts"].items()}
        found = Manifest(**{key: value[key] for key in Manifest.__dataclass_fields__} | {"parts": parts})
        check_types(found, Manifest)
    except (KeyError, TypeError, AttributeError) as error:
        # With a checksum of its own: nobody's accident.
        raise DamagedError(f"{damaged} ({error})") from None
    return found


def commit(store: Store, manifest: Manifest, fence: Callable[[], None]) -> None:
    """Create _SUCCESS, which makes the publication the run's; whoever holds the lease has the last word.

    fence: raises where this driver holds it no longer.
    """
    while True:
        fence()
        if store.create(SUCCESS, manifest.to_bytes()) or _token(store) == manifest.token:
            return
        # A driver that lost the lease came first, with parts of its own.
        fence()
        store.remove(SUCCESS)


def _token(store: Store) -> str | None:
    try:
        there = read_manifest(store)
    except (MissingError, DamagedError):
        return None
    return there.token if there else None
