"""What is beside the data in a folder and is no document: licences, checksums; and folders of no one kind."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from infscan.corpus.decompress import COMPRESSIONS
from infscan.corpus.files import file_name, name_below
from infscan.errors import BadFileError, CorpusError
from infscan.storage import LFS_POINTER, InputFile, is_lfs_pointer, is_uri

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
    *(".pdf", ".png", ".jpg", ".svg", ".log", ".bib", ".crc", ".etag"),
)
# What systems leave in folders.
_LITTER = ("thumbs.db", "desktop.ini")
# Suffixes of what is no corpus as it is, and what to do with it.
_UNPACK, _REWRITE = "unpack it first", "write it as JSONL or Parquet first"
_FOREIGN = {
    **dict.fromkeys((".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".zip", ".7z", ".rar"), _UNPACK),
    **dict.fromkeys((".bz2", ".xz", ".lzma", ".lz4", ".br", ".sz", ".z"), "compress it as .gz or .zst instead"),
    **dict.fromkeys((".csv", ".csv.gz", ".tsv", ".tsv.gz", ".avro", ".orc", ".xlsx", ".sqlite", ".db"), _REWRITE),
    **dict.fromkeys((".tfrecord", ".tfrecords", ".h5", ".hdf5", ".lmdb", ".npz", ".xml", ".xml.gz"), _REWRITE),
    **dict.fromkeys((".html", ".htm", ".warc", ".warc.gz", ".wet", ".wet.gz", ".epub", ".doc", ".docx"), _REWRITE),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth"), f"pickles are never opened; {_REWRITE}"),
    **dict.fromkeys((".safetensors", ".gguf", ".ckpt"), "it holds a model's weights; move it away from the corpus"),
    **dict.fromkeys(
        (".part", ".partial", ".tmp", ".crdownload", ".incomplete", ".aria2", ".download"),
        "its download is not finished; finish it, or remove it",
    ),
}
_SPLITS = "train_small|train|test|validation|valid|val|dev|eval|heldout|holdout"
# One split of a data set, as the hub's files and folders are called, without their suffixes;
_SPLIT = re.compile(rf"({_SPLITS})([-_]?\d+(-of-\d+)?|[-_](data|set|split))*")
# and as a word of a longer name (`c4-train.00000-of-01024.json.gz`, `test_sft-00000-of-00001.parquet`).
_SPLIT_WORD = re.compile(rf"(?<![^-_./])({_SPLITS})(?![^-_./])")
# The kind of rows that a name says beside its compression.
_ROWS = (".jsonl", ".json", ".ndjson", ".jsonlines", ".parquet", ".pq", ".arrow", ".ipc", ".feather")


def data_files(files: Sequence[InputFile], *, any_text: bool = False) -> tuple[list[InputFile], list[InputFile]]:
    """The files that may be documents, and those that are left aside; one that corpus.path names is a document.

    any_text: every file was said to be a text, so that a program's README.md is one too.
    """
    if any_text:
        return list(files), []
    aside = [file for file in files if len(files) > 1 and _is_beside(file_name(file.uri))]
    kept = [file for file in files if file not in set(aside)]
    return (kept, aside) if kept else (list(files), [])


def _is_beside(name: str) -> bool:
    stem, dot, suffix = name.lower().rpartition(".")
    if name.lower() in _LITTER:
        return True
    if not dot:
        return _NAMES.fullmatch(name.lower()) is not None
    return f".{suffix}" in _NEVER or (f".{suffix}" in _SUFFIXES and _NAMES.fullmatch(stem) is not None)


def refuse_foreign(uri: str) -> None:
    """Refuse a file that by its suffix is no corpus as it is.

    Raises:
        CorpusError: saying what to do with it.
    """
    # The longest suffix says most: `.tar.gz` before what it is compressed with.
    foreign = max((suffix for suffix in _FOREIGN if uri.lower().endswith(suffix)), key=len, default=None)
    if foreign is not None:
        raise CorpusError(
            f"{uri}: {foreign} is not read ({_FOREIGN[foreign]}); or name the files that are to be read by a glob in "
            "corpus.path."
        )


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
    plain = {uri: (format_of(uri), _plain(name)) for uri, name in names.items()}
    last = {plain[uri]: name for uri, name in names.items()}
    twice = next(((name, last[plain[uri]]) for uri, name in names.items() if last[plain[uri]] != name), None)
    if twice:
        raise CorpusError(
            f"{path} holds {twice[0]} and {twice[1]}, one file in two forms: their documents would count twice; "
            f"remove one, or name the others by a glob, such as {_glob(path, twice[0])}."
        )
    refuse_parts_twice(files, path)


def refuse_parts_twice(files: Sequence[InputFile], path: str) -> None:
    """Refuse a link to another of the files, and a folder of several splits, which a glob takes together.

    Raises:
        CorpusError: naming two of the files.
    """
    names = {file.uri: name_below(file.uri, path) for file in files}
    _refuse_links(names, path)
    _refuse_splits(list(names.values()), path)


def _refuse_links(names: Mapping[str, str], path: str) -> None:
    seen: dict[str, str] = {}
    for uri, name in names.items():
        other = seen.setdefault(uri if is_uri(uri) else _followed(uri), name)
        if other != name:
            raise CorpusError(
                f"{path} holds {other} and {name}, which are one file by a link: its documents would count twice; "
                "remove the link, or name the others by a glob."
            )


def _followed(path: str) -> str:
    """Where a path leads; a folder's links are followed once for all its files."""
    folder, _, name = path.rpartition("/")
    there = f"{_followed_folder(folder)}/{name}"
    return os.path.realpath(there) if os.path.islink(there) else there


