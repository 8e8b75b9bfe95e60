"""What goes wrong in object stores: which errors pass with time, which mean a lost race, and what mends the others."""

from collections.abc import Iterator
from typing import Any

import aiohttp
from botocore.exceptions import (
    ClientError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError

from infscan.errors import StorageError
from infscan.storage.address import MissingError, redact

_BUSY_CODES = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "ServiceUnavailable",
    "InternalError",
    "RequestTimeout",
    "OperationAborted",
    "ConditionalRequestConflict",  # two conditional puts at once: ask again who won
}
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
_LOST_CODES = {"PreconditionFailed", "412"}
_UNSUPPORTED_CODES = {"NotImplemented", "501"}
_UNREACHABLE = (
    TimeoutError,
    ConnectionError,
    HTTPClientError,
    BotoConnectionError,
    ResponseParserError,
    aiohttp.ClientError,
)


def is_transient(error: BaseException) -> bool:
    """Throttled, broken inside, timed out or out of reach: the same request may succeed a little later."""
    code, status = _code(error), _status(error)
    if code or status:
        return code in _BUSY_CODES or status == 429 or (status >= 500 and code not in _UNSUPPORTED_CODES)
    return isinstance(error, _UNREACHABLE) and not isinstance(error, SSLError)


def is_lost_race(error: BaseException | None) -> bool:
    """A conditional put found the object there; servers and drivers dress the same answer in different exceptions."""
    return isinstance(error, FileExistsError) or _code(error) in _LOST_CODES


def is_unsupported(error: BaseException | None) -> bool:
    """The store or its driver has no conditional put."""
    return isinstance(error, NotImplementedError) or _code(error) in _UNSUPPORTED_CODES


def explained(error: Exception, uri: str, endpoint: str | None, attempts: int) -> StorageError:
    """The StorageError (MissingError where the object is not there) that says the place, the reason and the mend."""
    kind = MissingError if isinstance(error, FileNotFoundError) and _code(error) != "NoSuchBucket" else StorageError
    store = f"the store at {endpoint}" if endpoint else "the store"
    return kind(redact(f"{uri}: {_reason(error, store, attempts)}"))


def _reason(error: Exception, store: str, attempts: int) -> str:
    code, status, causes = _code(error), _status(error), list(_chain(error))
    if code == "NoSuchBucket":
        return "the bucket does not exist; create it or correct its name"
    if any(isinstance(e, NoCredentialsError | PartialCredentialsError) for e in causes):
        return "no complete credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if code in _REFUSED_CODES or status in (401, 403) or isinstance(error, PermissionError):
        return (
            f"{store} refused access ({code or 'permission denied'}); "
            "check the credentials in the environment, and that they may list, read and write there"
        )
    if isinstance(error, FileNotFoundError):
        return "there is no such object; check the address"
    if any(isinstance(e, SSLError) for e in causes):
        return f"the secure connection to {store} failed ({error}); check its certificate or use http://"
    if is_transient(error) and (code or status):
        return f"{store} answered {code or status}, {attempts} times; try again when it has recovered"
    if is_transient(error):
        return (
            f"{store} cannot be reached or does not answer ({type(error).__name__}); "
            "check AWS_ENDPOINT_URL and the network, and that the server runs"
        )
    return f"{type(error).__name__}: {error}; check the address and the store's settings"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause, the cause's cause and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response(error: BaseException | None) -> dict[str, Any]:
    return next((e.response for e in _chain(error) if isinstance(e, ClientError)), {})


def _code(error: BaseException | None) -> str:
    """The S3 error code behind `error`, or ''; a HEAD's is the HTTP status."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException | None) -> int:
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode") or getattr(error, "status", 0)
    return status if isinstance(status, int) else 0
