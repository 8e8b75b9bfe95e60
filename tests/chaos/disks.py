"""Disks that are full or turn read-only: real ones where this process may mount them, else a stand-in at fsync.

`small_disk` is for what this process writes; `fillable_disk` for what others write, who are forked from the template.
"""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import pytest

from infscan.storage import local as local_module


class Disk(Protocol):
    """A small disk at `path`."""

    path: Path

    def resize(self, size: int) -> None: ...

    def set_read_only(self, read_only: bool) -> None: ...


class MountedDisk:
    """A tmpfs of `size` bytes, which the kernel counts in pages."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._mount("-t", "tmpfs", "-o", f"size={size}", "none")

    def resize(self, size: int) -> None:
        self._mount("-o", f"remount,size={size}")

    def set_read_only(self, read_only: bool) -> None:
        self._mount("-o", f"remount,{'ro' if read_only else 'rw'}")

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def _mount(self, *options: str) -> None:
        subprocess.run(["mount", *options, str(self.path)], check=True, capture_output=True)


class StandInDisk:
    """A folder whose files fail to sync once they are larger than `size` together, or at all."""

    def __init__(self, path: Path, size: int, patch: pytest.MonkeyPatch) -> None:
        self.path, self.size, self.read_only = path, size, False
        sync = os.fsync

        def limited(descriptor: int) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"{self.path}/"):
                if self.read_only:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                if sum(file.stat().st_blocks * 512 for file in self.path.rglob("*") if file.is_file()) > self.size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(descriptor)

        patch.setattr(local_module.os, "fsync", limited)

    def resize(self, size: int) -> None:
        self.size = size

    def set_read_only(self, read_only: bool) -> None:
        self.read_only = read_only


@contextmanager
def small_disk(path: Path, size: int) -> Iterator[Disk]:
    """A disk of `size` bytes at the new folder `path`, gone at the end."""
    path.mkdir()
    try:
        mounted = MountedDisk(path, size)
    except (subprocess.CalledProcessError, FileNotFoundError):
        with pytest.MonkeyPatch.context() as patch:
            yield StandInDisk(path, size, patch)
        return
    try:
        yield mounted
    finally:
        mounted.unmount()


_BALLAST = ".ballast"
# Set where no disk could be mounted: whoever is forked from the template then takes a ballast for a full disk.
STAND_IN = "INFSCAN_TEST_STAND_IN_DISK"


class FillableDisk:
    """A small disk at `path` that something else than the run fills, and keeps full until it is freed."""

    def __init__(self, path: Path, mounted: bool) -> None:
        self.path, self.mounted = path, mounted
        self._freed = threading.Event()
        self._filler = threading.Thread(target=self._keep_full, daemon=True)

    def fill(self) -> None:
        self._pour()
        self._filler.start()

    def free(self) -> None:
        self._freed.set()
        if self._filler.is_alive():
            self._filler.join()
        (self.path / _BALLAST).unlink(missing_ok=True)

    def _keep_full(self) -> None:
        while not self._freed.wait(0.02):
            self._pour()

    def _pour(self) -> None:
        with open(self.path / _BALLAST, "ab", buffering=0) as ballast, suppress(OSError):
            while self.mounted and ballast.write(bytes(1 << 16)):
                pass


@contextmanager
def fillable_disk(path: Path, size: int = 16 << 20) -> Iterator[FillableDisk]:
    """A disk of `size` bytes at the new folder `path`, gone at the end."""
    path.mkdir()
    if STAND_IN in os.environ:
        disk = FillableDisk(path, mounted=False)
        yield disk
        disk.free()
        return
    mounted = MountedDisk(path, size)
    disk = FillableDisk(path, mounted=True)
    try:
        yield disk
    finally:
        disk.free()
        mounted.unmount()


def may_mount(path: Path) -> bool:
    path.mkdir()
    try:
        MountedDisk(path, 1 << 20).unmount()
    except (subprocess.CalledProcessError, FileNotFoundError):
        return False
    return True


def heed_ballast() -> None:
    """In a process of its own: no file syncs in or below a folder that has a ballast."""
    sync = os.fsync

    def limited(descriptor: int) -> None:
        for folder in Path(os.readlink(f"/proc/self/fd/{descriptor}")).parents:
            if (folder / _BALLAST).exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    local_module.os.fsync = limited