@lru_cache(maxsize=1024)
def _followed_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _refuse_splits(names: Sequence[str], path: str) -> None:
    if _is_glob(path):
        return
    found: dict[str, str] = defaultdict(str)
    for name in names:
        for part in name.split("/"):
            if match := _SPLIT.fullmatch(part.partition(".")[0]):
                found[match[1]] = found[match[1]] or name
    found = found if len(found) > 1 else _splits_by_word(names)
    if "train" in found and len(found) > 1:
        other = next(name for split, name in found.items() if split != "train")
        raise _several_splits(path, found["train"], other, _split_glob(found["train"]))
    if unnamed := _unnamed_train(names):
        raise _several_splits(path, *unnamed)


def _several_splits(path: str, train: str, other: str, pattern: str) -> CorpusError:
    return CorpusError(
        f"{path} holds several splits of a data set ({train}, {other}), and a model was trained on one; name it by a "
        f"glob, such as {path.rstrip('/')}/{pattern}, or all of them by {path.rstrip('/')}/**."
    )


def _unnamed_train(names: Sequence[str]) -> tuple[str, str, str] | None:
    """Two files of which only the one held out says its split, and a glob for the other.

    mC4 has `c4-af.tfrecord-*` beside `c4-af-validation.tfrecord-*`.
    """
    alike: dict[str, str] = {}
    for name in names:
        alike.setdefault(re.sub(r"\d+", "#", name), name)
    for name in names:
        for match in (one for one in _SPLIT_WORD.finditer(name) if not one[1].startswith("train")):
            before, after = name[: match.start()], name[match.end() :]
            rest = before[:-1] + after
            if before[-1:] in ("-", "_", ".") and (train := alike.get(re.sub(r"\d+", "#", rest))):
                return train, name, before[:-1] + re.split(r"\d", after)[0] + "*"
    return None


def _splits_by_word(names: Sequence[str]) -> dict[str, str]:
    """The splits among names that are alike but for that word and for numbers; a first name of each."""
    alike: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        for match in _SPLIT_WORD.finditer(name):
            rest = re.sub(r"\d+", "#", f"{name[: match.start()]}*{name[match.end() :]}")
            alike[rest].setdefault(match[1], name)
    return next((found for found in alike.values() if "train" in found and len(found) > 1), {})


def _split_glob(name: str) -> str:
    """`data/train-00000-of-00001.parquet` as `data/train-*`."""
    parts = name.split("/")
    at = next((number for number, part in enumerate(parts) if part.startswith("train")), None)
    if at is None:
        return f"**/*{next(part for part in parts if 'train' in part).partition('train')[0][-1:]}train*"
    return "/".join([*parts[:at], "train/**" if at + 1 < len(parts) else "train*"])


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _plain(name: str) -> str:
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return next((name.removesuffix(suffix) for suffix in _ROWS if name.endswith(suffix)), name)


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
