"""A file of this machine that outlives nothing: room on a disk for what memory maps."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from infscan.errors import UnwritableError


@contextmanager
def scratch_file(folder: str | None, size: int) -> Iterator[str]:
    """The path of a new file of `size` bytes in `folder` (None: where temporary files go), all of its room taken.

    Its name goes at the end of the block; what has it open or mapped then keeps it until the process ends, however it
    ends. The room is taken first because a disk that fills behind a mapping ends the process without a word.

    Raises:
        UnwritableError: where the folder is missing, or takes no file of that size.
    """
    try:
        file = tempfile.NamedTemporaryFile(dir=folder, prefix="infscan-scratch-")  # noqa: SIM115 (closed below)
        with file:
            os.posix_fallocate(file.fileno(), 0, size)
            yield file.name
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise UnwritableError(
            f"{where} takes no file of {size / 2**30:.3g} GiB ({error.strerror}); free some space there, or name "
            "another folder."
        ) from None
