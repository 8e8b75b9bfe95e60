"""What goes wrong in object stores: which errors pass with time, which mean a lost race, and what fixes the others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from http.client import IncompleteRead
from typing import Any

from infscan.errors import StorageError, UnwritableError
from infscan.secrets import redact
from infscan.storage.address import MissingError


class CutOffError(Exception):
    """Fewer bytes came than were promised."""


class ChangedError(Exception):
    """The object was replaced between two requests for its parts."""


_BUSY_CODES = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "ServiceUnavailable",
    "OperationAborted",
    "ConditionalRequestConflict",  # two conditional puts at once: ask again who won
}
_CUT_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}  # a body damaged on its way
_BROKEN_CODES = {"InternalError", "NoSuchUpload"}  # NoSuchUpload: another process took it for abandoned
_REFUSED_CODES = {
    "403",
    "401",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "Forbidden",
    "AllAccessDisabled",
    "AccountProblem",
}
_SKEWED_CODES = {"RequestTimeTooSkewed", "RequestExpired"}
_LOST_CODES = {"PreconditionFailed", "412"}
_RANGE_CODES = {"InvalidRange", "416"}
_UNSUPPORTED_CODES = {"NotImplemented", "501"}
# Exceptions of Python's own, and of libraries by their modules and names (`_is`).
_TIMEOUTS = (TimeoutError, "botocore.exceptions.ReadTimeoutError", "botocore.exceptions.ConnectTimeoutError")
_CUT = (
    CutOffError,
    IncompleteRead,
    "aiohttp.ClientPayloadError",
    "botocore.exceptions.IncompleteReadError",
    "botocore.exceptions.ResponseStreamingError",
    "botocore.parsers.ResponseParserError",
)
_UNREACHABLE = (
    ConnectionError,
    "aiohttp.ClientError",
    "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.ConnectionError",
)
_INSECURE = ("botocore.exceptions.SSLError",)
_WITHOUT_CREDENTIALS = ("botocore.exceptions.NoCredentialsError", "botocore.exceptions.PartialCredentialsError")
_ANSWERED = ("botocore.exceptions.ClientError",)


# The hub's client was told not to ask, which no time changes.
_OFFLINE = ("huggingface_hub.errors.OfflineModeIsEnabled",)
# What fsspec takes for a missing file over HTTP.
_NO_SERVER = ("aiohttp.ClientConnectionError",)


def passing_kind(error: BaseException) -> str | None:
    """What kind of fault this is, if the same request may succeed a little later; else None.

    busy: throttled. broken: the server failed inside. timeout, connection: it does not answer or is out of reach.
    cut_off: a body ended early. changed: an object was replaced while its parts were read.
    """
    if isinstance(error, ChangedError):
        return "changed"
    code, status = _code(error), _status(error)
    if code in _UNSUPPORTED_CODES:
        return None
    if code in _BUSY_CODES or status in (429, 503):
        return "busy"
    if code in _CUT_CODES:
        return "cut_off"
    if code in _BROKEN_CODES or status >= 500:
        return "broken"
    if code or status:
        return None
    causes = list(_chain(error))
    if any(_is(e, _INSECURE) or _is(e, _OFFLINE) for e in causes):
        return None
    if any(_is(e, _CUT) for e in causes):
        return "cut_off"
    if _is(error, _TIMEOUTS):
        return "timeout"
    return "connection" if _is(error, _UNREACHABLE) or any(_is(e, _NO_SERVER) for e in causes) else None


def is_lost_race(error: BaseException | None) -> bool:
    """A conditional put found the object there; servers and drivers dress the same answer in different exceptions."""
    return isinstance(error, FileExistsError) or _code(error) in _LOST_CODES


def is_other_version(error: BaseException | None) -> bool:
    """A read on condition of a version found another one, or an object that ends before the range."""
    return is_lost_race(error) or _code(error) in _RANGE_CODES


def is_unsupported(error: BaseException | None) -> bool:
    """The store or its driver has no conditional put."""
    return isinstance(error, NotImplementedError) or _code(error) in _UNSUPPORTED_CODES


def explained(
    error: Exception, uri: str, endpoint: str | None, attempts: int, *, writing: bool = False
) -> StorageError:
    """The StorageError (MissingError where the object is not there) that says the place, the reason and the fix."""
    kind: type[StorageError] = StorageError
    if isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket" and not passing_kind(error):
        kind = MissingError
    elif writing and _is_refused(error):
        kind = UnwritableError
    store = f"the store at {endpoint}" if endpoint else "the store"
    return kind(redact(f"{uri}: {_reason(error, uri, store, attempts)}"))


def _is_refused(error: Exception) -> bool:
    return _code(error) in _REFUSED_CODES or _status(error) in (401, 403) or isinstance(error, PermissionError)


def _reason(error: Exception, uri: str, store: str, attempts: int) -> str:
    code, status, causes = _code(error), _status(error), list(_chain(error))
    if code == "NoSuchBucket":
        return "the bucket does not exist; create it or correct its name"
    if any(_is(e, _WITHOUT_CREDENTIALS) for e in causes):
        return (
            "no complete credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or say that it "
            """is public: INFSCAN_STORAGE_LOCATIONS='{"s3://bucket": {"anonymous": true}}'"""
        )
    if code in _SKEWED_CODES:
        return f"{store} says that this machine's clock is wrong ({code}); set the clock"
    if _is_refused(error):
        return (
            f"{store} refused access ({code or 'permission denied'}); "
            "check the credentials in the environment, and that they may list, read and write there; a bucket whose "
            "requester pays, or that has other credentials, needs INFSCAN_STORAGE_LOCATIONS (docs/storage.md)"
        )
    if any(_is(e, _OFFLINE) for e in causes):
        return "the hub is not asked while HF_HUB_OFFLINE is set; unset it, or give a local copy"
    if isinstance(error, FileNotFoundError) and not passing_kind(error):
        return "there is no such object; check the address"
    if any(_is(e, _INSECURE) for e in causes):
        return f"the secure connection to {store} failed ({error}); check its certificate or use http://"
    match passing_kind(error):
        case "busy" | "broken":
            return f"{store} answered {code or status}, {attempts} times; try again when it has recovered"
        case "cut_off":
            return f"{store} sent less than it promised, {attempts} times; check the network, then try again"
        case "changed":
            return "the object changed while it was read, again and again; wait until nobody writes it"
        case "timeout" | "connection":
            settings = "AWS_ENDPOINT_URL and the network" if uri.startswith(("s3://", "s3a://")) else "the network"
            return (
                f"{store} cannot be reached or does not answer ({type(error).__name__}, {attempts} times); "
                f"check {settings}, and that the server runs"
            )
    return f"{type(error).__name__}: {error}; check the address and the store's settings"


def _is(error: BaseException, kinds: tuple[type[BaseException] | str, ...]) -> bool:
    """isinstance, of classes or their names. What a library that is not loaded would raise, nothing has raised: local
    files need none of them."""
    return any(isinstance(error, kind) for each in kinds if (kind := _class(each)) is not None)


def _class(kind: type[BaseException] | str) -> type[BaseException] | None:
    if not isinstance(kind, str):
        return kind
    module, _, name = kind.rpartition(".")
    found: type[BaseException] | None = getattr(sys.modules.get(module), name, None)
    return found


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause, the cause's cause and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response(error: BaseException | None) -> dict[str, Any]:
    return next((getattr(e, "response", {}) for e in _chain(error) if _is(e, _ANSWERED)), {})


def _code(error: BaseException | None) -> str:
    """The S3 error code behind `error`, or ''; a HEAD's is the HTTP status."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException | None) -> int:
    """The HTTP status behind `error`, or 0; drivers keep it under different names."""
    found = [_response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")]
    found += [getattr(error, name, None) for name in ("status", "status_code", "code")]
    return next((status for status in found if isinstance(status, int) and 100 <= status < 600), 0)
