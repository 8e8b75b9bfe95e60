"""docs/reading.md, compatibility: within a schema version, columns keep their names and types; more may come."""

from __future__ import annotations

import pyarrow as pa
import pytest

from infscan.results import schema

_DOCUMENTS = "list<element: struct<id: string, source: string, start: int32, end: int32>>"
# What version 1 was published with. Raise the version rather than edit a line; new columns need none.
VERSION_1 = {
    "TOP": {
        "query_id": "string", "side": "string", "rank": "int32", "sequence_id": "int64", "score": "float",
        "scan_score": "float", "spurious": "bool", "document_id": "string", "source": "string", "corpus": "string",
    },
    "SEQUENCES": {
        "sequence_id": "int64", "document_id": "string", "documents": _DOCUMENTS, "source": "string", "path": "string",
        "byte_offset": "int64", "loss": "float", "token_ids": "list<element: int32>", "text": "string",
        "loss_mask": "list<element: bool>", "corpus": "string",
    },
    "LAYERS": {"query_id": "string", "sequence_id": "int64", "layer": "string", "score": "float"},
    "TOKENS": {"query_id": "string", "sequence_id": "int64", "scores": "list<element: float>"},
    "RUN": {
        "model": "string", "corpus": "string", "queries": "string", "model_fingerprint": "string",
        "corpus_fingerprint": "string", "queries_fingerprint": "string", "parameters": "int64", "sequences": "int64",
        "tokens": "int64", "num_queries": "int32", "quarantined_shards": "int32",
        "settings": "list<element: struct<key: string, value: string>>",
    },
}  # fmt: skip


@pytest.mark.parametrize("table", VERSION_1)
def test_columns_keep_their_names_types_and_order(table: str) -> None:
    assert schema.SCHEMA_VERSION == 1
    now: pa.Schema = getattr(schema, table)
    promised = VERSION_1[table]
    assert [name for name in now.names if name in promised] == list(promised)
    assert {name: str(now.field(name).type).replace("item:", "element:") for name in promised} == promised
