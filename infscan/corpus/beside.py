"""What is beside the data in a folder and is no document: licences, checksums; and folders of no one kind."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence

from infscan.corpus.decompress import COMPRESSIONS
from infscan.corpus.files import file_name, name_below
from infscan.errors import BadFileError, CorpusError
from infscan.storage import LFS_POINTER, InputFile, is_lfs_pointer

# Names, without their suffix and in small letters, that belong to no document,
_NAMES = re.compile(
    r"(readme|licen[cs]e|copying)([-_.](mit|apache|apache-2\.0|bsd|gpl|cc|data|code|text|en|de|fr|ja|zh|zh-cn))?"
    r"|notice|citation|changelog|contributing|authors|(sha\d+|md5)(sums?)?|checksums?"
    r"|meta|metadata|dataset_infos?|dataset_dict|dataset_card|state|stats|requirements"
)
# with one of these suffixes; and suffixes that no document has.
_SUFFIXES = ("", ".txt", ".json", ".html", ".csv", ".tsv")
_NEVER = (
    *(".md", ".rst", ".sha256", ".sha512", ".sha1", ".md5", ".cff", ".yaml", ".yml", ".toml", ".py", ".sh", ".lock"),
    *(".pdf", ".png", ".jpg", ".svg", ".log", ".bib"),
)
# One split of a data set, as the hub's files and folders are called, without their suffixes.
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|heldout)([-_]?\d+(-of-\d+)?|[-_](data|set|split))*")


def data_files(files: Sequence[InputFile], path: str) -> tuple[list[InputFile], list[InputFile]]:
    """The files that may be documents, and those that are left aside; one that corpus.path names is a document."""
    aside = [file for file in files if len(files) > 1 and _is_beside(file_name(file.uri))]
    kept = [file for file in files if file not in set(aside)]
    return (kept, aside) if kept else (list(files), [])


def _is_beside(name: str) -> bool:
    stem, dot, suffix = name.lower().rpartition(".")
    if not dot:
        return _NAMES.fullmatch(name.lower()) is not None
    return f".{suffix}" in _NEVER or (f".{suffix}" in _SUFFIXES and _NAMES.fullmatch(stem) is not None)


def refuse_mixture(files: Sequence[InputFile], path: str, format_of: Callable[[str], str]) -> None:
    """Refuse a folder that holds documents twice, in several formats, or of several splits.

    A glob says that all of it is meant; only texts, which any file can be, are never taken for rows beside others.

    Raises:
        CorpusError: naming two of the files, and the glob that chooses.
    """
    names = {file.uri: name_below(file.uri, path) for file in files}
    by_format: dict[str, str] = {}
    for uri, name in names.items():
        by_format.setdefault(format_of(uri), name)
    if len(by_format) > 1 and ("text" in by_format or not _is_glob(path)):
        held = " and ".join(f"{kind} ({name})" for kind, name in list(by_format.items())[:2])
        raise CorpusError(
            f"{path} holds files of several formats, {held}; name those of one by a glob, such as "
            f"{_glob(path, next(iter(by_format.values())))}, or move the others."
        )
    plain = {_plain(name): name for name in names.values()}
    twice = next(((name, plain[_plain(name)]) for name in names.values() if plain[_plain(name)] != name), None)
    if twice:
        raise CorpusError(
            f"{path} holds {twice[0]} and {twice[1]}, one of them compressed: their documents would count twice; "
            f"remove one, or name the others by a glob, such as {_glob(path, twice[0])}."
        )
    _refuse_splits(list(names.values()), path)


def _refuse_splits(names: Sequence[str], path: str) -> None:
    if _is_glob(path):
        return
    found: dict[str, str] = defaultdict(str)
    for name in names:
        for part in name.split("/"):
            if match := _SPLIT.fullmatch(part.partition(".")[0]):
                found[match[1]] = found[match[1]] or name
    if "train" in found and len(found) > 1:
        other = next(name for split, name in found.items() if split != "train")
        raise CorpusError(
            f"{path} holds several splits of a data set ({found['train']}, {other}), and a model was trained on one; "
            f"name it by a glob, such as {path.rstrip('/')}/{_split_glob(found['train'])}, or all of them by "
            f"{path.rstrip('/')}/**."
        )


def _split_glob(name: str) -> str:
    """`data/train-00000-of-00001.parquet` as `data/train-*`."""
    parts = name.split("/")
    at = next(number for number, part in enumerate(parts) if part.startswith("train"))
    return "/".join([*parts[:at], "train/**" if at + 1 < len(parts) else "train*"])


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _plain(name: str) -> str:
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return name


def _glob(path: str, name: str) -> str:
    _, dot, suffix = file_name(name).partition(".")
    where = path.rpartition("/")[0] if _is_glob(path) else path.rstrip("/")
    return f"{where}/**/*{dot}{suffix}"


def refuse_pointer(file: InputFile) -> None:
    """Refuse the pointer that a Git clone without Git LFS has in a file's place.

    Raises:
        BadFileError: saying what it is.
    """
    if is_lfs_pointer(file):
        raise BadFileError(f"{file.uri} {LFS_POINTER}.")
