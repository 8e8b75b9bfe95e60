"""MosaicML's MDS: index.json lists the shards; a shard holds samples, a sample the values of its columns.

A shard (after decompression): u32 number of samples n, u32 [n + 1] offsets of the samples in the shard, a JSON of its
own, the samples. A sample: a u32 size for every column without a fixed one, then the columns' bytes, in the order that
index.json gives. Everything little-endian. Columns that are pickled are refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from infscan.config import CorpusConfig
from infscan.corpus.files import file_name
from infscan.corpus.in_place import InPlace, document_spans
from infscan.corpus.sequences import Span, TokenBlock
from infscan.errors import CorpusError
from infscan.storage import InputFile, look_up, read_range
from infscan.storage.foreign import parse_json

INDEX = "index.json"
MAX_SHARD_BYTES = 2 << 30
_UNSAFE = ("pkl",)
_TEXTS = ("str", "str_int")
_SCALARS = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")
_WHOLE = {**{name: np.dtype(name) for name in _SCALARS}, "int": np.dtype("<i8")}
_CODES = {8: "|u1", 9: "|i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
_KEPT_SHARDS = 2
# Folders up to the one whose index.json was merged of those below it.
_INDEX_ABOVE = 4


@dataclass(frozen=True)
class Shard:
    """One shard as index.json describes it. sizes: bytes of each column, 0 where every sample says its own."""

    file: InputFile
    raw_bytes: int
    compressed: bool
    samples: int
    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int, ...]

    def to_facts(self) -> dict[str, Any]:
        return {
            "raw_bytes": self.raw_bytes,
            "compressed": self.compressed,
            "samples": self.samples,
            "names": list(self.names),
            "encodings": list(self.encodings),
            "sizes": list(self.sizes),
        }

    @classmethod
    def of_facts(cls, file: InputFile, facts: dict[str, Any]) -> Shard:
        lists = {key: tuple(facts[key]) for key in ("names", "encodings", "sizes")}
        return cls(file, facts["raw_bytes"], facts["compressed"], facts["samples"], **lists)

    def encoding(self, column: str) -> str | None:
        return self.encodings[self.names.index(column)] if column in self.names else None


def read_index(index: InputFile, files: dict[str, InputFile]) -> list[Shard]:
    """The shards that an index.json lists, in its order. files: what is beside it, by address.

    Raises:
        CorpusError: for an index that cannot be read, another version, a pickled column, a compression other than zstd,
            and a shard that is missing or has another size.
    """
    folder = index.uri.rsplit("/", 1)[0]
    with _readable(index.uri):
        return [_shard(index.uri, folder, entry, files) for entry in _entries(index)]


def read_shard(file: InputFile) -> tuple[InputFile, Shard]:
    """A shard as the index.json beside it describes it, or a merged one in a folder above; and that index.

    Raises:
        CorpusError: as `read_index`, and where no index lists the file.
    """
    nearest = None
    for levels in range(1, _INDEX_ABOVE + 1):
        folder = file.uri.rsplit("/", levels)[0]
        if folder.endswith(":/") or not folder:
            break
        if (index := look_up(f"{folder}/{INDEX}")) is None:
            continue
        nearest = nearest or index
        with _readable(index.uri):
            for entry in _entries(index):
                if file.uri in _addresses(folder, entry):
                    return index, _shard(index.uri, folder, entry, {file.uri: file})
    if nearest is None:
        raise CorpusError(f"{file.uri}: MDS shards come with an {INDEX}, and there is none; copy it too.")
    raise CorpusError(f"{nearest.uri} does not list {file_name(file.uri)}; remove the shard, or copy the index again.")


def _entries(index: InputFile) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = parse_json(read_range(index.uri, 0, index.size))["shards"]
    return found


def _addresses(folder: str, entry: dict[str, Any]) -> list[str]:
    """Where a shard of an index in `folder` may lie: plain, and compressed."""
    both = (entry["raw_data"], entry.get("zip_data"))
    return [f"{folder}/{data['basename']}" for data in both if data]


@contextmanager
def _readable(index: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{index} is no index of MDS shards ({error!r}); write it again.") from error


def _shard(where: str, folder: str, entry: dict[str, Any], files: dict[str, InputFile]) -> Shard:
    raw, zipped = entry["raw_data"], entry.get("zip_data")
    name = raw["basename"]
    if entry["format"] != "mds" or entry["version"] != 2:
        raise CorpusError(
            f"{where}: {name} has format {entry['format']!r}, version {entry['version']}; infscan reads mds, version 2."
        )
    for column, encoding in zip(entry["column_names"], entry["column_encodings"], strict=True):
        if encoding in _UNSAFE:
            raise CorpusError(
                f"{where}: column {column!r} is pickled ({encoding}), which runs foreign code when it is opened; write "
                "the shards without it."
            )
    compression = entry.get("compression")
    if zipped and str(compression).split(":")[0] != "zstd":
        raise CorpusError(f"{where}: {name} is compressed with {compression!r}; infscan reads zstd and plain shards.")
    stored = zipped or raw
    file = files.get(f"{folder}/{stored['basename']}")
    compressed = zipped is not None
    if file is None and compressed:
        # Decompressed in place, as streaming leaves it.
        file, compressed, stored = files.get(f"{folder}/{name}"), False, raw
    if file is None:
        raise CorpusError(f"{folder}/{stored['basename']} is missing, and {where} lists it; copy the shard again.")
    if file.size != stored["bytes"]:
        raise CorpusError(
            f"{file.uri} has {file.size} bytes, and {where} says {stored['bytes']}: it was cut off; copy it again."
        )
    if raw["bytes"] > MAX_SHARD_BYTES:
        raise CorpusError(
            f"{where}: {name} has {raw['bytes']} bytes decompressed, more than {MAX_SHARD_BYTES}; write smaller shards."
        )
    return Shard(
        file=file,
        raw_bytes=raw["bytes"],
        compressed=compressed,
        samples=entry["samples"],
        names=tuple(entry["column_names"]),
        encodings=tuple(entry["column_encodings"]),
        sizes=tuple(size or 0 for size in entry["column_sizes"]),
    )


def stored_once(files: Sequence[InputFile]) -> list[InputFile]:
    """The files without shards that lie there decompressed too, as streaming leaves them: a shard counts once."""
    zipped = {file.uri for file in files if file.uri.endswith(".mds.zstd")}
    return [file for file in files if f"{file.uri}.zstd" not in zipped]


class ShardReader:
    """The samples of one shard: ranged reads of a plain one, a zstd one decompressed whole and checked for its size."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self._whole = _decompressed(shard) if shard.compressed else None

    def samples(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, bytes]]]:
        """Samples [start, stop): where each begins in the shard, and its columns' bytes.

        Raises:
            CorpusError: where offsets or sizes do not fit the shard.
        """
        offsets = np.frombuffer(self._read(4 + 4 * start, 4 + 4 * (stop + 1)), "<u4").astype(np.int64)
        if (np.diff(offsets) < 0).any() or offsets[-1] > self.shard.raw_bytes:
            raise CorpusError(f"{self.shard.file.uri}: its samples' offsets do not fit the shard; copy it again.")
        data = self._read(int(offsets[0]), int(offsets[-1]))
        for at in range(stop - start):
            begin, end = int(offsets[at] - offsets[0]), int(offsets[at + 1] - offsets[0])
            yield int(offsets[at]), self._columns(start + at, data[begin:end])

    def _columns(self, number: int, sample: bytes) -> dict[str, bytes]:
        variable = sum(size == 0 for size in self.shard.sizes)
        own = iter(np.frombuffer(sample[: 4 * variable], "<u4").tolist())
        sizes = [size or next(own, 0) for size in self.shard.sizes]
        if 4 * variable + sum(sizes) != len(sample):
            raise CorpusError(
                f"{self.shard.file.uri}, sample {number}: its columns are {4 * variable + sum(sizes)} bytes, and it "
                f"has {len(sample)}; copy the shard again."
            )
        at = 4 * variable
        columns = {}
        for name, size in zip(self.shard.names, sizes, strict=True):
            columns[name] = sample[at : at + size]
            at += size
        return columns

    def _read(self, start: int, stop: int) -> bytes:
        if stop > self.shard.raw_bytes:
            raise CorpusError(f"{self.shard.file.uri} is too short for its samples; copy it again.")
        return self._whole[start:stop] if self._whole is not None else read_range(self.shard.file.uri, start, stop)


