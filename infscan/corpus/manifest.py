"""The manifest of a prepared corpus: its parts, their columns, and manifest.json."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infscan.config import checksum_ok, fingerprint, with_checksum
from infscan.corpus.packing import Counts, Lengths
from infscan.corpus.splits import InputSplit
from infscan.corpus.tally import LeftOut
from infscan.errors import CorpusError
from infscan.storage import InputFile, MissingError, Store
from infscan.storage.shapes import check_types

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
# Its name begins with '_', so that who reads the folder as one table passes it over.
INPUTS = "_inputs.parquet"


@dataclass(frozen=True)
class PartSummary:
    """What one part holds and was made of. `digest` covers token ids, document ids and spans, and no path.

    `footer` is the SHA-256 of the file's Parquet footer: pages have checksums of their own, the footer has none.
    piece, dropped: not in manifest.json; the files are in _inputs.parquet. dropped: digest of which documents were left
    out as duplicates, empty for none.
    """

    index: int
    sequences: int
    tokens: int
    digest: str
    bytes: int
    piece: InputSplit = field(compare=False)
    settings: str
    counts: Counts
    left_out: LeftOut = field(default_factory=LeftOut)
    lengths: Lengths = field(default_factory=Lengths)
    dropped: str = field(default="", compare=False)
    footer: str = ""

    @property
    def name(self) -> str:
        return part_name(self.index)


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. `first[i]` is the number of part i's first sequence; `inputs` the SHA-256 of
    _inputs.parquet."""

    fingerprint: str
    settings: Mapping[str, Any]
    sequence_length: int
    vocab_size: int
    tokenizer: str | None
    sequences: int
    tokens: int
    counts: Counts
    parts: tuple[PartSummary, ...]
    inputs: str

    @property
    def left_out(self) -> LeftOut:
        """The documents and files that could not be used, as far as corpus.allow_bad_* let them pass."""
        return LeftOut.together(part.left_out for part in self.parts)

    @property
    def lengths(self) -> Lengths:
        return sum((part.lengths for part in self.parts), Lengths())

    @property
    def first(self) -> np.ndarray:
        """int64 [number of parts]."""
        sizes = [part.sequences for part in self.parts]
        return np.cumsum([0, *sizes[:-1]], dtype=np.int64)

    def to_json(self) -> dict[str, Any]:
        parts = [
            {"name": part.name, "first_sequence_id": int(first), **asdict(part)}
            for part, first in zip(self.parts, self.first, strict=True)
        ]
        for part in parts:
            del part["settings"], part["piece"], part["dropped"]
        value = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "settings": dict(self.settings),
            "sequence_length": self.sequence_length,
            "vocab_size": self.vocab_size,
            "tokenizer": self.tokenizer,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "counts": asdict(self.counts),
            "left_out": asdict(self.left_out),
            "document_lengths": self.lengths.to_json(),
            "inputs": self.inputs,
            "parts": parts,
        }
        return with_checksum(value)

    @classmethod
    def from_json(cls, value: Any, where: str) -> Manifest:
        """Read a manifest back.

        Raises:
            CorpusError: for another schema version, or a file that is no manifest or not what was written.
        """
        version = value.get("schema_version") if isinstance(value, dict) else None
        if version != SCHEMA_VERSION:
            raise CorpusError(
                f"{where} has schema version {version!r} and this infscan reads {SCHEMA_VERSION}; "
                "prepare the corpus again."
            )
        if not checksum_ok(value):
            raise CorpusError(f"{where} is not a corpus manifest, or was changed or damaged; prepare the corpus again.")
        try:
            settings = fingerprint(value["settings"])
            unsaid = {"settings": settings, "piece": {"files": [], "stretch": {}}}
            parts = tuple(part_of(part | unsaid) for part in value["parts"])
            found = cls(
                fingerprint=value["fingerprint"],
                settings=value["settings"],
                sequence_length=value["sequence_length"],
                vocab_size=value["vocab_size"],
                tokenizer=value["tokenizer"],
                sequences=value["sequences"],
                tokens=value["tokens"],
                counts=Counts(**value["counts"]),
                parts=parts,
                inputs=value["inputs"],
            )
            check_types(found, cls)
            if found.sequences != sum(part.sequences for part in parts):
                raise ValueError("its parts have another number of sequences")
            return found
        except (KeyError, TypeError, ValueError) as error:
            raise CorpusError(f"{where} is not a corpus manifest ({error!r}); prepare the corpus again.") from error


def part_of(value: Mapping[str, Any]) -> PartSummary:
    """A part as a footer or the manifest says it.

    Raises:
        KeyError, TypeError, ValueError: where something is missing or of another kind.
    """
    fields = {key: value[key] for key in PartSummary.__dataclass_fields__ if key in value}
    return PartSummary(
        **fields
        | {
            "piece": InputSplit.of(value["piece"]),
            "counts": Counts(**value["counts"]),
            "left_out": LeftOut(value["left_out"]["by_reason"], list(value["left_out"]["first"])),
            "lengths": Lengths(list(value["lengths"]["counts"])),
        }
    )


def inputs_parquet(parts: Sequence[PartSummary]) -> bytes:
    """A row per part and file: part, uri, size, etag, start, stop (of the stretch; null: to the file's end)."""
    rows = [(part, file) for part in parts for file in part.piece.files]
    table = pa.table(
        {
            "part": pa.array([part.index for part, _ in rows], pa.int64()),
            **{key: [getattr(file, key) for _, file in rows] for key in ("uri", "size", "etag")},
            "start": pa.array([part.piece.stretch.start for part, _ in rows], pa.int64()),
            "stop": pa.array([part.piece.stretch.stop for part, _ in rows], pa.int64()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def read_inputs(store: Store, manifest: Manifest) -> dict[str, InputFile]:
    """The files that a prepared corpus was made of, by address.

    Raises:
        CorpusError: where that is not said any more.
    """
    try:
        data = store.read(INPUTS)
    except MissingError as error:
        raise CorpusError(f"{store}/{INPUTS} is missing; prepare the corpus again.") from error
    if sha256(data).hexdigest() != manifest.inputs:
        raise CorpusError(f"{store}/{INPUTS} was changed or damaged; prepare the corpus again.")
    table = pq.read_table(pa.BufferReader(data))
    columns = (table[name].to_pylist() for name in ("uri", "size", "etag"))
    return {uri: InputFile(uri, size, etag) for uri, size, etag in zip(*columns, strict=True)}


def footer_digest(stream: BinaryIO) -> str:
    """SHA-256 of a Parquet file's footer, its length and magic included; of what is there where it is none."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - 8))
    length = int.from_bytes(stream.read(4), "little") + 8
    stream.seek(max(0, size - length))
    return sha256(stream.read(length)).hexdigest()


def part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def part_schema(vocab_size: int, *, masked: bool = False) -> pa.Schema:
    """A part's columns; token ids in the smallest of uint8, uint16 and uint32 that holds the vocabulary.

    masked: with `loss_mask`, true on the tokens whose prediction has a loss; without it all of them have one.
    """
    token = pa.uint8() if vocab_size <= 1 << 8 else pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()
    span = pa.struct([("id", pa.string()), ("source", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
    columns = [
        ("token_ids", pa.list_(token)),
        ("documents", pa.list_(span)),
        ("byte_offset", pa.int64()),
        ("path", pa.string()),
    ]
    return pa.schema([*columns, ("loss_mask", pa.list_(pa.bool_()))] if masked else columns)
