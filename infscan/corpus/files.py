"""An input file of a corpus: what it is called, and whether it is still the one that was looked at."""

from __future__ import annotations

from infscan.errors import ChangedCorpusError
from infscan.storage import InputFile, changed


def file_name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def check_same_file(file: InputFile) -> None:
    """Raises ChangedCorpusError where a file is not the one that was listed or described (bytes, ETag or time of
    change)."""
    found = changed(file)
    if found is not None:
        raise ChangedCorpusError(
            f"{file.uri} {found}: it changed under the run; put the old file back, or start a new output."
        )