def _decompressed(shard: Shard) -> bytes:
    # Only who reads such a shard needs it.
    import zstandard

    data = read_range(shard.file.uri, 0, shard.file.size)
    try:
        whole = zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read(shard.raw_bytes + 1)
    except zstandard.ZstdError as error:
        raise CorpusError(f"{shard.file.uri}: the compressed shard is corrupt ({error}); copy it again.") from error
    if len(whole) != shard.raw_bytes:
        raise CorpusError(
            f"{shard.file.uri} decompresses to another size than the {shard.raw_bytes} bytes that its index.json says; "
            "copy it again."
        )
    return whole


def token_ids(where: str, encoding: str, value: bytes, dtype: str | None) -> np.ndarray:
    """A column's value as token ids. A column of plain bytes needs `dtype` (corpus.dtype; null is int64, as LLM Foundry
    writes them).

    Raises:
        CorpusError: for a column that holds something else.
    """
    name, _, rest = encoding.partition(":")
    if name == "ndarray":
        return _ndarray(where, value, *rest.partition(":")[::2])
    if name != "bytes":
        raise CorpusError(
            f"{where}: a column of {encoding} holds no token ids; name one of ndarray or bytes in corpus.tokens_field."
        )
    kind = np.dtype(dtype or "int64").newbyteorder("<")
    if len(value) % kind.itemsize:
        raise CorpusError(f"{where}: {len(value)} bytes are no number of {kind.name}; set corpus.dtype.")
    return np.frombuffer(value, kind)


