"""Read a finished run: Arrow tables from a folder or a URI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from infscan.errors import RunError
from infscan.results.dense import FOLDER as SCORES
from infscan.results.publish import SUCCESS
from infscan.results.schema import read_parquet
from infscan.results.shard_file import quarantined_shards
from infscan.storage import Store


def read_top(uri: str, *, unfinished: bool = False) -> pa.Table:
    """The published rows, by query, side and rank: see `infscan.results.schema.TOP`.

    unfinished: read a run without _SUCCESS too, at your own risk.

    Raises:
        RunError: where the run is not finished, or the folder is no run.
    """
    return _read(uri, "top", unfinished)


def read_sequences(uri: str, *, unfinished: bool = False) -> pa.Table:
    """The published sequences with their tokens, text and provenance, each once."""
    return _read(uri, "sequences", unfinished)


def read_queries(uri: str, *, unfinished: bool = False) -> pa.Table:
    """The queries as they were measured: texts, tokens, and the log-probability that the model gives them."""
    return _read(uri, "queries", unfinished)


def read_layers(uri: str, *, unfinished: bool = False) -> pa.Table:
    """The layer margins of the published rows; they sum to the row's score."""
    return _read(uri, "layers", unfinished)


def read_tokens(uri: str, *, unfinished: bool = False) -> pa.Table:
    """The token margins of the published rows, by input position; they sum to the row's score."""
    return _read(uri, "tokens", unfinished)


def read_scores(uri: str, *, unfinished: bool = False) -> pa.Table:
    """Every sequence's scan scores, by sequence_id; only runs with scan.scores=all have them.

    Not of quarantined shards: an attempt that died between a shard's scores and its file leaves scores that count
    nowhere.
    """
    return _read(uri, SCORES, unfinished, without=quarantined_shards(Store(uri))).sort_by("sequence_id")


def read_parts(uri: str) -> Iterator[tuple[pa.Table, pa.Table, pa.Table]]:
    """Part by part, top, layers and tokens of the same queries, whole queries in order of query_id.

    One part (64 queries) is in memory at a time.

    Raises:
        RunError: as `read_top`.
    """
    store = _finished(uri, unfinished=False)
    for entry in store.list("top", suffix=".parquet"):
        part = entry.name.rpartition("/")[2]
        top, layers, tokens = (read_parquet(store, f"{folder}/{part}") for folder in ("top", "layers", "tokens"))
        yield top, layers, tokens


def read_summary(uri: str, *, unfinished: bool = False) -> dict[str, Any]:
    """Counts, warnings and phases of a run."""
    return _finished(uri, unfinished).read_json("summary.json")


def read_cells(uri: str) -> dict[str, bool]:
    """The run folders in a sweep's folder, by name, and whether each is finished; none where it is something else."""
    names = set(Store(uri).names())
    configured = (name for name in names if name.count("/") == 1 and name.endswith("/config.yaml"))
    return {cell: f"{cell}/{SUCCESS}" in names for cell in sorted(name.split("/")[0] for name in configured)}


def _finished(uri: str, unfinished: bool) -> Store:
    store = Store(uri)
    if not unfinished and not store.exists(SUCCESS):
        raise RunError(
            f"{uri} has no {SUCCESS}: the run is not finished, or this is no run folder; run the same command again to "
            "finish it, or read it with unfinished=True."
        )
    return store


def _read(uri: str, folder: str, unfinished: bool, without: frozenset[str] = frozenset()) -> pa.Table:
    """A folder's parts as one table, `without` those of these shards."""
    store = _finished(uri, unfinished)
    parts = []
    for entry in store.list(folder, suffix=".parquet"):
        if entry.name.rpartition("/")[2].removesuffix(".parquet") in without:
            continue
        parts.append(read_parquet(store, entry.name).replace_schema_metadata(None))
    if not parts:
        raise RunError(f"{uri}/{folder} holds no Parquet; scores/ is there only with scan.scores=all.")
    return pa.concat_tables(parts)
