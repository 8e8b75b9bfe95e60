"""Object stores through fsspec: no cached listings, finite timeouts, one retry for all, errors that say the fix."""

import hashlib
import io
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.asyn import sync

from infscan.errors import StorageError, UnwritableError
from infscan.secrets import redact
from infscan.storage import s3
from infscan.storage.address import Entry, MissingError, is_temporary, join, scheme_of, tag
from infscan.storage.error_mapping import (
    ChangedError,
    CutOffError,
    explained,
    is_lost_race,
    is_unsupported,
    passing_kind,
)
from infscan.storage.locations import Location, location_of
from infscan.storage.retry import RetryPolicy
from infscan.storage.tempnames import is_abandoned

CONNECT_TIMEOUT_S = 5
BUFFER_BYTES = 4 << 20
# A listing takes a request per thousand names: this many times a single request's time for all of them.
_LISTING = 20

_S3_SCHEMES = {"s3", "s3a"}
# Stores in which an object is whole or absent, whoever writes it; the last is of one process.
_WHOLE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory")
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL")
_SETTINGS = ("AWS_", "FSSPEC_", "GOOGLE_", "AZURE_", "HF_", "INFSCAN_STORAGE_")
_memory_lock = threading.Lock()
log = logging.getLogger("infscan")
T = TypeVar("T")


def connect(address: str) -> "ObjectStore":
    """The store that the URI's scheme names, with the settings that the environment has now."""
    settings = sorted((name, value) for name, value in os.environ.items() if name.startswith(_SETTINGS))
    scheme = scheme_of(address)
    place = location_of(address) if scheme in _S3_SCHEMES else Location()
    given = () if scheme in _S3_SCHEMES else _of_address(scheme, address)
    return _connect(scheme, place, given, os.getpid(), hashlib.sha256(repr(settings).encode()).hexdigest())


@lru_cache(maxsize=8)
def _connect(
    scheme: str, place: Location, given: tuple[tuple[str, Any], ...], _process: int, _settings: str
) -> "ObjectStore":
    retry = RetryPolicy.from_environment()
    # fsspec's own cache would hand back a client with the credentials of an earlier environment.
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    endpoint = None
    if scheme in _S3_SCHEMES:
        endpoint = place.endpoint_url or next(filter(None, map(os.environ.get, _ENDPOINT_VARIABLES)), None)
        options["config_kwargs"] = {
            "connect_timeout": min(CONNECT_TIMEOUT_S, retry.timeout_s),
            "read_timeout": retry.timeout_s,  # for each wait on the socket
            "retries": {"total_max_attempts": 1},  # ObjectStore retries, for every call and every store alike
        }
        if endpoint:
            # Many S3-compatible servers do not know the checksum trailers that AWS's client sends by default.
            options["config_kwargs"]["request_checksum_calculation"] = "when_required"
            options["endpoint_url"] = endpoint
        options |= _of_place(place)
    try:
        filesystem = fsspec.filesystem(scheme, **options, **dict(given))
    except Exception as error:  # every driver raises errors of its own
        raise _unopened(scheme, error) from error
    if scheme in _S3_SCHEMES:
        filesystem.retries = 1
    return ObjectStore(filesystem, scheme, endpoint, retry)


def _of_address(scheme: str, address: str) -> tuple[tuple[str, Any], ...]:
    """What a driver wants to know of an address before it opens one: the host of sftp://, the account of abfss://."""
    try:
        options: dict[str, Any] = fsspec.get_filesystem_class(scheme)._get_kwargs_from_urls(address)
        found = tuple(sorted(options.items()))
        hash(found)
    except Exception as error:  # every driver raises errors of its own
        raise _unopened(scheme, error) from error
    return found


def _unopened(scheme: str, error: Exception) -> StorageError:
    reason = redact(" ".join(str(error).split()) or type(error).__name__)
    return StorageError(f"{scheme}:// cannot be opened ({reason[:300]}); install its fsspec driver or use s3://")


def _of_place(place: Location) -> dict[str, Any]:
    """A place's settings, as s3fs calls them."""
    named = {"anon": place.anonymous, "requester_pays": place.requester_pays, "profile": place.profile}
    found: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    return found | ({} if place.region is None else {"client_kwargs": {"region_name": place.region}})


