"""What a prepared corpus says of itself: its parts, their columns, and manifest.json."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from infscan.config import fingerprint, is_intact, sealed
from infscan.corpus.packing import Counts
from infscan.corpus.tally import LeftOut
from infscan.errors import CorpusError
from infscan.storage import InputFile

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class PartSummary:
    """What one part holds and was made from. `digest` covers token ids, document ids and spans, and no path.

    `footer` is the SHA-256 of the file's Parquet footer: pages have checksums of their own, the footer has none.
    """

    index: int
    sequences: int
    tokens: int
    digest: str
    bytes: int
    input: InputFile
    settings: str
    counts: Counts
    left_out: LeftOut = field(default_factory=LeftOut)
    footer: str = ""

    @property
    def name(self) -> str:
        return part_name(self.index)


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says. `first[i]` is the number of part i's first sequence."""

    fingerprint: str
    settings: Mapping[str, Any]
    sequence_length: int
    vocab_size: int
    tokenizer: str | None
    sequences: int
    tokens: int
    counts: Counts
    parts: tuple[PartSummary, ...]

    @property
    def left_out(self) -> LeftOut:
        """The documents and files that could not be used, as far as corpus.allow_bad_* let them pass."""
        return LeftOut.together(part.left_out for part in self.parts)

    @property
    def inputs(self) -> list[InputFile]:
        return [part.input for part in self.parts]

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
            del part["settings"], part["input"]
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
            "inputs": [asdict(file) for file in self.inputs],
            "parts": parts,
        }
        return sealed(value)

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
        if not is_intact(value):
            raise CorpusError(f"{where} is not a corpus manifest, or was changed or damaged; prepare the corpus again.")
        try:
            settings = fingerprint(value["settings"])
            parts = tuple(
                PartSummary(
                    index=part["index"],
                    sequences=part["sequences"],
                    tokens=part["tokens"],
                    digest=part["digest"],
                    bytes=part["bytes"],
                    input=InputFile(**file),
                    settings=settings,
                    counts=Counts(**part["counts"]),
                    left_out=left_out_of(part),
                    footer=part["footer"],
                )
                for part, file in zip(value["parts"], value["inputs"], strict=True)
            )
            return cls(
                fingerprint=value["fingerprint"],
                settings=value["settings"],
                sequence_length=value["sequence_length"],
                vocab_size=value["vocab_size"],
                tokenizer=value["tokenizer"],
                sequences=value["sequences"],
                tokens=value["tokens"],
                counts=Counts(**value["counts"]),
                parts=parts,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorpusError(f"{where} is not a corpus manifest ({error!r}); prepare the corpus again.") from error


def left_out_of(part: Mapping[str, Any]) -> LeftOut:
    """What a stored part says it left out; a part that does not say left out nothing."""
    value = part.get("left_out", {"by_reason": {}, "first": []})
    return LeftOut(value["by_reason"], list(value["first"]))


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
    """A part's columns; token ids in the smallest of uint16 and uint32 that holds the vocabulary.

    masked: with `loss_mask`, true on the tokens whose prediction has a loss; without it all of them have one.
    """
    token = pa.uint16() if vocab_size <= 1 << 16 else pa.uint32()
    span = pa.struct([("id", pa.string()), ("source", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
    columns = [
        ("token_ids", pa.list_(token)),
        ("documents", pa.list_(span)),
        ("byte_offset", pa.int64()),
        ("path", pa.string()),
    ]
    return pa.schema([*columns, ("loss_mask", pa.list_(pa.bool_()))] if masked else columns)