def _ndarray(where: str, value: bytes, dtype: str, shape: str) -> np.ndarray:
    at = 0
    if dtype:
        kind = np.dtype(dtype)
    else:
        kind = np.dtype(_CODES.get(value[0] if value else 0, "f8"))
        at = 1
    if kind.kind not in "iu":
        raise CorpusError(f"{where} holds {kind.name} or another array than token ids; they are whole numbers.")
    if not shape:
        head = value[at] if at < len(value) else 0
        at += 1 + (head >> 2) * (1 << head % 4)
    if (len(value) - at) % kind.itemsize or at > len(value):
        raise CorpusError(f"{where}: its array is cut off; write the shard again.")
    return np.frombuffer(value[at:], kind.newbyteorder("<"))


def text_of(where: str, encoding: str | None, value: bytes) -> str:
    """A column's value as the text that ids, sources and documents are.

    Raises:
        CorpusError: for a column of another kind, or bytes that are not UTF-8.
    """
    if encoding in _TEXTS:
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise CorpusError(f"{where}: not UTF-8 at byte {error.start}; write the shard again.") from None
    kind = _WHOLE.get(str(encoding))
    if kind is not None and len(value) == kind.itemsize:
        return str(int(np.frombuffer(value, kind.newbyteorder("<"))[0]))
    raise CorpusError(f"{where}: a column of {encoding} is no text; name another.")


def label_column(shard: Shard, config: CorpusConfig, key: str) -> str | None:
    """The column of an id or source; None where nobody named it and it is not there, or can be no label.

    Raises:
        CorpusError: for a column that was named and is not there, or can be none.
    """
    column = str(getattr(config, key))
    encoding = shard.encoding(column)
    if encoding in _TEXTS or encoding in _WHOLE:
        return column
    if column == getattr(CorpusConfig, key):
        return None
    what = "is not there" if encoding is None else f"holds {encoding}, no texts or whole numbers"
    raise CorpusError(
        f"{shard.file.uri}: corpus.{key}={column} {what}; its columns are {', '.join(shard.names)}: name one, or leave "
        "the key out."
    )