@dataclass(frozen=True)
class ObjectStore:
    """One kind of object store; every address is a full URI. An object is put in one piece, or not at all."""

    fs: Any
    scheme: str
    endpoint: str | None
    retry: RetryPolicy

    def brief(self) -> "ObjectStore":
        """The same store, given up sooner."""
        return replace(self, retry=self.retry.brief())

    def read(self, uri: str) -> bytes:
        """All bytes of one version of the object, as many as its store promised."""
        if self.scheme in _S3_SCHEMES:
            return self._call(uri, lambda: self._wait(s3.get(self.fs, uri, self.retry)))

        def request() -> bytes:
            size = int(self._ask("info", uri)["size"] or 0)
            data = bytes(self._ask("cat_file", uri, size=size))
            if len(data) != size:
                raise CutOffError(f"{len(data)} bytes came of {size}")
            return data

        return self._call(uri, request)

    def open(self, uri: str) -> BinaryIO:
        """A seekable stream of one version that fetches ranges of at least 4 MiB, each retried on its own."""
        found = self._info(uri)
        if found is None:
            raise MissingError(redact(f"{uri}: there is no such object; check the address"))
        ranges = partial(self._range, uri, _found("", found), found.get("ETag"))
        return io.BufferedReader(_Ranges(ranges, int(found.get("size") or 0)), BUFFER_BYTES)

    def read_range(self, uri: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of an object that has at least as many, by one ranged request."""
        return self._range(uri, None, None, start, stop)

    def _range(self, uri: str, version: Entry | None, etag: str | None, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of one version (None: whatever is there)."""

        def request() -> bytes:
            if self.scheme in _S3_SCHEMES:
                return self._wait(s3.get_range(self.fs, uri, start, stop, etag, self.retry))
            data = bytes(self._ask("cat_file", uri, size=stop - start, start=start, end=stop))
            if len(data) != stop - start:
                if version is not None and self.stat(uri) != version:
                    raise ChangedError
                raise CutOffError(f"{len(data)} bytes came of {stop - start}")
            return data

        try:
            return self._call(uri, request, passing=_but_not_changed)
        except StorageError as error:
            if isinstance(error.__cause__, ChangedError):
                raise StorageError(redact(f"{uri}: the object changed while it was read; read it again")) from error
            raise

    def _check_whole(self, uri: str) -> None:
        if self.scheme not in _WHOLE:
            raise UnwritableError(
                redact(
                    f"{uri}: a file that is written through {self.scheme}:// is seen before it is whole, so no results "
                    f"go there; give a folder, or an address of {', '.join(f'{one}://' for one in _WHOLE[:-1])}"
                )
            )

    def write(self, uri: str, data: bytes) -> None:
        self._check_whole(uri)
        # s3fs puts below 100 MB in one request; above, in parts that it aborts on failure. Neither shows a half.
        self._call(uri, lambda: self._ask("pipe_file", uri, data, size=len(data)), writing=True)

    def create(self, uri: str, data: bytes) -> bool:
        """A conditional put. Where an attempt's answer was lost, the next one loses against it: the content tells.

        The HTTP client asks again by itself where a kept connection broke, so that even a first attempt may be a next.
        Where the store lacks conditional puts, the check and the put are two steps, and the last writer of a race wins.
        """
        self._check_whole(uri)
        if self.stat(uri) is not None:  # also guards against servers that ignore the condition
            return False

        def request() -> None:
            if self.scheme == "memory":
                with _memory_lock:
                    self._ask("pipe_file", uri, data, mode="create")
            else:
                self._ask("pipe_file", uri, data, size=len(data), mode="create")

        try:
            self._call(uri, request, writing=True)
        except StorageError as error:
            if is_lost_race(error.__cause__):
                return self._holds(uri, data)
            if not is_unsupported(error.__cause__):
                raise
            self.write(uri, data)
        return True

    def stat(self, uri: str) -> Entry | None:
        """The object at `uri`; None for nothing and for a prefix."""
        info = self._info(uri)
        return _found("", info) if info else None

    def find(self, root: str) -> list[Entry]:
        """Every object below the prefix `root`, asked for anew; nothing where there is none."""
        return [_found(name, info) for name, info in self._listing(root) if not is_temporary(name)]

    def names(self, root: str) -> list[str]:
        """As `find`, the names alone."""
        return [name for name, _ in self._listing(root) if not is_temporary(name)]

    def remove(self, uri: str) -> None:
        try:
            self._call(uri, lambda: self._ask("rm_file", uri), writing=True)
        except MissingError:
            return

    def sweep(self, root: str) -> int:
        """Removes hidden objects below `root` and aborts multipart uploads that their writers abandoned; how many."""
        removed = 0
        for name, info in self._listing(root):
            if is_temporary(name) and is_abandoned(name, _age_s(info)):
                try:
                    self.remove(join(root, name))
                    removed += 1
                except UnwritableError as error:
                    log.warning("an abandoned file is left: %s", error)
        if self.scheme in _S3_SCHEMES:
            try:
                removed += self._call(root, lambda: self._wait(s3.abort_abandoned_uploads(self.fs, root)))
            except StorageError as error:
                # A permission of its own, and not every server knows uploads: what is left behind costs space alone.
                log.warning("unfinished uploads of earlier attempts cannot be listed or removed: %s", error)
        return removed

    def _info(self, uri: str) -> dict[str, Any] | None:
        try:
            info: dict[str, Any] = self._call(uri, lambda: self._ask("info", uri))
        except MissingError:
            return None
        return info if info["type"] == "file" else None

    def _listing(self, root: str) -> list[tuple[str, dict[str, Any]]]:
        try:
            limit_s = _LISTING * self.retry.attempt_s()
            listing = self._call(root, lambda: self._ask("find", root, limit_s=limit_s, detail=True))
        except MissingError:
            return []
        base = str(self.fs._strip_protocol(root)).rstrip("/") + "/"
        # A name that ends in a slash is a folder's marker.
        names = ((name[len(base) :], info) for name, info in listing.items() if name.startswith(base))
        return [(name, info) for name, info in names if name and name[-1] != "/"]

    def _holds(self, uri: str, data: bytes) -> bool:
        try:
            return self.read(uri) == data
        except MissingError:
            return False

    def _ask(self, method: str, *arguments: Any, size: int = 0, limit_s: float = 0.0, **options: Any) -> Any:
        """One attempt at a driver's method that moves `size` bytes; TimeoutError where it does not end in time."""
        limit_s = limit_s or self.retry.attempt_s(size)
        if self.fs.async_impl:
            return self._wait(getattr(self.fs, f"_{method}")(*arguments, **options), limit_s)
        call = getattr(self.fs, method)
        if self.scheme == "memory":
            return call(*arguments, **options)
        return _within(limit_s, lambda: call(*arguments, **options))

    def _wait(self, request: Awaitable[T], limit_s: float | None = None) -> T:
        async def same() -> T:
            return await request

        result: T = sync(self.fs.loop, same, timeout=limit_s)
        return result

    def _call(
        self,
        uri: str,
        request: Callable[[], T],
        *,
        writing: bool = False,
        passing: Callable[[Exception], str | None] = passing_kind,
    ) -> T:
        """`request()`, again while the store is busy or out of reach; StorageError when it stays so or refuses."""

        def explain(error: Exception, attempts: int) -> StorageError:
            return explained(error, uri, self.endpoint, attempts, writing=writing)

        return self.retry.call_with_retry(request, passing, explain)


def _but_not_changed(error: Exception) -> str | None:
    return None if isinstance(error, ChangedError) else passing_kind(error)


def _within(limit_s: float, request: Callable[[], T]) -> T:
    """`request()` in a thread that is left behind where it does not end in time: a driver may have no timeouts."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(request())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {limit_s:g} s")
    return results[0]


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


# Where drivers say when an object was last written.
_MOMENTS = ("LastModified", "last_modified", "mtime", "created")


def _found(name: str, info: dict[str, Any]) -> Entry:
    size = int(info.get("size") or 0)
    etag = str(info.get("ETag") or info.get("etag") or "").strip('"')
    moments = [_moment(info.get(key)) for key in ("created", "mtime", "LastModified", "last_modified")]
    return Entry(name, size, etag or tag(size, *map(str, moments)), _modified(info))


def _age_s(info: dict[str, Any]) -> float:
    moments = (info.get(key) for key in _MOMENTS)
    moment = next((moment for moment in moments if isinstance(moment, datetime)), None)
    return time.time() - moment.timestamp() if moment else 0.0


def _modified(info: dict[str, Any]) -> float | None:
    moments = (_moment(info.get(key)) for key in _MOMENTS)
    return next((float(moment) for moment in moments if isinstance(moment, int | float)), None)


def _moment(value: Any) -> Any:
    """A listing may give a number where a look at the one object gives a date: the same moment is one value."""
    return value.timestamp() if hasattr(value, "timestamp") else value
