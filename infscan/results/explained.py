"""The tables of an explanation: what `infscan explain` writes beside a run. Rows join on query_id and item."""

from __future__ import annotations

import pyarrow as pa

from infscan.results.schema import to_parquet
from infscan.storage import Store

# What is explained: a sequence of the run's corpus (item is its number) or a text that was given (item is its id).
_PAIR = [("query_id", pa.string()), ("item", pa.string())]

SCHEMAS = {
    # side, rank, published: of the run's own row for this pair; null where it published none.
    "rows": pa.schema(
        [
            *_PAIR,
            ("sequence_id", pa.int64()),
            ("side", pa.string()),
            ("rank", pa.int32()),
            ("score", pa.float64()),
            ("published", pa.float32()),
            ("spurious", pa.bool_()),
            ("document_id", pa.string()),
            ("source", pa.string()),
            ("text", pa.string()),
        ]
    ),
    # Layer margins: they add up to the score.
    "layers": pa.schema([*_PAIR, ("layer", pa.string()), ("score", pa.float64())]),
    # A row per token. score: its margin as an input position; output, input: the influence of the token itself
    # (infscan.steps.explain), null where not computed. score and output each add up to the score.
    "tokens": pa.schema(
        [
            *_PAIR,
            ("position", pa.int32()),
            ("token_id", pa.int32()),
            ("token", pa.string()),
            ("score", pa.float64()),
            ("output", pa.float64()),
            ("input", pa.float64()),
        ]
    ),
    # On request: layer by input position.
    "matrix": pa.schema([*_PAIR, ("layer", pa.string()), ("scores", pa.list_(pa.float64()))]),
    # A row per measured token of the query: how much the sequence raised it. They add up to the score.
    # scores: on request, by the sequence's input position.
    "completion": pa.schema(
        [
            *_PAIR,
            ("index", pa.int32()),
            ("position", pa.int32()),
            ("token_id", pa.int32()),
            ("token", pa.string()),
            ("score", pa.float64()),
            ("scores", pa.list_(pa.float64())),
        ]
    ),
    # The sequences before (-1) and after (+1) that go on in the same document.
    "neighbours": pa.schema(
        [
            ("item", pa.string()),
            ("offset", pa.int32()),
            ("sequence_id", pa.int64()),
            ("document_id", pa.string()),
            ("text", pa.string()),
        ]
    ),
    # Published rows that are near-duplicates of another of their query and side; group: the strongest one's sequence.
    "similar": pa.schema(
        [
            ("query_id", pa.string()),
            ("side", pa.string()),
            ("group", pa.int64()),
            ("rank", pa.int32()),
            ("sequence_id", pa.int64()),
            ("document_id", pa.string()),
        ]
    ),
}


def write_explanation(store: Store, tables: dict[str, pa.Table], footer: dict[str, object]) -> None:
    """A file for each table, in one atomic put each; a table of an earlier explanation that is not made now goes."""
    for name in SCHEMAS:
        if name in tables:
            store.write(f"{name}.parquet", to_parquet(tables[name], footer))
        else:
            store.remove(f"{name}.parquet")
