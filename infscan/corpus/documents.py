"""Read the documents of a corpus's files as streams, whatever their format; say where a bad one is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from infscan.config import CorpusConfig
from infscan.corpus.array_documents import INDICES, read_array_documents
from infscan.corpus.beside import data_files, refuse_foreign, refuse_mixture, refuse_pointer
from infscan.corpus.decompress import COMPRESSIONS
from infscan.corpus.describe import FORMATS as ARRAYS
from infscan.corpus.describe import array_files, list_files
from infscan.corpus.files import check_same_file, file_name
from infscan.corpus.lines import read_jsonl, read_text
from infscan.corpus.mds import stored_once
from infscan.corpus.rows import MAX_LINE_BYTES, Document
from infscan.corpus.splits import WHOLE, FileRange, InputSplit, plan_splits
from infscan.corpus.tables import read_arrow, read_parquet
from infscan.corpus.tally import Tally
from infscan.errors import CorpusError, StorageError
from infscan.storage import InputFile, open_input

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".ipc": "arrow",
    ".feather": "arrow",
    ".txt": "text",
}
_ARRAY_SUFFIXES = {".bin": "megatron", ".npy": "npy", ".mds": "mds", ".mds.zstd": "mds"}
_FORMATS = ("jsonl", "parquet", "arrow", "text", *ARRAYS)
# What datasets' save_to_disk writes beside its tables.
_BESIDE_ARROW = ("state.json", "dataset_info.json", "dataset_dict.json")


def read_documents(
    file: InputFile,
    config: CorpusConfig,
    tally: Tally | None = None,
    *,
    max_line_bytes: int = MAX_LINE_BYTES,
    stretch: FileRange = WHOLE,
) -> Iterator[Document]:
    """Stream the documents of one file, or of a stretch of it, empty ones included.

    A row without an id gets `<file name>#<line or row>` (lines count from 1, rows from 0), in a file of lines that was
    cut `<file name>@<byte>`; one without a source gets the file's name. `tally` counts every line or row, and says how
    many bad documents may be left out (None: none).

    Raises:
        BadDocumentError: with the file, the line or row and the fix, for anything that is not a document.
        BadFileError: for a file that cannot be read to its end.
        CorpusError: for a file that is not the one that was listed, before or after reading it.
    """
    tally = Tally() if tally is None else tally
    check_same_file(file)
    refuse_pointer(file)
    kind = file_format(file.uri, config.format)
    try:
        if kind in ARRAYS:
            yield from read_array_documents(kind, file, config, tally, stretch)
        else:
            with open_input(file.uri) as stream:
                if kind == "parquet":
                    yield from read_parquet(file.uri, stream, config, tally, stretch)
                elif kind == "arrow":
                    yield from read_arrow(file.uri, stream, config, tally)
                else:
                    read = read_text if kind == "text" else read_jsonl
                    yield from read(file.uri, stream, config, tally, max_line_bytes, stretch)
    except OSError as error:
        raise StorageError(
            f"{file.uri}, after record {tally.records}: {error}; check the disk or the store."
        ) from error
    check_same_file(file)


def document_splits(files: Sequence[InputFile], config: CorpusConfig) -> list[InputSplit]:
    """The pieces that become the parts of a prepared corpus (`infscan.corpus.splits`)."""
    return plan_splits(files, config, partial(file_format, setting=config.format))


def document_files(config: CorpusConfig) -> list[InputFile]:
    """The files of a corpus of documents, in the order of their addresses.

    Beside Arrow tables, what datasets' save_to_disk and its caches leave in the folder is no document; of token arrays
    their indices are none.

    Raises:
        StorageError: where nothing is there.
        CorpusError: where a file's format is unknown.
    """
    return data_and_beside(config)[0]


def data_and_beside(config: CorpusConfig) -> tuple[list[InputFile], list[InputFile]]:
    """As `document_files`, and the files beside them that are left aside.

    Raises:
        StorageError: where nothing is there.
        CorpusError: where a file's format is unknown, or a folder is of no one kind.
    """
    files = list_files(config)
    arrays = array_files(config, files)
    if arrays is not None:
        return [file for file in stored_once(arrays[1]) if not file.uri.endswith(INDICES)], []
    if config.format == "auto" and any(file.uri.endswith(".arrow") for file in files):
        files = [file for file in files if not _is_beside_arrow(file_name(file.uri))]
    files, aside = data_files(files, any_text=config.format == "text")
    refuse_mixture(files, config.path, partial(file_format, setting=config.format))
    return files, aside


def _is_beside_arrow(name: str) -> bool:
    return name in _BESIDE_ARROW or (name.startswith("cache-") and name.endswith(".arrow"))


def file_format(uri: str, setting: str = "auto") -> str:
    """`jsonl`, `parquet`, `arrow`, `text`, `megatron`, `npy` or `mds`: the setting, or what the file's suffix says.

    Raises:
        CorpusError: for an unknown setting or suffix.
    """
    if setting != "auto":
        if setting not in _FORMATS:
            raise CorpusError(f"corpus.format={setting!r} is unknown; give auto, {', '.join(_FORMATS)}.")
        return setting
    for suffix, kind in _ARRAY_SUFFIXES.items():
        if uri.endswith(suffix):
            return kind
    name = uri
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    for suffix, kind in _SUFFIXES.items():
        if name.endswith(suffix):
            return kind
    refuse_foreign(uri)
    raise CorpusError(
        f"{uri}: the suffix says nothing about the format; name the other files by a glob in corpus.path, rename it "
        f"({', '.join(_SUFFIXES)}, JSONL and text also with {' or '.join(COMPRESSIONS)}), or set corpus.format to one "
        f"of {', '.join(_FORMATS)}."
    )
