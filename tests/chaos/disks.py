"""Disks that are full or turn read-only: real ones where this process may mount them, else a stand-in at fsync."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
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
