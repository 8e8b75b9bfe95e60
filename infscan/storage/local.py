"""Files on a local disk: written whole under a hidden name, synced, then given their name in one step.

fsspec's local filesystem is not used: its moves are not atomic across devices and it never syncs.
"""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from infscan.errors import StorageError
from infscan.storage.address import TEMPORARY, Entry, MissingError, is_temporary, redact, tag

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF}
_MENDS = {
    errno.EACCES: "permission denied; give this user access to it or choose another folder",
    errno.EPERM: "the operation is not permitted here; choose another folder",
    errno.EROFS: "the disk is mounted read-only; choose another folder",
    errno.ENOSPC: "the disk is full; free some space or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up; free some space or choose a folder on another disk",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another path",
    errno.EEXIST: "a file stands where a folder is needed; remove it or choose another path",
    errno.EISDIR: "this is a folder where a file is expected; correct the path",
    errno.ENAMETOOLONG: "the name is too long for this disk; shorten it",
    errno.EIO: "the disk reports an input/output error; check the disk",
}


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns an OSError into a StorageError that names the path, the reason and the mend."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingError(redact(f"{path}: there is no such file; check the path")) from error
    except OSError as error:
        mend = _MENDS.get(error.errno or 0, f"{error.strerror or error}; check the path and the disk")
        raise StorageError(redact(f"{path}: {mend}")) from error


class LocalDisk:
    """The local disk; every path is absolute."""

    def read(self, path: str) -> bytes:
        with _explained(path), open(path, "rb") as file:
            return file.read()

    def open(self, path: str) -> BinaryIO:
        with _explained(path):
            return open(path, "rb")

    def write(self, path: str, data: bytes) -> None:
        with _explained(path), _temporary(path, data) as temporary:
            os.replace(temporary, path)
            _sync_folder(os.path.dirname(path))

    def create(self, path: str, data: bytes) -> bool:
        """A hard link fails where the name exists, so that of many creators exactly one wins.

        On disks without hard links the check and the write are two steps; a race is then won by the last writer.
        """
        with _explained(path), _temporary(path, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                if os.path.lexists(path):
                    return False
                os.replace(temporary, path)
            _sync_folder(os.path.dirname(path))
            return True

    def stat(self, path: str) -> Entry | None:
        """The file at `path`; None for nothing and for a folder."""
        with _explained(path):
            try:
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return _found("", status) if stat.S_ISREG(status.st_mode) else None

    def find(self, root: str) -> list[Entry]:
        """Every regular file below the folder `root`, linked folders included; nothing where there is no folder."""
        with _explained(root):
            return list(_walk(root, root, frozenset()))

    def remove(self, path: str) -> None:
        with _explained(path), suppress(FileNotFoundError):
            os.remove(path)

    def check_space(self, folder: str) -> None:
        """Raises StorageError where the disk of `folder` has no byte left."""
        with _explained(folder):
            if shutil.disk_usage(folder).free == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def _temporary(path: str, data: bytes) -> Iterator[str]:
    """A synced hidden file with `data` in the folder of `path`; gone at the end unless it was renamed."""
    folder = os.path.dirname(path)
    Path(folder).mkdir(parents=True, exist_ok=True)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def _sync_folder(folder: str) -> None:
    """Makes a new name in `folder` survive a power cut, where the disk can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _walk(root: str, folder: str, above: frozenset[tuple[int, int]]) -> Iterator[Entry]:
    """The regular files below `folder`, named relative to `root`; `above`: the folders on the way (device, inode)."""
    try:
        here = os.stat(folder)
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return  # never there, or removed since its parent was read; one that may not be read is an error
    if (here.st_dev, here.st_ino) in above:
        return  # a link back to one of its own parents
    above |= {(here.st_dev, here.st_ino)}
    for entry in entries:
        if is_temporary(entry.name):
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:
            if entry.is_symlink():
                raise StorageError(redact(f"{entry.path}: this link leads nowhere; mend or remove it")) from None
            continue  # removed since the folder was read
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(root, entry.path, above)
        elif stat.S_ISREG(status.st_mode):
            yield _found(os.path.relpath(entry.path, root), status)


def _found(name: str, status: os.stat_result) -> Entry:
    return Entry(name, status.st_size, tag(status.st_size, status.st_mtime_ns))
