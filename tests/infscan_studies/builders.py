"""Finished runs as studies read them: a folder with the tables that they look at, and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from infscan.queries import MEASURED, Query, measured_jsonl
from infscan.results.manifest import SUCCESS
from infscan.results.schema import LAYERS, SEQUENCES, TOP, to_parquet
from infscan.storage import Store


def top_rows(query: str, side: str, numbers: Sequence[int], scores: Sequence[float] = ()) -> list[dict[str, Any]]:
    """Rows of top, the strongest first."""
    sign = 1 if side == "proponent" else -1
    known = scores or [sign * (len(numbers) - place) for place in range(len(numbers))]
    return [
        {"query_id": query, "side": side, "rank": rank, "sequence_id": number, "score": score}
        for rank, (number, score) in enumerate(zip(numbers, known, strict=True), start=1)
    ]


def write_run(
    folder: Path,
    *,
    top: Sequence[Mapping[str, Any]] = (),
    layers: Sequence[Mapping[str, Any]] = (),
    texts: Mapping[int, str] | None = None,
    tokens: Mapping[int, Sequence[int]] | None = None,
    scores: Mapping[str, Sequence[float]] | None = None,
    queries: Sequence[Query] = (),
    inputs: Mapping[str, Any] | None = None,
) -> str:
    """A run folder, finished. Columns that are not given are null; a sequence's document is `d<number>`."""
    store = Store(str(folder))

    def write(name: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
        whole = [{column: row.get(column) for column in schema.names} for row in rows]
        store.write(f"{name}/part-00000.parquet", to_parquet(pa.Table.from_pylist(whole, schema), {}))

    write("top", [{"document_id": f"d{row['sequence_id']}", **row} for row in top], TOP)
    write("layers", layers, LAYERS)
    numbers = sorted({*(texts or {}), *(tokens or {}), *(row["sequence_id"] for row in top)})
    known = [
        {
            "sequence_id": number,
            "document_id": f"d{number}",
            "text": (texts or {}).get(number),
            "token_ids": list((tokens or {}).get(number, [])),
        }
        for number in numbers
    ]
    write("sequences", known, SEQUENCES)
    if scores:
        count = len(next(iter(scores.values())))
        columns = {f"score_{query}": pa.array(values, pa.float32()) for query, values in scores.items()}
        table = pa.table(
            {"sequence_id": range(count), "document_id": [f"d{number}" for number in range(count)], **columns}
        )
        store.write("scores/shard-000000.parquet", to_parquet(table, {}))
    store.write(MEASURED, measured_jsonl(queries))
    store.write_json("summary.json", {"inputs": dict(inputs or {})})
    store.write(SUCCESS, b"")
    return store.uri
