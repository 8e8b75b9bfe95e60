"""What the parts of a prepared corpus are made of: large files cut, small ones joined; by names and sizes alone.

A file above corpus.part_bytes is cut into stretches at record boundaries: by bytes where records are lines or runs of
token ids, by rows in Parquet; Arrow files and MDS shards are not cut. A compressed file cannot be sought in: its
stretches, in bytes of the decompressed stream, are read from the file's beginning with skipping. Where there are very
many small files, consecutive ones share a part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infscan.config import CorpusConfig, TextRecords
from infscan.corpus.decompress import COMPRESSIONS, DAMAGES, decompressed
from infscan.errors import BadFileError
from infscan.storage import InputFile, open_input

# So many parts there are at least before files share one: enough for many workers.
_FEW_PARTS = 1024
_SAMPLE_BYTES = 8 << 20
_BY_BYTES = ("jsonl", "megatron", "npy")
# What a compressed file is taken to become at most, before it is looked into.
_EXPANSION = 8


@dataclass(frozen=True)
class FileRange:
    """The records of a file that begin in [start, stop), as its format counts: bytes or rows."""

    start: int = 0
    stop: int | None = None

    @property
    def whole(self) -> bool:
        return self == WHOLE


WHOLE = FileRange()


@dataclass(frozen=True)
class InputSplit:
    """What one part is made of: one file's stretch, or several whole files in order."""

    files: tuple[InputFile, ...]
    stretch: FileRange = WHOLE

    def to_json(self) -> str:
        # Not dataclasses.asdict, which is many times as slow where a piece has a thousand files.
        files = [{"uri": file.uri, "size": file.size, "etag": file.etag} for file in self.files]
        return json.dumps({"files": files, "stretch": asdict(self.stretch)})

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> InputSplit:
        return cls(tuple(InputFile(**file) for file in value["files"]), FileRange(**value["stretch"]))


def plan_splits(files: Sequence[InputFile], config: CorpusConfig, format_of: Callable[[str], str]) -> list[InputSplit]:
    """Every record of the files in exactly one piece, in order. Only files above corpus.part_bytes are opened."""
    together = min(config.part_bytes, sum(file.size for file in files) // _FEW_PARTS)
    pieces: list[InputSplit] = []
    group: list[InputFile] = []
    room = together
    for file in files:
        stretches = list(_file_ranges(file, format_of(file.uri), config))
        if group and (len(stretches) > 1 or file.size > room):
            pieces.append(InputSplit(tuple(group)))
            group, room = [], together
        if len(stretches) > 1:
            pieces += [InputSplit((file,), stretch) for stretch in stretches]
        else:
            group.append(file)
            room -= file.size
    return [*pieces, InputSplit(tuple(group))] if group else pieces


def _file_ranges(file: InputFile, kind: str, config: CorpusConfig) -> Iterator[FileRange]:
    limit = config.part_bytes
    compressed = file.uri.endswith(COMPRESSIONS)
    if file.size * (_EXPANSION if compressed else 1) <= limit:
        yield WHOLE
    elif kind in _BY_BYTES or (kind == "text" and config.text_records is TextRecords.line):
        size = int(file.size * _expansion(file)) if compressed else file.size
        starts = range(0, max(size, 1), limit)
        # The last one runs to the end, wherever that is: of a compressed file the size is a guess.
        yield from (FileRange(at, at + limit if at + limit < size else None) for at in starts)
    elif kind == "parquet":
        yield from _row_ranges(file, limit)
    else:
        yield WHOLE


def _expansion(file: InputFile) -> float:
    """How many bytes one compressed byte becomes, going by the file's beginning."""
    try:
        with open_input(file.uri) as stream:
            plain = len(decompressed(file.uri, stream).read(_SAMPLE_BYTES))
            return max(1.0, plain / max(1, stream.tell()))
    except (*DAMAGES, BadFileError):
        return 1.0  # whoever reads it says what is wrong


def _row_ranges(file: InputFile, limit: int) -> Iterator[FileRange]:
    """Row groups up to `limit` decompressed bytes together; one beyond that is cut into equal numbers of rows."""
    try:
        with open_input(file.uri) as stream, pq.ParquetFile(stream) as parquet:
            metadata = parquet.metadata
            groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
    except (pa.ArrowException, OSError):
        yield WHOLE  # whoever reads it says what is wrong
        return
    cuts: list[int] = []
    row = held = 0
    for rows, size in sizes:
        if held and held + size > limit:
            cuts.append(row)
            held = 0
        pieces = min(rows, -(-size // limit))
        cuts += [row + rows * n // pieces for n in range(1, pieces)]
        row, held = row + rows, held + size if pieces <= 1 else limit
    bounds = [0, *cuts, None]
    yield from (FileRange(start or 0, stop) for start, stop in pairwise(bounds))
