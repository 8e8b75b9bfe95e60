"""An input file of a corpus: what it is called, and whether it is still the one that was looked at."""

from __future__ import annotations

import re
from functools import lru_cache
from urllib.parse import unquote

from infscan.errors import ChangedCorpusError
from infscan.storage import InputFile, changed, root_of

_PARTITION = re.compile(r"([^=]+)=(.*)")
# Hive's name of a partition that has no value.
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


def file_name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


@lru_cache(maxsize=4096)
def name_below(uri: str, path: str) -> str:
    """What a file is called in made-up ids and sources: its path below corpus.path, or below a glob's own folder."""
    root = root_of(path, uri)
    return uri[len(root) + 1 :] if uri.startswith(f"{root}/") else file_name(uri)


@lru_cache(maxsize=4096)
def folder_below(uri: str, path: str) -> str:
    """The folder of a file of text, which is the source of all in it; the file's name where it is all there is."""
    name = name_below(uri, path)
    if "/" in name:
        return name.rpartition("/")[0]
    root = root_of(path, uri)
    return file_name(root) if uri.startswith(f"{root}/") else name


@lru_cache(maxsize=4096)
def partitions(uri: str) -> dict[str, str]:
    """The columns that folders of a file's address hold, as Hive and Spark write them: `lang=en/part-0.parquet`."""
    found = (_PARTITION.fullmatch(unquote(part)) for part in uri.split("/")[:-1])
    return {match[1]: match[2] for match in found if match and match[2] != _NO_VALUE}


def check_same_file(file: InputFile) -> None:
    """Raises ChangedCorpusError where a file is not the one that was listed or described (bytes, ETag or time of
    change)."""
    found = changed(file)
    if found is not None:
        raise ChangedCorpusError(
            f"{file.uri} {found}: it changed under the run; put the old file back, or start a new output."
        )
