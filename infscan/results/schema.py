"""The tables that people read, and the rows that shards keep. The version is in every file's footer.

Compatibility: within one version columns are only added. Readers of this package refuse a newer version.
"""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infscan.errors import RunError
from infscan.storage import Store

SCHEMA_VERSION = 1
_FOOTER = b"infscan"

DOCUMENTS = pa.list_(
    pa.struct([("id", pa.string()), ("source", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
)

# shards/: one row per kept sequence; its hits say for which queries and sides it was kept.
CANDIDATES = pa.schema(
    [
        ("sequence_id", pa.int64()),
        ("token_ids", pa.list_(pa.int32())),
        ("documents", DOCUMENTS),
        ("path", pa.string()),
        ("byte_offset", pa.int64()),
        ("loss", pa.float32()),
        # On which tokens training had its loss; null where on all of them.
        ("loss_mask", pa.list_(pa.bool_())),
        (
            "hits",
            pa.list_(pa.struct([("query_id", pa.string()), ("side", pa.string()), ("scan_score", pa.float32())])),
        ),
    ]
)

# refined/: one row per re-scored (query, sequence); scores by tracked layer and by input position.
REFINED = pa.schema(
    [
        ("query_id", pa.string()),
        ("sequence_id", pa.int64()),
        ("layer_scores", pa.list_(pa.float32())),
        ("token_scores", pa.list_(pa.float32())),
    ]
)

TOP = pa.schema(
    [
        ("query_id", pa.string()),
        ("side", pa.string()),
        ("rank", pa.int32()),
        ("sequence_id", pa.int64()),
        ("score", pa.float32()),
        ("scan_score", pa.float32()),
        ("spurious", pa.bool_()),
        ("document_id", pa.string()),
        ("source", pa.string()),
    ]
)

SEQUENCES = pa.schema(
    [
        ("sequence_id", pa.int64()),
        ("document_id", pa.string()),
        ("documents", DOCUMENTS),
        ("source", pa.string()),
        ("path", pa.string()),
        ("byte_offset", pa.int64()),
        ("loss", pa.float32()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        # As in CANDIDATES.
        ("loss_mask", pa.list_(pa.bool_())),
    ]
)

LAYERS = pa.schema(
    [("query_id", pa.string()), ("sequence_id", pa.int64()), ("layer", pa.string()), ("score", pa.float32())]
)

TOKENS = pa.schema([("query_id", pa.string()), ("sequence_id", pa.int64()), ("scores", pa.list_(pa.float32()))])


def to_parquet(table: pa.Table, footer: dict[str, Any]) -> bytes:
    """A table as complete Parquet bytes: zstd, statistics, and `footer` with the schema version as JSON."""
    facts = json.dumps({"schema_version": SCHEMA_VERSION, **footer}).encode()
    table = table.replace_schema_metadata({_FOOTER: facts})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_statistics=True)
    return sink.getvalue()


def read_parquet(store: Store, name: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file as a table, with its footer in the schema's metadata.

    Read from memory that Arrow owns: its threads may let go of a Python object's memory while the interpreter ends,
    which aborts the process after its work is done.

    Raises:
        StorageError: where the file is missing or refused.
    """
    data = store.read(name)
    owned = pa.allocate_buffer(len(data))
    np.frombuffer(owned, np.uint8)[:] = np.frombuffer(data, np.uint8)
    return pq.read_table(pa.BufferReader(owned), columns=columns)


def footer_of(schema: pa.Schema, name: str) -> dict[str, Any]:
    """What `to_parquet` put beside the rows.

    Raises:
        RunError: for a file of a newer schema, or one that infscan did not write.
    """
    raw = (schema.metadata or {}).get(_FOOTER)
    if raw is None:
        raise RunError(f"{name} was not written by infscan (its footer says nothing); take it out of the run folder.")
    footer: dict[str, Any] = json.loads(raw)
    if footer["schema_version"] > SCHEMA_VERSION:
        raise RunError(
            f"{name} has schema version {footer['schema_version']}, newer than this infscan's {SCHEMA_VERSION}; "
            "upgrade infscan."
        )
    return footer
