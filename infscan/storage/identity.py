"""An input as a run knows it: what travels with a unit of work in place of a bare path."""

from __future__ import annotations

from dataclasses import dataclass

from infscan.errors import InfscanError
from infscan.storage.address import normalise
from infscan.storage.store import backend_of


@dataclass(frozen=True)
class Identity:
    """Where an input is, and what it is, whatever comes to lie there. The driver resolves it once; whoever opens the
    address holds what it finds to the fingerprint.

    kind: `model`, `tokenizer`, `corpus` or `factors`. revision: the hub's commit, of an input that came from a hub by
    its id. checked: of what the fingerprint is, in words.
    """

    kind: str
    address: str
    fingerprint: str
    checked: str
    revision: str | None = None

    def check(self, found: str, error: type[InfscanError]) -> None:
        """Raises `error` where what was opened has another fingerprint."""
        if found != self.fingerprint:
            raise error(
                f"{self.address} is not the one that the run was planned with: what this process finds there as "
                f"its {self.kind} has another content ({found[:12]}, and {self.fingerprint[:12]} was planned). Put it "
                "back, on every node, and run the same command again, or give another output=..."
            )


Stamp = tuple[int, str, int | None, int | None]


def stamp_of(uri: str) -> Stamp | None:
    """What changes when a file is written, replaced or set back in time; None if there is none.

    Bytes, ETag (or a digest of bytes and time of change) and, on a disk, the change time of the inode (ctime, which
    `touch -r` and `rsync -t` do not set back) and its number. It holds on one machine, while a process lives.
    """
    address = normalise(uri)
    found = backend_of(address).stat(address)
    return None if found is None else (found.size, found.etag, found.changed, found.inode)
