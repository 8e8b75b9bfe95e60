"""What a user points at: corpus files by path, glob or URI, and model folders that may live in an object store."""

import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from fsspec.utils import glob_translate

from infscan.errors import StorageError
from infscan.secrets import redact
from infscan.storage.address import checked_name, join, normalise, scheme_of, tag
from infscan.storage.allowed import cache_folder
from infscan.storage.local import LocalDisk
from infscan.storage.remote import ObjectStore
from infscan.storage.store import Entry, Store, backend_of

_MAGIC = re.compile(r"[*?\[]")
_DOWNLOADS = 4  # files at a time
_CHUNK_BYTES = 16 << 20
_POINTER_BYTES = 1024
# What is said of such a file.
LFS_POINTER = "is a pointer of Git LFS, not the file itself; run `git lfs pull` in the clone, or download the file"


@dataclass(frozen=True, slots=True)
class InputFile:
    """An input as it was when it was looked at: address, bytes, and the store's ETag or a digest of size and mtime."""

    uri: str
    size: int
    etag: str


def expand(pattern: str) -> list[InputFile]:
    """The files that a file's name, a folder, a glob (`*`, `?`, `[...]`, `**`) or a URI names, sorted by address.

    Folders are read recursively; names that start with '.' or '_' (markers, temporary folders) are left out unless the
    pattern spells them. Raises StorageError where nothing is there.
    """
    address = normalise(pattern)
    backend = backend_of(address)
    exact = backend.stat(address)
    if exact is not None:
        return [InputFile(address, exact.size, exact.etag)]
    root, relative = _split_pattern(address)
    found = [f for f in backend.find(address) if not _is_hidden(f.name)]
    files = [InputFile(join(address, f.name), f.size, f.etag) for f in found]
    if not files and relative:
        spelt = _is_hidden(relative)
        if isinstance(backend, LocalDisk):
            files = _glob_local(root, relative, spelt)
        else:
            matches = re.compile(glob_translate(relative))
            found = [
                f for f in backend.find(root) if _is_matched(f.name, matches) and (spelt or not _is_hidden(f.name))
            ]
            files = [InputFile(join(root, f.name), f.size, f.etag) for f in found]
    if not files:
        raise StorageError(redact(f"{pattern}: {_nothing(backend, address, bool(relative))}"))
    return sorted(files, key=lambda file: file.uri)


def _nothing(backend: LocalDisk | ObjectStore, address: str, is_pattern: bool) -> str:
    """Why a pattern names no file."""
    hidden = next(iter(sorted(one.name for one in backend.find(address))), None)
    if hidden is not None:
        return (
            f"all that is there is left out, as its names begin with '.' or '_' ({hidden}); rename the files, or spell "
            "that name in a glob"
        )
    if is_pattern:
        return "no file matches; check the pattern (*, ?, [...], and ** for any folders)"
    if scheme_of(address) == "file" and os.path.isdir(address):
        return "no file is in this folder; put some there, or name another"
    return "there is no such file or folder; check the path (download what is on a hub or a web page first)"


def root_of(pattern: str, uri: str) -> str:
    """The folder below which `expand` found a file: the one named, or the one before a glob's first wildcard."""
    address = normalise(pattern)
    return (address if uri.startswith(f"{address}/") else _split_pattern(address)[0]).rstrip("/")


def open_input(uri: str) -> BinaryIO:
    """A seekable stream of one input file; StorageError where it is missing or refused."""
    address = normalise(uri)
    return backend_of(address).open(address)


def changed(file: InputFile) -> str | None:
    """How the file differs from what it was when it was looked at (`has 5 bytes now and had 4`), or None.

    Raises StorageError where it is missing or refused.
    """
    now = backend_of(file.uri).stat(file.uri)
    if now is None:
        return "is gone"
    if now.size != file.size:
        return f"has {now.size} bytes now and had {file.size} when it was listed"
    if now.etag != file.etag:
        return "has another ETag (or time of change) now than when it was listed"
    return None


