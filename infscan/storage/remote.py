"""Object stores through fsspec: no cached listings, finite timeouts, one bounded retry, errors that say the mend."""

import hashlib
import io
import os
import random
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, BinaryIO, TypeVar

import fsspec

from infscan.errors import StorageError
from infscan.storage.address import Entry, MissingError, is_temporary, redact, scheme_of, tag
from infscan.storage.trouble import explained, is_lost_race, is_transient, is_unsupported

ATTEMPTS = 5
FIRST_PAUSE_S = 0.25  # doubled after every attempt, with jitter: below 4 s in all
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30  # for each wait on the socket, not for a whole object
BUFFER_BYTES = 4 << 20

_S3_SCHEMES = {"s3", "s3a"}
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL")
_SETTINGS = ("AWS_", "FSSPEC_", "GOOGLE_", "AZURE_", "HF_")
_memory_lock = threading.Lock()
T = TypeVar("T")


def connect(address: str) -> "ObjectStore":
    """The store that the URI's scheme names, with the settings that the environment has now."""
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith(_SETTINGS))
    return _connect(scheme_of(address), os.getpid(), hashlib.sha256(repr(settings).encode()).hexdigest())


@lru_cache(maxsize=8)
def _connect(scheme: str, _process: int, _settings: str) -> "ObjectStore":
    # fsspec's own cache would hand back a client with the credentials of an earlier environment.
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    endpoint = None
    if scheme in _S3_SCHEMES:
        endpoint = next(filter(None, map(os.environ.get, _ENDPOINT_VARIABLES)), None)
        retries = {"total_max_attempts": 1}  # ObjectStore retries, for every call and every store alike
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": retries,
        }
        if endpoint:
            # Many S3-compatible servers do not know the checksum trailers that AWS's client sends by default.
            options["config_kwargs"]["request_checksum_calculation"] = "when_required"
            options["endpoint_url"] = endpoint
    try:
        filesystem = fsspec.filesystem(scheme, **options)
    except (ImportError, ValueError) as error:
        raise StorageError(f"{scheme}:// cannot be opened ({error}); install its fsspec driver or use s3://") from error
    if scheme in _S3_SCHEMES:
        filesystem.retries = 1
    return ObjectStore(filesystem, scheme, endpoint)


class ObjectStore:
    """One kind of object store; every address is a full URI. An object is put in one piece, or not at all."""

    def __init__(self, filesystem: Any, scheme: str, endpoint: str | None) -> None:
        self._fs = filesystem
        self._scheme = scheme
        self._endpoint = endpoint

    def read(self, uri: str) -> bytes:
        return bytes(self._call(uri, lambda: self._fs.cat_file(uri)))

    def open(self, uri: str) -> BinaryIO:
        """A seekable stream that fetches ranges of at least 4 MiB, each retried on its own."""
        found = self.stat(uri)
        if found is None:
            raise MissingError(redact(f"{uri}: there is no such object; check the address"))

        def fetch(start: int, stop: int) -> bytes:
            data = bytes(self._call(uri, lambda: self._fs.cat_file(uri, start=start, end=stop)))
            if len(data) != stop - start:
                raise StorageError(
                    redact(
                        f"{uri}: bytes {start} to {stop} came back as {len(data)}; the object changed while it was read"
                    )
                )
            return data

        return io.BufferedReader(_Ranges(fetch, found.size), BUFFER_BYTES)

    def write(self, uri: str, data: bytes) -> None:
        # s3fs puts below 100 MB in one request; above, in parts that it aborts on failure. Neither shows a half.
        self._call(uri, lambda: self._fs.pipe_file(uri, data))

    def create(self, uri: str, data: bytes) -> bool:
        """A conditional put. A retry may lose against its own first attempt, so read back what was created.

        Where the store lacks conditional puts, the check and the put are two steps, and the last writer of a race wins.
        """
        if self.stat(uri) is not None:  # also guards against servers that ignore the condition
            return False
        try:
            if self._scheme == "memory":
                with _memory_lock:
                    self._call(uri, lambda: self._fs.pipe_file(uri, data, mode="create"))
            else:
                self._call(uri, lambda: self._fs.pipe_file(uri, data, mode="create"))
        except StorageError as error:
            if is_lost_race(error.__cause__):
                return False
            if not is_unsupported(error.__cause__):
                raise
            self.write(uri, data)
        return True

    def stat(self, uri: str) -> Entry | None:
        """The object at `uri`; None for nothing and for a prefix."""
        try:
            info = self._call(uri, lambda: self._fs.info(uri))
        except MissingError:
            return None
        return _found("", info) if info["type"] == "file" else None

    def find(self, root: str) -> list[Entry]:
        """Every object below the prefix `root`, asked for anew; nothing where there is none."""
        try:
            listing = self._call(root, lambda: self._fs.find(root, detail=True))
        except MissingError:
            return []
        base = str(self._fs._strip_protocol(root)).rstrip("/") + "/"
        entries = [(name[len(base) :], info) for name, info in listing.items() if name.startswith(base)]
        # A name that ends in a slash is a folder's marker.
        return [_found(name, info) for name, info in entries if name and name[-1] != "/" and not is_temporary(name)]

    def remove(self, uri: str) -> None:
        try:
            self._call(uri, lambda: self._fs.rm_file(uri))
        except MissingError:
            return

    def _call(self, uri: str, request: Callable[[], T]) -> T:
        """`request()`, again while the store is busy or out of reach; StorageError when it stays so or refuses."""
        for attempt in range(ATTEMPTS):
            try:
                return request()
            except Exception as error:  # drivers raise what they like; the cause is kept
                if attempt + 1 == ATTEMPTS or not is_transient(error):
                    raise explained(error, uri, self._endpoint, attempt + 1) from error
            time.sleep(FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1))
        raise AssertionError("the last attempt returns or raises")


class _Ranges(io.RawIOBase):
    """An object of `size` bytes as a seekable raw stream; `fetch(start, stop)` brings exactly these bytes."""

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch = fetch
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._size, self._position + len(buffer))
        count = max(0, stop - self._position)
        if count:
            buffer[:count] = self._fetch(self._position, stop)
            self._position = stop
        return count


def _found(name: str, info: dict[str, Any]) -> Entry:
    size = int(info.get("size") or 0)
    etag = str(info.get("ETag") or info.get("etag") or "").strip('"')
    moments = [info.get(key) for key in ("created", "mtime", "LastModified", "last_modified")]
    return Entry(name, size, etag or tag(size, *map(str, moments)))