class MdsSamples(InPlace):
    """Samples of token ids: each is one sequence, or `windows` of T where all are longer alike."""

    def _forget(self) -> None:
        super()._forget()
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    def block(self, index: int, start: int, stop: int) -> TokenBlock:
        length, per = self.sequence_length, self._facts(index)["windows"]
        rows: list[np.ndarray] = []
        for sample, tokens, _ in self._samples(index, start // per, -(-stop // per)):
            if not (per - 1) * length < len(tokens) <= per * length:
                raise CorpusError(
                    f"{self.description.files[index].data.uri}, sample {sample} has {len(tokens)} tokens, and the "
                    f"first comes to {per} sequences of at most {length}; samples of uneven lengths are prepared: set "
                    "corpus.in_place=false."
                )
            rows += [tokens[at : at + length] for at in range(0, len(tokens), length)]
        rows = rows[start % per :][: stop - start]
        return TokenBlock(np.concatenate(rows), np.cumsum([0, *map(len, rows)], dtype=np.int64))

    def spans(self, index: int, start: int, stop: int, block: TokenBlock) -> Iterator[tuple[tuple[Span, ...], int]]:
        facts, length = self._facts(index), self.sequence_length
        per = facts["windows"]
        separators = (self.description.bos_id, self.description.eos_id)
        for sample, tokens, (offset, columns) in self._samples(index, start // per, -(-stop // per)):
            where = f"{self.description.files[index].data.uri}, sample {sample}"
            source = self._label(where, facts, columns, "source_field", self.description.files[index].name)
            name = self._label(where, facts, columns, "id_field", f"{self.description.files[index].name}#{sample}")
            after_eos = np.flatnonzero(tokens == self.description.eos_id) + 1
            starts = np.array([0, *after_eos], np.int64)
            names = [name, *(f"{name}@{at}" for at in after_eos.tolist())]
            for window in range(per):
                if start <= sample * per + window < stop:
                    begin, end = window * length, min((window + 1) * length, len(tokens))
                    yield document_spans(starts, names, source, (begin, end), tokens[begin:end], separators)[0], offset

    def _samples(
        self, index: int, start: int, stop: int
    ) -> Iterator[tuple[int, np.ndarray, tuple[int, dict[str, bytes]]]]:
        facts = self._facts(index)
        reader = self._reader(index)
        encoding = reader.shard.encoding(facts["tokens_field"])
        assert encoding is not None, "a shard without token ids was described"
        for at, (offset, columns) in enumerate(reader.samples(start, stop), start):
            where = f"{self.description.files[index].data.uri}, sample {at}"
            yield at, token_ids(where, encoding, columns[facts["tokens_field"]], facts["dtype"]), (offset, columns)

    def _label(self, where: str, facts: dict[str, Any], columns: dict[str, bytes], key: str, missing: str) -> str:
        column = facts[key]
        if column not in columns:
            return missing
        encoding = facts["encodings"][facts["names"].index(column)]
        usable = encoding in _TEXTS or encoding in _WHOLE
        # One that was asked for by name was refused when the shards were described.
        return text_of(where, encoding, columns[column]) if usable else missing

    def _reader(self, index: int) -> ShardReader:
        if index not in self._readers:
            self._readers[index] = ShardReader(Shard.of_facts(self.description.files[index].data, self._facts(index)))
            if len(self._readers) > _KEPT_SHARDS:
                self._readers.popitem(last=False)
        self._readers.move_to_end(index)
        return self._readers[index]

    def _facts(self, index: int) -> dict[str, Any]:
        return self.description.files[index].facts


def sample_tokens(shard: Shard, column: str, dtype: str | None) -> int:
    """How many token ids the first sample has: what `windows` is reckoned from."""
    _, columns = next(ShardReader(shard).samples(0, 1))
    encoding = shard.encoding(column)
    assert encoding is not None
    return len(token_ids(f"{file_name(shard.file.uri)}, sample 0", encoding, columns[column], dtype))
