"""Whose hidden file is this? Its name says which process was writing it, so that what dead ones left can be removed."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import uuid
from functools import lru_cache
from pathlib import Path

from infscan.storage.address import TEMPORARY

# Of another machine's process nothing is known: what it began is taken for abandoned after this long.
ABANDONED_S = 24 * 3600.0
_NAME = re.compile(re.escape(TEMPORARY) + r"(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<began>\d+)-[0-9a-f]{32}")


def temporary_name() -> str:
    """A new hidden name that tells this machine, this process and when it began."""
    pid = os.getpid()
    return f"{TEMPORARY}{_host()}-{pid}-{_began(pid)}-{uuid.uuid4().hex}"


def is_abandoned(name: str, age_s: float) -> bool:
    """True where the writer of a hidden file is gone: dead, if it ran on this machine; else by the file's age.

    It may be wrong where machines share a name, or behind a very slow writer: a writer whose hidden file vanishes
    writes it anew, so that this costs time and nothing else.
    """
    match = _NAME.fullmatch(name.rpartition("/")[2])
    if match and match["host"] == _host():
        return _began(int(match["pid"])) != int(match["began"])
    return age_s > ABANDONED_S


@lru_cache(maxsize=1)
def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _began(pid: int) -> int:
    """When a process of this machine began, in clock ticks since the machine did; -1 where there is none.

    0 for a living process on systems without /proc.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except PermissionError:
        pass
    try:
        # The command's name, in brackets, may hold spaces; 20 fields behind it is the start time (proc(5)).
        status = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return -1 if status[0] in (b"Z", b"X") else int(status[19])
