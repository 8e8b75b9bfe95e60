"""One part of a prepared corpus as a Parquet file: sequences in rows, and in the footer what it was made of."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Row
from dataclasses import asdict
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infscan.corpus.manifest import SCHEMA_VERSION, PartSummary, footer_digest, part_name, part_of, part_schema
from infscan.corpus.packing import PackSettings
from infscan.corpus.sequences import Sequence
from infscan.storage import MissingError, Store
from infscan.storage.foreign import parse_json

ROW_GROUP_SEQUENCES = 1024
_FOOTER_KEY = b"infscan"


def part_bytes(
    sequences: Iterator[Sequence], pack: PackSettings, summary_of: Callable[[str], PartSummary]
) -> tuple[bytes, PartSummary]:
    """A part's bytes, and what its footer says; `summary_of` its digest is asked once the sequences are exhausted."""
    digest = sha256()
    sink = pa.BufferOutputStream()
    schema = part_schema(pack.vocab_size, masked=pack.masked)
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        while rows := list(islice(sequences, ROW_GROUP_SEQUENCES)):
            writer.write_table(_table(rows, schema), row_group_size=ROW_GROUP_SEQUENCES)
            for row in rows:
                _digest_row(digest, row)
        summary = summary_of(digest.hexdigest())
        footer = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(summary)}, sort_keys=True)
        writer.add_key_value_metadata({_FOOTER_KEY: footer.encode()})
    return sink.getvalue().to_pybytes(), summary


def finished_part(store: Store, index: int) -> PartSummary | None:
    """The footer of a part that exists; None if the part or its schema is missing."""
    try:
        with store.open(part_name(index)) as stream:
            size, digest = stream.seek(0, io.SEEK_END), footer_digest(stream)
            footer = pq.read_metadata(stream).metadata or {}
    except (MissingError, pa.ArrowException, OSError, ValueError):
        return None
    try:
        value = parse_json(footer.get(_FOOTER_KEY, b"{}"))
        if value.pop("schema_version", None) != SCHEMA_VERSION or value["index"] != index:
            return None
        return part_of(value | {"bytes": size, "footer": digest})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _table(rows: Row[Sequence], schema: pa.Schema) -> pa.Table:
    token = schema.field("token_ids").type.value_type.to_pandas_dtype()
    span = schema.field("documents").type.value_type
    spans = [document for row in rows for document in row.documents]
    columns = (
        pa.array([s.id for s in spans], pa.string()),
        pa.array([s.source for s in spans], pa.string()),
        pa.array([s.start for s in spans], pa.int32()),
        pa.array([s.end for s in spans], pa.int32()),
    )
    token_ids = np.concatenate([row.token_ids for row in rows]).astype(token)
    return pa.Table.from_arrays(
        [
            pa.ListArray.from_arrays(_offsets(len(row) for row in rows), token_ids),
            pa.ListArray.from_arrays(
                _offsets(len(row.documents) for row in rows), pa.StructArray.from_arrays(columns, fields=list(span))
            ),
            pa.array([row.byte_offset for row in rows], pa.int64()),
            pa.array([row.path for row in rows], pa.string()),
            *([_masks(rows)] if "loss_mask" in schema.names else []),
        ],
        schema=schema,
    )


def _masks(rows: Row[Sequence]) -> pa.Array:
    masks = [row.loss if row.loss is not None else np.ones(len(row), np.bool_) for row in rows]
    return pa.ListArray.from_arrays(_offsets(len(row) for row in rows), pa.array(np.concatenate(masks), pa.bool_()))


def _offsets(lengths: Iterable[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths]), pa.int32())


def _digest_row(digest: Any, row: Sequence) -> None:
    digest.update(struct.pack("<qq", len(row), len(row.documents)))
    digest.update(row.token_ids.astype("<u4").tobytes())
    for span in row.documents:
        name = span.id.encode()
        digest.update(struct.pack("<qqq", len(name), span.start, span.end) + name)
    if row.loss is not None:
        digest.update(b"loss" + row.loss.astype(np.uint8).tobytes())
