"""Who drives a run: a lease in its folder, so that a second driver does not do the same work beside the first.

Whoever publishes or removes anything asks storage first whether the lease is still its own (`Lease.confirm`): a driver
that slept, and was taken for dead, finds out before it does harm. No two machines' clocks are compared: a driver of
another machine is alive if it renews its lease while the second one waits for as long as a lease lasts.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import ClassVar

from infscan.errors import RunError, StorageError
from infscan.storage import MissingError, Store
from infscan.storage.foreign import parse_json
from infscan.storage.host import Host, process_began, this_host

log = logging.getLogger("infscan")

LEASE = "driver.json"
_RENEWALS = 4  # within a lease: one or two may be late


@dataclass(frozen=True)
class Holder:
    """The driver that holds a lease. began: its process, as `process_began` says; beat: counts its renewals."""

    token: str
    host: Host
    pid: int
    began: int
    since: str
    lease_s: float
    beat: int = 0
    # What the driver waits for, for `infscan status`; empty while it works.
    state: str = ""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=2).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Holder:
        value = parse_json(data)
        return cls(**(value | {"host": Host(**value["host"])}))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.name}, since {self.since}"


class Lease:
    """The lease of one run folder. `take`, then `check` now and then, then `release`.

    followed: the dead driver that the lease was taken over from, if there was one.
    """

    # Tokens of leases that this process holds: what else carries its process id is left over.
    _held: ClassVar[set[str]] = set()

    def __init__(self, store: Store, lease_s: float) -> None:
        self.store, self.lease_s = store, lease_s
        self.mine = Holder(
            token=uuid.uuid4().hex,
            host=this_host(),
            pid=os.getpid(),
            began=process_began(os.getpid()),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            lease_s=lease_s,
        )
        self._ended = threading.Event()
        # Set where the renewals' thread has something to write before its time.
        self._wake = threading.Event()
        self._state = ""
        self._taken_by: Holder | None = None
        self._gone = False
        self.followed: Holder | None = None
        self._renewals = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        """Take the lease; wait for one lease's length at most, where the first driver cannot be asked.

        Raises:
            RunError: where another driver is alive, saying who, where and since when.
        """
        while not self.store.create(LEASE, self.mine.to_bytes()):
            first = self._read()
            if first is None:
                continue
            if self._is_alive(first):
                raise RunError(
                    f"{self.store.uri} is being driven by {first}. Wait for it, end it, or give another output=...; "
                    f"if it is gone for certain, remove {LEASE} there."
                )
            log.info("lease       taken over from %s", first)
            self.store.write(LEASE, self.mine.to_bytes())
            self.followed = first
            break
        self._held.add(self.mine.token)
        self._renewals.start()

    def check(self) -> None:
        """Raises RunError where another driver took over, which thought this one dead, or the lease is gone."""
        if self._gone:
            raise RunError(
                f"{self.store.uri}/{LEASE} is gone, which this driver wrote and renews: the folder was moved or "
                "removed, its disk is not mounted any more, or another driver was here. Run the same command again "
                "where the folder is now; it goes on from there."
            )
        if self._taken_by is not None:
            raise RunError(
                f"{self.store.uri} was taken over by {self._taken_by}: this driver gave no sign of life for "
                f"cluster.lease_s={self.lease_s:g} s. Nothing is lost; the other one goes on."
            )

    def confirm(self) -> None:
        """As `check`, by what storage says now: before whatever would undo another driver's work."""
        self._look()
        self.check()

    def _look(self) -> None:
        """Note who holds the lease, if this driver does not. A file that nobody wrote so is still this driver's."""
        try:
            holder = Holder.from_bytes(self.store.read(LEASE))
        except MissingError:
            self._gone = True
        except (ValueError, TypeError, KeyError):
            return
        else:
            if holder.token != self.mine.token:
                self._taken_by = holder

    def announce(self, state: str) -> None:
        """Write what this driver waits for, empty where it works: at once, if it changed, and with each renewal."""
        if state != self._state:
            self._state = state
            self._wake.set()

    def release(self) -> None:
        """Give the lease back, if it is still this driver's."""
        self._ended.set()
        self._wake.set()
        if self._renewals.is_alive():
            self._renewals.join()
        self._held.discard(self.mine.token)
        with suppress(StorageError):
            holder = self._read()
            if holder is not None and holder.token == self.mine.token:
                self.store.remove(LEASE)

    def _is_alive(self, first: Holder) -> bool:
        if first.host == self.mine.host:
            if first.pid == self.mine.pid:
                return first.token in self._held
            return process_began(first.pid) == first.began
        log.info("lease       held by %s; waiting %g s to see whether it lives", first, first.lease_s)
        waited_since = time.monotonic()
        while time.monotonic() - waited_since <= first.lease_s:
            time.sleep(min(1.0, first.lease_s / _RENEWALS))
            now = self._read()
            if now is None:
                return False
            if now != first:
                return True
        return False

    def _read(self) -> Holder | None:
        """The holder; None if there is none, or a file that no driver of this version wrote."""
        try:
            return Holder.from_bytes(self.store.read(LEASE))
        except MissingError:
            return None
        except (ValueError, TypeError, KeyError):
            self.store.remove(LEASE)
            return None

    def _renew(self) -> None:
        held = self.mine
        while True:
            self._wake.wait(self.lease_s / _RENEWALS)
            self._wake.clear()
            if self._ended.is_set():
                return
            # Storage in trouble is waited for: whoever takes over meanwhile is noticed at the next look.
            with suppress(StorageError):
                self._look()
                if self._gone or self._taken_by is not None:
                    return
                held = replace(held, beat=held.beat + 1, state=self._state)
                if not self._ended.is_set():
                    self.store.write(LEASE, held.to_bytes())
