"""Secrets: found in addresses, and blotted out of what is shown or written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import quote

# How a refusal of an address with credentials goes on.
MEND = (
    "which would end up in logs and files; leave them out and set them in the environment "
    "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or as the store's fsspec driver calls them)"
)

# user:secret@ after the scheme. A secret may hold slashes; host:9000/path@x is a port, not a secret.
_USER_SECRET = re.compile(r"(?<=://)[^/\s:@]*:(?!\d+(?:/|$))[^\s@]+@")
# token@ after https:// alone: elsewhere a name is there (abfss://container@account, sftp://user@host).
_TOKEN_USER = re.compile(r"(?i)\b((?:[a-z0-9.-]+\+)?https?://)[^/\s@?#]+@")
# The same of a hub and of S3, by what their keys look like: names stand there, too.
_KEY_USER = re.compile(r"(?<=://)(?:hf_[A-Za-z0-9]{8,}|(?:AKIA|ASIA)[A-Z0-9]{12,})@")
# Web hooks, whose path is the secret.
_HOOK = re.compile(r"(?i)\b(https://(?:hooks\.slack\.com/services|discord(?:app)?\.com/api/webhooks))/[^\s\"'<>]+")
# Parameters of signed URLs and of connection strings, wherever they stand.
_SIGNED = re.compile(
    r"(?i)\b(X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature|sig|AccountKey|"
    r"SharedAccessKey|SharedAccessSignature)=[^&;\s\"'<>]+"
)
# Words that mean a secret in a URL's query alone: `?token=...` is one, `next token=7` is not.
_QUERY_SECRET = re.compile(
    r"(?i)([?&;#](?:[a-z0-9_.-]*[_.-])?(?:token|key|apikey|authkey|resourcekey|rlkey|secret|password|passwd|passphrase|"
    r"pass|pwd|auth|authorization|credentials?|jwt|sas|ticket|session|sessionid))=[^&;#\s\"'<>]+"
)
_HEADER = re.compile(r"(?i)\b(authorization[\"']?\s*[:=]\s*[\"']?(?:(?:bearer|basic|token)\s+)?)[^\s\"',}]+")
# AZURE_STORAGE_KEY, FSSPEC_S3_SECRET, HF_TOKEN, PGPASSWORD, ...
_SECRET_VARIABLE = re.compile(
    r"(?i)(KEY|KEY_?ID|SECRET|TOKEN|PASSWORD|PASSWD|PASSPHRASE|_PWD|_PASS|CREDENTIALS?|CONNECTION_STRING|SAS|JWT|AUTH|"
    r"_PAT|_DSN|WEBHOOK(_URL)?)$|^(DATABASE|PIP_INDEX|PIP_EXTRA_INDEX|UV_INDEX|REDIS|MONGO(DB)?)_UR[IL]$"
    r"|(^|_)(SECRET|TOKEN|PASSWORD)_"
)
# Name a file, a mode or a folder.
_NO_SECRET_VARIABLE = re.compile(
    r"(?i)(?<!WEBHOOK)(?<!DATABASE)(?<!INDEX)(?<!REDIS)(?<!MONGO)(?<!MONGODB)_(FILE|PATH|DIR|MODE|TYPE|URI|URL|ENDPOINT)$|"
    r"^GOOGLE_APPLICATION_CREDENTIALS$"
)
_SHORTEST_SECRET = 6  # a shorter value would blot out ordinary words


_ADDRESSES = (_USER_SECRET, _TOKEN_USER, _KEY_USER, _HOOK, _SIGNED, _QUERY_SECRET)


def holds_secret(text: str) -> bool:
    """Whether an address carries credentials of its own."""
    return any(pattern.search(text) for pattern in _ADDRESSES)


def names_secret(variable: str) -> bool:
    """Whether an environment variable of this name is taken for a secret."""
    return bool(_SECRET_VARIABLE.search(variable)) and not _NO_SECRET_VARIABLE.search(variable)


def redact(text: str) -> str:
    """`text` without credentials: of URLs, of HTTP headers, and values of environment variables that name a secret."""
    text = _TOKEN_USER.sub(r"\1***@", _USER_SECRET.sub("***@", text))
    text = _HOOK.sub(r"\1/***", _KEY_USER.sub("***@", text))
    for pattern in (_SIGNED, _QUERY_SECRET):
        text = pattern.sub(r"\1=***", text)
    text = _HEADER.sub(r"\1***", text)
    for secret in _secrets():
        for spelling in dict.fromkeys((secret, quote(secret, safe=""), quote(secret), json.dumps(secret)[1:-1])):
            text = text.replace(spelling, "***")
    return text


def _secrets() -> list[str]:
    """Values of this process's environment that must not be shown, the longest first."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if name.startswith("FSSPEC_") and value.lstrip().startswith("{"):
            # FSSPEC_S3='{"key": ..., "secret": ...}' is how fsspec is told several things at once.
            with suppress(ValueError):
                found.update(_secrets_of(json.loads(value)))
        if names_secret(name):
            found.add(value)
    return sorted((value for value in found if len(value) >= _SHORTEST_SECRET), key=len, reverse=True)


def _secrets_of(value: object, named: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _secrets_of(item, str(key))
    elif isinstance(value, str) and _SECRET_VARIABLE.search(named):
        yield value
