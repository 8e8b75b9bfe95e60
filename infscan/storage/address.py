"""Paths, URIs and names: what they mean, and which are refused."""

import hashlib
import os
import re
from dataclasses import dataclass, field

from infscan.errors import StorageError
from infscan.secrets import MEND, holds_secret, redact

TEMPORARY = ".tmp-"  # a name that starts so is a file still being written; no listing shows it

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+._-]*)://")
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class MissingError(StorageError):
    """The file or object is not there (its store answered, and the bucket exists)."""


@dataclass(frozen=True)
class Entry:
    """A file as its store describes it: its name relative to where one looked, its bytes, and a tag of its content.

    modified: when it was last written, in seconds since 1970 by the store's clock; for people, never for a decision.
    """

    name: str
    size: int
    etag: str
    modified: float | None = field(default=None, compare=False)
    # On a disk: the inode's change time in ns, and its number.
    changed: int | None = field(default=None, compare=False)
    inode: int | None = field(default=None, compare=False)


def is_uri(path: str) -> bool:
    """True for `scheme://...`, false for a plain path."""
    return _SCHEME.match(path) is not None


def scheme_of(address: str) -> str:
    """`file` for a plain path, else the URI's scheme in lower case."""
    match = _SCHEME.match(address)
    return match[1].lower() if match else "file"


def normalise(address: str) -> str:
    """The one spelling of an address: an absolute plain path, or `scheme://...` without a trailing slash.

    Raises StorageError for an empty address, one that carries credentials, and a URI without a bucket or with `..`.
    """
    if not address or "\0" in address:
        raise StorageError(f"{address!r} is no path or URI; give a folder, a file or something like s3://bucket/prefix")
    scheme = scheme_of(address)
    if scheme == "infscan":
        # What ships inside the package (the demo's model, corpus and queries), wherever it is installed.
        return join(_PACKAGE, checked_name(address[len("infscan://") :]))
    if scheme == "file":
        path = address[len("file://") :] if is_uri(address) else address
        return os.path.abspath(os.path.expanduser(path))
    if holds_secret(address):
        raise StorageError(f"{redact(address)} carries credentials, {MEND}")
    rest = address[address.index("://") + 3 :].rstrip("/")
    if not rest.strip("/") and scheme != "memory":
        raise StorageError(f"{address} names no bucket or host; write {scheme}://bucket/prefix")
    if ".." in rest.split("/"):
        raise StorageError(f"{address} holds '..', which object stores do not resolve; write the full prefix")
    return f"{scheme}://{rest.lstrip('/') if scheme == 'memory' else rest}"


def checked_name(name: str) -> str:
    """`name`, if it stays below its store: relative, '/'-separated, without empty, '.' or '..' parts.

    Raises StorageError otherwise; names may come from ids in a corpus or a query file.
    """
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise StorageError(f"{name!r} leaves its folder or has an empty part; use a relative name such as a/b.json")
    return name


def join(address: str, name: str) -> str:
    """`address/name`; `address` itself where the name is empty."""
    if not name:
        return address
    return f"{address}{name}" if address.endswith("/") else f"{address}/{name}"


def is_temporary(name: str) -> bool:
    """True for a file that is still being written."""
    return name.rpartition("/")[2].startswith(TEMPORARY)


def tag(*facts: object) -> str:
    """A short digest of facts that change when a file's content does, for stores that have no ETag."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
