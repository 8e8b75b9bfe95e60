"""Which addresses a stored file may lead to: it may be a stranger's, and names places on this machine or elsewhere.

A description of a corpus or a run's settings may name what lies below its own folder, links resolved. Anything else it
may name where this user's infscan wrote exactly that file here (its digest is in `$INFSCAN_CACHE/written.sha256`), or
where the user allows it: INFSCAN_ALLOWED_ADDRESSES=/data,s3://our-bucket
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

from infscan.errors import StorageError
from infscan.secrets import redact
from infscan.storage.address import normalise, scheme_of

log = logging.getLogger("infscan")
VARIABLE = "INFSCAN_ALLOWED_ADDRESSES"
_WRITTEN = "written.sha256"
_SHOWN = 8


def cache_folder() -> Path:
    """What this user's infscan keeps on this machine."""
    return Path(os.environ.get("INFSCAN_CACHE") or "~/.cache/infscan").expanduser().absolute()


def remember_written(data: bytes) -> None:
    """Lay down that this user's infscan wrote a file of these bytes: what it names was named by the user."""
    if _is_written(data):
        return
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        # One short write at the end, which several processes may do at once.
        with open(cache_folder() / _WRITTEN, "a") as file:
            file.write(f"{sha256(data).hexdigest()}\n")
    except OSError as error:
        log.debug("%s is not written (%s); later commands ask for %s", cache_folder() / _WRITTEN, error, VARIABLE)


def _is_written(data: bytes) -> bool:
    with suppress(OSError):
        return sha256(data).hexdigest() in (cache_folder() / _WRITTEN).read_text().split()
    return False


def check_addresses(where: str, data: bytes, named: Mapping[str, str] | Iterable[str]) -> None:
    """Refuse a stored file that leads elsewhere, unless the user allows it or wrote it.

    where: the file's address, below whose folder everything may be. data: its bytes. named: the addresses in it, or
    by what they are called.

    Raises:
        StorageError: naming those outside, and how to allow them.
    """
    folder = normalise(where).rpartition("/")[0]
    called = named if isinstance(named, Mapping) else {str(number): one for number, one in enumerate(named)}
    outside = {key: one for key, one in called.items() if not _is_below(one, folder)}
    if not outside or _is_written(data):
        return
    allowed = [one.strip() for one in os.environ.get(VARIABLE, "").split(",") if one.strip()]
    outside = {key: one for key, one in outside.items() if not any(_is_below(one, place) for place in allowed)}
    if outside:
        addresses = list(dict.fromkeys(map(redact, outside.values())))
        more = f" and {len(addresses) - _SHOWN} more" if len(addresses) > _SHOWN else ""
        shown = addresses[:_SHOWN]
        raise StorageError(
            f"{where} names {', '.join(shown)}{more}, outside its folder, and this user's infscan did not write that "
            f"file here: it may be a stranger's. If you trust it, allow what it names, or a folder above: "
            f"{VARIABLE}={','.join(shown)}"
        )


def _is_below(address: str, folder: str) -> bool:
    """Whether an address is a folder or in it, wherever links lead."""
    if address.startswith("infscan://"):
        return True
    address, folder = normalise(address), normalise(folder)
    if scheme_of(address) == scheme_of(folder) == "file":
        address, folder = os.path.realpath(address), os.path.realpath(folder)
    return address == folder or address.startswith(f"{folder.rstrip('/')}/")
