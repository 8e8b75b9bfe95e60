"""An index in storage: a file of codes per shard, and index.json, whose presence says that the index is complete.

A file of codes is an Arrow IPC file of one uncompressed record batch: what Arrow, Polars or pandas read, and what can
be mapped into memory and multiplied with as it lies (a Parquet page is to be decoded first). Its columns:

sequence_id int64; tokens int32; loss float32 (nats); self_influence float32, an estimate of the squared norm of the
whitened gradient; with index.gradient_norm, gradient_norm float32; and, for every layer, `code|<layer>` fixed-size
binary, `scale|<layer>` float32, `rms|<layer>` and `left_out|<layer>` float16 (`infscan.influence.packed`).

The schema's metadata has, under `infscan`, a fingerprint, counts and a digest of every column, sealed; index.json has
every file's seal. So a file that was cut off, changed or replaced is found when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infscan.config import checksum_ok, fingerprint, seal_of, with_checksum
from infscan.errors import DamagedError, RunError
from infscan.storage import MissingError, Store
from infscan.storage.foreign import parse_json
from infscan.storage.prefetch import prefetch

FOLDER, SUFFIX, MANIFEST = "codes", ".arrow", "index.json"
SCHEMA_VERSION = 1
_METADATA = b"infscan"
# Of whatever infscan began in a folder.
_CONFIG = "config.yaml"

Column = NDArray[Any]


def column_of(kind: str, layer: str) -> str:
    return f"{kind}|{layer}"


def codes_path(shard: str) -> str:
    return f"{FOLDER}/{shard}{SUFFIX}"


@dataclass(frozen=True)
class CodesFile:
    """What index.json says of a file. seal: of its header, which has a digest of every column."""

    bytes: int
    rows: int
    tokens: int
    nonfinite: int
    seal: str


def codes_bytes(name: str, columns: Mapping[str, Column], key: str, counts: Mapping[str, int]) -> tuple[bytes, str]:
    """A file of codes, and its seal. columns: of one length; codes are uint8 [n, bytes], others [n].

    key: the fingerprint of what it is made of.
    """
    arrays = {column: _to_arrow(values) for column, values in columns.items()}
    facts = with_checksum(
        {
            "schema_version": SCHEMA_VERSION,
            "of": name,
            "fingerprint": key,
            "counts": dict(counts),
            "columns": {column: _digest(values) for column, values in columns.items()},
        }
    )
    schema = pa.schema(
        [(column, array.type) for column, array in arrays.items()], metadata={_METADATA: json.dumps(facts).encode()}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(list(arrays.values()), schema=schema))
    return sink.getvalue().to_pybytes(), seal_of(facts)


def _to_arrow(values: Column) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    values = np.ascontiguousarray(values)
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values.shape[1]), len(values), [None, pa.py_buffer(values)])


def _digest(values: Column) -> str:
    return sha256(np.ascontiguousarray(values).view(np.uint8).data).hexdigest()


def read_header(store: Store, name: str, key: str | None = None) -> CodesFile:
    """What a file says of itself; its columns are not read. key: the fingerprint that it must have.

    Raises:
        MissingError: where it is not there.
        DamagedError: where it is torn or changed.
        RunError: where it is of another index.
    """
    with _opened(store, name) as (size, reader, facts):
        if key is not None and facts["fingerprint"] != key:
            raise RunError(
                f"{store.uri}/{name} was made of other inputs or settings than this index (its header has another "
                "fingerprint); remove it, or give another output=..."
            )
        if reader.num_record_batches != 1:
            raise damaged(store, name, f"it has {reader.num_record_batches} record batches where one was written")
        counts = facts["counts"]
        return CodesFile(size, counts["rows"], counts["tokens"], counts["nonfinite"], seal_of(facts))


def read_columns(
    store: Store, name: str, columns: Sequence[str], seal: str | None = None, *, verify: bool = True
) -> dict[str, Column]:
    """Some columns of a file: mapped where the disk is local, else read by byte range. Codes are uint8 [n, bytes].

    seal: of the file that it must be. verify: hold every column to its digest; without, it was held to it before.

    Raises:
        DamagedError: where a column is not what was written, or the file is another one.
    """
    with _opened(store, name, columns) as (_, reader, facts):
        if seal is not None and seal_of(facts) != seal:
            raise damaged(store, name, "it is whole, and another file than the one that was indexed")
        batch = reader.get_batch(0)
        found = {column: _to_numpy(batch.column(column)) for column in columns}
        if batch.num_rows != facts["counts"]["rows"]:
            raise damaged(store, name, f"{batch.num_rows} rows where {facts['counts']['rows']} were written")
        for column, values in found.items() if verify else ():
            if _digest(values) != facts["columns"][column]:
                raise damaged(store, name, f"the column {column!r} is not what was written")
        return found


def _to_numpy(array: pa.Array) -> Column:
    if not pa.types.is_fixed_size_binary(array.type):
        found: Column = array.to_numpy(zero_copy_only=array.null_count == 0)
        return found
    width = array.type.byte_width
    whole = np.frombuffer(array.buffers()[1], np.uint8, width * len(array), offset=width * array.offset)
    return whole.reshape(len(array), width)


@contextmanager
def _opened(store: Store, name: str, columns: Sequence[str] = ()) -> Iterator[tuple[int, Any, dict[str, Any]]]:
    """The file's size, a reader of these columns, and its facts."""
    try:
        view = store.mapped(name)
        source: Any = store.open(name) if view is None else pa.BufferReader(pa.py_buffer(view))
        with source:
            reader = pa.ipc.open_file(source)
            source.seek(0, 2)
            size = source.tell()
            if view is None:
                # Of what is mapped nothing is read that is not looked at, and chosen columns would be copied.
                wanted = [reader.schema.names.index(column) for column in columns]
                source.seek(0)
                reader = pa.ipc.open_file(source, options=pa.ipc.IpcReadOptions(included_fields=wanted))
            yield size, reader, _facts(store, name, (reader.schema.metadata or {}).get(_METADATA))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(store, name, " ".join(str(error).split())) from error