def read_range(uri: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of one input file, and no others; StorageError where they are not all there."""
    address = normalise(uri)
    return backend_of(address).read_range(address, start, stop) if stop > start else b""


def is_lfs_pointer(file: InputFile) -> bool:
    """Whether a file is what a Git clone without Git LFS has in its place."""
    head = b"version https://git-lfs.github.com/spec/"
    return len(head) <= file.size <= _POINTER_BYTES and read_range(file.uri, 0, len(head)) == head


def look_up(uri: str) -> InputFile | None:
    """One input file as it is now; None where there is no such file."""
    address = normalise(uri)
    found = backend_of(address).stat(address)
    return None if found is None else InputFile(address, found.size, found.etag)


def localise(uri: str, suffixes: tuple[str, ...], *, nested: bool = True) -> Path:
    """A local folder with the files of `uri` whose names end in one of `suffixes`; nested: those in its folders too.

    A local folder is returned as it is. A remote one is downloaded once, whole or not at all, into
    `$INFSCAN_CACHE` (`~/.cache/infscan`), under a name that changes when any of its files does.
    """
    store = Store(uri)
    local = store.local_path()
    if local is not None:
        if not local.is_dir():
            raise StorageError(f"{local} is no folder; check the path")
        return local
    entries = _wanted(store, suffixes, nested)
    if not entries:
        raise StorageError(f"{store.uri}: no {' or '.join(suffixes)} file is there; check the address")
    cache = cache_folder()
    target = cache / tag(store.uri, [(e.name, e.size, e.etag) for e in entries])
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(target.with_suffix(".lock"), "wb") as lock:
            with suppress(OSError):  # only spares the ranks of one machine from each downloading the same files
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                _download(store, entries, lambda: _wanted(store, suffixes, nested), target)
    except OSError as error:
        raise StorageError(f"{cache}: {error.strerror or error}; set INFSCAN_CACHE to a folder with space") from error
    return target


def _wanted(store: Store, suffixes: tuple[str, ...], nested: bool) -> list[Entry]:
    found = [e for e in store.list() if e.name.endswith(suffixes) and (nested or "/" not in e.name)]
    # An object's name may hold '..'; a file of the cache must not.
    return [e for e in found if checked_name(e.name)]


def _download(store: Store, entries: list[Entry], again: Callable[[], list[Entry]], target: Path) -> None:
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            list(pool.map(lambda entry: _fetch(store, entry, partial / entry.name), entries))
        if again() != entries:
            raise StorageError(f"{store.uri} changed while it was downloaded; run again when it is complete")
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # another process was quicker, with the same bytes
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch(store: Store, entry: Entry, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with store.open(entry.name) as source, open(path, "xb") as file:
        shutil.copyfileobj(source, file, _CHUNK_BYTES)
        file.flush()
        os.fsync(file.fileno())


def _split_pattern(address: str) -> tuple[str, str]:
    """The folder before the first part with a wildcard, and the rest ('' where there is none)."""
    wildcard = _MAGIC.search(address)
    if not wildcard:
        return address, ""
    cut = address.rindex("/", 0, wildcard.start())
    root, relative = address[:cut], address[cut + 1 :]
    if root.endswith(":/"):
        if scheme_of(address) != "memory":
            raise StorageError(f"{address}: the bucket itself cannot be a pattern; name it")
        root += "/"
    return root or "/", relative


def _glob_local(root: str, relative: str, spelt: bool) -> list[InputFile]:
    disk = LocalDisk()
    files: dict[str, InputFile] = {}
    for name in glob.glob(relative, root_dir=root, recursive=True, include_hidden=True):
        path = join(root, name.rstrip("/"))
        status = disk.stat(path)
        found = (
            [(name, path, status)] if status else [(join(name, f.name), join(path, f.name), f) for f in disk.find(path)]
        )
        files.update({p: InputFile(p, s.size, s.etag) for n, p, s in found if spelt or not _is_hidden(n)})
    return list(files.values())


def _is_matched(name: str, pattern: re.Pattern[str]) -> bool:
    """True where the name matches, or a folder above it does: a matched folder includes what is below it."""
    return any(pattern.match(str(path)) for path in (PurePosixPath(name), *PurePosixPath(name).parents))


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))
