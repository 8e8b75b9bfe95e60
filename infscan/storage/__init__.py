"""The only place that touches a filesystem: local folders, object stores and the memory of one process.

A run folder, a corpus and a model folder are all named by a path or a URI. `Store` reads and writes one of them;
what it writes becomes visible whole or not at all, and what it lists or asks for never comes from a cache.
Credentials come from the environment alone. Every failure is a `StorageError` that names the place and the mend.
"""

from infscan.storage.address import MissingError, is_uri, refuse_own_network
from infscan.storage.identity import Identity, stamp_of
from infscan.storage.inputs import InputFile, changed, expand, localise, look_up, open_input, read_range
from infscan.storage.patience import storage_faults
from infscan.storage.scratch import scratch_file
from infscan.storage.store import Entry, Store, json_bytes

__all__ = [
    "Entry",
    "Identity",
    "InputFile",
    "MissingError",
    "Store",
    "changed",
    "expand",
    "is_uri",
    "json_bytes",
    "localise",
    "look_up",
    "open_input",
    "read_range",
    "refuse_own_network",
    "scratch_file",
    "stamp_of",
    "storage_faults",
]
