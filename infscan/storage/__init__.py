"""The only place that touches a filesystem: local folders, object stores and the memory of one process.

A run folder, a corpus and a model folder are all named by a path or a URI. `Store` reads and writes one of them;
what it writes becomes visible whole or not at all, and what it lists or asks for never comes from a cache.
Credentials come from the environment alone. Every failure is a `StorageError` that names the place and the fix.
"""

from infscan.storage.address import MissingError, is_uri
from infscan.storage.allowed import check_addresses, remember_written
from infscan.storage.identity import Identity, stamp_of
from infscan.storage.inputs import (
    LFS_POINTER,
    InputFile,
    changed,
    expand,
    is_lfs_pointer,
    localise,
    look_up,
    open_input,
    read_range,
    root_of,
)
from infscan.storage.retry import storage_faults
from infscan.storage.scratch import scratch_file
from infscan.storage.store import Entry, Store, json_bytes

__all__ = [
    "LFS_POINTER",
    "Entry",
    "Identity",
    "InputFile",
    "MissingError",
    "Store",
    "changed",
    "check_addresses",
    "expand",
    "is_lfs_pointer",
    "is_uri",
    "json_bytes",
    "localise",
    "look_up",
    "open_input",
    "read_range",
    "remember_written",
    "root_of",
    "scratch_file",
    "stamp_of",
    "storage_faults",
]
