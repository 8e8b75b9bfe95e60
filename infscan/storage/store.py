"""A folder or an object-store prefix, with the few operations that a run needs of it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from infscan.errors import StorageError
from infscan.storage import remote
from infscan.storage.address import Entry, checked_name, join, normalise, scheme_of
from infscan.storage.foreign import parse_stored
from infscan.storage.local import LocalDisk
from infscan.storage.tempnames import temporary_name


def backend_of(address: str) -> LocalDisk | remote.ObjectStore:
    """What reads and writes a normalised address."""
    return LocalDisk() if scheme_of(address) == "file" else remote.connect(address)


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON, keys in their own order. NaN and infinity are a ValueError."""
    return f"{json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)}\n".encode()


@dataclass(frozen=True)
class Store:
    """A folder (plain path, file://) or a prefix (s3://bucket/prefix, memory://). Holds only its address: it pickles.

    Names are relative and '/'-separated. Every method raises StorageError with the place, the reason and the fix.
    """

    uri: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", normalise(self.uri))

    def __truediv__(self, name: str) -> "Store":
        return Store(self._address(name))

    def __str__(self) -> str:
        return self.uri

    def read(self, name: str) -> bytes:
        """The bytes of a file; MissingError (a StorageError) where it is not there."""
        return self._backend.read(self._address(name))

    def open(self, name: str) -> BinaryIO:
        """A seekable, buffered stream for reading parts of a large file."""
        return self._backend.open(self._address(name))

    def mapped(self, name: str) -> memoryview | None:
        """A local file's bytes, mapped into memory and read as they are used; None for an object store."""
        backend = self._backend
        return backend.mapped(self._address(name)) if isinstance(backend, LocalDisk) else None

    def write(self, name: str, data: bytes) -> None:
        """Puts `data` under `name`, replacing what was there: readers see all of the old or all of the new bytes."""
        self._backend.write(self._address(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Puts `data` under `name` if nothing is there; False where something else was. Read back what was created.

        Of writers at once exactly one wins, apart from those that bring the same bytes.
        """
        return self._backend.create(self._address(name), data)

    def exists(self, name: str) -> bool:
        """True for a file (not a folder) that is there now."""
        return self._backend.stat(self._address(name)) is not None

    def top_names(self) -> list[str]:
        """Files and folders right in a local folder, hidden ones left out; [] for an object store."""
        backend = self._backend
        return backend.top_names(self.uri) if isinstance(backend, LocalDisk) else []

    def names(self, prefix: str = "") -> list[str]:
        """As `list`, the names alone and in no order: for folders of a million files."""
        prefix = prefix.rstrip("/")
        names = self._backend.names(self._folder(prefix))
        return [join(prefix, name) for name in names] if prefix else names

    def list(self, prefix: str = "", suffix: str = "") -> list[Entry]:
        """Every file below the folder `prefix` whose name ends in `suffix`, by name; [] where there is no such folder.

        Names are relative to this store, as the other methods take them.
        """
        prefix = prefix.rstrip("/")
        found = self._backend.find(self._folder(prefix))
        entries = (replace(f, name=join(prefix, f.name)) if prefix else f for f in found)
        return sorted((e for e in entries if e.name.endswith(suffix)), key=lambda e: e.name)

    def remove(self, name: str) -> None:
        """Removes a file; one that is not there is fine."""
        self._backend.remove(self._address(name))

    def read_json(self, name: str) -> Any:
        """The value of a JSON file; StorageError where it is not JSON."""
        return parse_stored(self.read(name), self._address(name))

    def write_json(self, name: str, value: Any) -> None:
        """Writes `value` as indented JSON, keys in their own order. NaN and infinity are a ValueError."""
        self.write(name, json_bytes(value))

    def local_path(self, name: str = "") -> Path | None:
        """The file or folder as a path of this machine; None for an object store."""
        if scheme_of(self.uri) != "file":
            return None
        return Path(self._address(name) if name else self.uri)

    def sweep(self) -> int:
        """Removes what writers that are gone left unfinished below this folder; how many files and uploads.

        Safe beside living writers: theirs are left alone, and one that is taken for dead writes anew (docs/storage.md).
        """
        return self._backend.sweep(self.uri)

    def check_writable(self) -> None:
        """Writes, reads back and removes a small hidden file: finds what would stop a run before it costs anything.

        A store that does not answer is given up after seconds, not minutes.
        """
        name = temporary_name()
        address, backend = self._address(name), self._backend
        if isinstance(backend, remote.ObjectStore):
            backend = backend.brief()
        try:
            backend.write(address, name.encode())
            back = backend.read(address)
            backend.remove(address)
        except StorageError as error:
            raise type(error)(str(error).replace(f"/{name}", "")) from error
        if back != name.encode():
            raise StorageError(f"{self.uri}: what was written does not read back; choose another place")
        if isinstance(backend, LocalDisk):
            backend.check_space(self.uri)

    @contextmanager
    def removed_unless_used(self) -> Iterator[None]:
        """At its end a local folder that was not there before, and in which nothing was kept, is not there either."""
        path = self.local_path()
        made = [] if path is None else [one for one in (path, *path.parents) if not one.exists()]
        try:
            yield
        finally:
            below = [folder for folder, _, _ in os.walk(made[0], topdown=False)] if made else []
            for folder in (*below, *map(str, made[1:])):
                with suppress(OSError):  # it holds something
                    os.rmdir(folder)

    def free_bytes(self) -> int | None:
        """What the disk of this folder still takes; None for an object store."""
        backend = self._backend
        return backend.free_bytes(self.uri) if isinstance(backend, LocalDisk) else None

    def _folder(self, prefix: str) -> str:
        return self._address(prefix) if prefix else self.uri

    @property
    def _backend(self) -> LocalDisk | remote.ObjectStore:
        return backend_of(self.uri)

    def _address(self, name: str) -> str:
        return join(self.uri, checked_name(name))
