"""Whose hidden file is this? Its name says which process was writing it, so that what dead ones left can be removed."""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from functools import lru_cache

from infscan.storage.address import TEMPORARY
from infscan.storage.host import process_began, this_host

# Of another machine's process nothing is known: what it began is taken for abandoned after this long.
ABANDONED_S = 24 * 3600.0
_NAME = re.compile(re.escape(TEMPORARY) + r"(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<began>\d+)-[0-9a-f]{32}")


def temporary_name() -> str:
    """A new hidden name that tells this machine, this process and when it began."""
    pid = os.getpid()
    return f"{TEMPORARY}{_host()}-{pid}-{process_began(pid)}-{uuid.uuid4().hex}"


def is_abandoned(name: str, age_s: float) -> bool:
    """True where the writer of a hidden file is gone: dead, if it ran on this machine; else by the file's age.

    What infscan does not name so is somebody's own, however old.

    It may be wrong where machines share a name and a number of their process namespace, or behind a very slow writer:
    a writer whose hidden file vanishes writes it anew, so that this costs time and nothing else.
    """
    match = _NAME.fullmatch(name.rpartition("/")[2])
    if match is None:
        return False
    if match["host"] == _host():
        return process_began(int(match["pid"])) != int(match["began"])
    return age_s > ABANDONED_S


@lru_cache(maxsize=1)
def _host() -> str:
    host = this_host()
    return hashlib.sha256(f"{host.name} {host.processes}".encode()).hexdigest()[:8]
