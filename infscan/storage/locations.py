"""Settings of one place among several: a public corpus beside a bucket of one's own, two endpoints, two identities.

INFSCAN_STORAGE_LOCATIONS='{"s3://public": {"anonymous": true}, "s3://theirs/data": {"profile": "theirs"}}'

An address takes the settings of the longest prefix that it is below; every process reads them from its environment.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from functools import lru_cache

from infscan.errors import StorageError

VARIABLE = "INFSCAN_STORAGE_LOCATIONS"


@dataclass(frozen=True)
class Location:
    """What differs at a place of S3. profile: of ~/.aws/config, which holds its credentials."""

    anonymous: bool | None = None
    requester_pays: bool | None = None
    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None


def location_of(address: str) -> Location:
    """The settings of the place that an address is in; none where none are given.

    Raises:
        StorageError: for a variable that is not what it has to be.
    """
    places = _parsed(os.environ.get(VARIABLE, ""))
    below = [prefix for prefix in places if address == prefix or address.startswith(f"{prefix}/")]
    return places[max(below, key=len)] if below else Location()


@lru_cache(maxsize=8)
def _parsed(text: str) -> dict[str, Location]:
    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise StorageError(f"{VARIABLE} is not JSON ({error}); write {_EXAMPLE}") from None
    if not isinstance(value, dict):
        raise StorageError(f"{VARIABLE} is no JSON object of places; write {_EXAMPLE}")
    return {_prefix(prefix): _location(prefix, settings) for prefix, settings in value.items()}


def _prefix(prefix: str) -> str:
    if not prefix.startswith(("s3://", "s3a://")):
        raise StorageError(f"{VARIABLE}: {prefix!r} is no place of S3; write s3://bucket or s3://bucket/prefix")
    return prefix.rstrip("/")


def _location(prefix: str, settings: object) -> Location:
    known = {one.name: bool if one.name in ("anonymous", "requester_pays") else str for one in fields(Location)}
    if not isinstance(settings, dict):
        raise StorageError(f"{VARIABLE}: the settings of {prefix} are no JSON object; write {_EXAMPLE}")
    for key, value in settings.items():
        if key not in known:
            # Not shown: what is taken for a key here may be a secret.
            raise StorageError(
                f"{VARIABLE}: {prefix} has {key[:40]!r}; there are {', '.join(known)} (credentials belong in a profile)"
            )
        if type(value) is not known[key]:
            what = "true or false" if known[key] is bool else "a text"
            raise StorageError(f"{VARIABLE}: {key} of {prefix} has to be {what}")
    if settings.get("anonymous") and settings.get("profile"):
        raise StorageError(f"{VARIABLE}: {prefix} is anonymous and has a profile; leave one out")
    return Location(**settings)


_EXAMPLE = '{"s3://bucket": {"anonymous": true}}'