def _facts(store: Store, name: str, raw: bytes | None) -> dict[str, Any]:
    facts: Any = None
    with suppress(ValueError):
        facts = parse_json(raw or b"")
    if not checksum_ok(facts):
        raise damaged(store, name, "its header is not what was written")
    if facts["schema_version"] > SCHEMA_VERSION:
        raise RunError(f"{store.uri}/{name} is of a newer infscan; upgrade infscan to read this index.")
    if facts["of"] != name:
        raise damaged(store, name, f"it was written as {facts['of']}")
    known: dict[str, Any] = facts
    return known


def damaged(store: Store, name: str, reason: str) -> DamagedError:
    """The error for a file of an index that does not hold what was written."""
    return DamagedError(
        f"{store.uri}/{name} is damaged ({reason}); remove it and {MANIFEST}, and run the same infscan index again, "
        "which makes this file alone anew."
    )


@dataclass(frozen=True)
class IndexManifest:
    """index.json: what the codes are of, and every file of them.

    fields: by name, the fingerprints of model, corpus and factors, and all that fixes a code. layers: bytes of a row's
    code by layer.
    """

    fields: Mapping[str, Any]
    layers: Mapping[str, int]
    files: Mapping[str, CodesFile]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files.values())

    @property
    def nonfinite(self) -> int:
        return sum(file.nonfinite for file in self.files.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: codes, with a scale and two norms a layer, and what is kept of the sequence."""
        return row_bytes(self.layers)

    @property
    def fingerprint(self) -> str:
        """Of the whole index: what it is of, and every file's content."""
        return fingerprint([dict(self.fields), {name: file.seal for name, file in self.files.items()}])

    def to_json(self) -> dict[str, Any]:
        return with_checksum({"schema_version": SCHEMA_VERSION, **asdict(self)})


def row_bytes(layers: Mapping[str, int], *, gradient_norm: bool = False) -> int:
    """Bytes of a row of an index, from the bytes of its codes by layer."""
    of_sequence, of_layer = 8 + 4 + 4 + 4 + 4 * gradient_norm, 4 + 2 + 2
    return of_sequence + sum(layers.values()) + of_layer * len(layers)


def read_manifest(store: Store) -> IndexManifest:
    """The index of a folder, its files looked at by name and size alone.

    Raises:
        RunError: where there is no complete index.
        DamagedError: where index.json is not what was written, or a file is missing or cut off.
    """
    try:
        value = parse_json(store.read(MANIFEST))
    except MissingError:
        what = "there is nothing at this address; check it"
        if store.exists(_CONFIG):
            what = (
                "it is an index that is not finished, which the same infscan index goes on with, or a run without one"
            )
        raise RunError(f"{store.uri} has no {MANIFEST}: {what}.") from None
    except ValueError:
        value = None
    if not checksum_ok(value):
        raise damaged(store, MANIFEST, "it is not what was written")
    if value["schema_version"] > SCHEMA_VERSION:
        raise RunError(f"{store.uri}/{MANIFEST} is of a newer infscan; upgrade infscan to ask this index.")
    found = IndexManifest(
        value["fields"], value["layers"], {name: CodesFile(**file) for name, file in value["files"].items()}
    )
    there = {entry.name: entry.size for entry in store.list(FOLDER, suffix=SUFFIX)}
    for name, file in found.files.items():
        if there.get(name) != file.bytes:
            reason = "it is missing" if name not in there else f"{there[name]} bytes where {file.bytes} were written"
            raise damaged(store, name, reason)
    return found


def verify_index(store: Store) -> int:
    """Hold every column of every file to its digest; returns how many files there are.

    Raises:
        RunError: where there is no complete index.
        DamagedError: with the first file that is not what was written.
    """
    manifest = read_manifest(store)

    def check(name: str) -> None:
        with _opened(store, name) as (_, reader, _facts):
            columns = list(reader.schema.names)
        read_columns(store, name, columns, manifest.files[name].seal)

    for _ in prefetch(store, check, list(manifest.files)):
        pass
    return len(manifest.files)
