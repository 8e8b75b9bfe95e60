"""Read a finished run: Arrow tables from a folder or a URI."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from infscan.errors import DamagedError, RunError
from infscan.results.dense import FOLDER as SCORES
from infscan.results.dense import scores_path
from infscan.results.index_file import MANIFEST as INDEX
from infscan.results.manifest import SUCCESS, Manifest, read_manifest
from infscan.results.schema import Check, other_scan, read_parquet, read_with_footer
from infscan.results.shard_file import finished_shards, quarantined_shards
from infscan.storage import Store

SUMMARY = "summary.json"


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


def read_documents(uri: str, *, unfinished: bool = False) -> pa.Table:
    """The published rows split over the documents of their sequences; not in runs of infscan 0.2 and before."""
    return _read(uri, "documents", unfinished)


def read_answers(uri: str, *, unfinished: bool = False) -> pa.Table:
    """Of each query, whether its strongest row stands out of all scanned sequences; not in runs of 0.2 and before."""
    return _read(uri, "answers", unfinished)


def read_scores(uri: str, *, unfinished: bool = False) -> pa.Table:
    """Every sequence's scan scores, by sequence_id; only runs with scan.scores=all have them.

    Not of quarantined shards: an attempt that died between a shard's scores and its file leaves scores that count
    nowhere.
    """
    store = finished(uri, unfinished)
    manifest = None if unfinished else read_manifest(store)
    scan = manifest.scan if manifest else None
    parts = [read_scan_part(store, name, scan) for name in _score_parts(store, manifest)]
    return _together(store, SCORES, parts).sort_by("sequence_id")


def read_scan_part(store: Store, name: str, scan: str | None) -> pa.Table:
    """A part of scores/ or shards/. scan: the fingerprint that its footer must have; None where any will do.

    Raises:
        RunError: where it is of another scan.
    """
    table, footer = read_with_footer(store, name)
    if scan is not None and footer.get("fingerprint") != scan:
        raise other_scan(store, name)
    return table.replace_schema_metadata(None)


def _score_parts(store: Store, manifest: Manifest | None) -> list[str]:
    """The parts of scores/ that count.

    Raises:
        DamagedError: where one is missing.
    """
    there = {entry.name: entry.size for entry in store.list(SCORES, suffix=".parquet")}
    if manifest is not None:
        wanted = manifest.scores or {}
    else:
        given_up = quarantined_shards(store)
        finished = {scores_path(shard) for shard in finished_shards(store)} if there else set()
        lying = {name for name in there if name.rpartition("/")[2].removesuffix(".parquet") not in given_up}
        wanted = {name: there.get(name, 0) for name in finished | lying}
    for name, size in sorted(wanted.items()):
        if there.get(name) != size:
            gone = f"{there[name]} bytes where {size} were written" if name in there else "it is gone"
            raise DamagedError(
                f"{store.uri}/{name} is missing or damaged ({gone}); give the run's own command again, "
                "which makes it again."
            )
    return sorted(wanted)


def read_if_there(uri: str, folder: str) -> pa.Table | None:
    """A table of a finished run; None where it was written by an infscan that made no such table."""
    store = finished(uri, unfinished=False)
    return _read(uri, folder, unfinished=False) if parts_of(store, folder, read_manifest(store)) else None


def read_parts(uri: str) -> Iterator[tuple[pa.Table, pa.Table, pa.Table]]:
    """Part by part, top, layers and tokens of the same queries, whole queries in order of query_id.

    One part (64 queries) is in memory at a time.

    Raises:
        RunError: as `read_top`.
    """
    store = finished(uri, unfinished=False)
    manifest = read_manifest(store)
    names = [parts_of(store, folder, manifest) for folder in ("top", "layers", "tokens")]
    for parts in zip(*names, strict=True):
        top, layers, tokens = (read_parquet(store, part, check=_check(manifest, part)) for part in parts)
        yield top, layers, tokens


def read_summary(uri: str, *, unfinished: bool = False) -> dict[str, Any]:
    """Counts, warnings and phases of a run."""
    store = finished(uri, unfinished)
    manifest = None if unfinished else read_manifest(store)
    data = store.read(SUMMARY)
    if manifest is not None:
        manifest.parts[SUMMARY].check(f"{store.uri}/{SUMMARY}", data)
    found: dict[str, Any] = store.read_json(SUMMARY)
    return found


def read_cells(uri: str) -> dict[str, bool]:
    """The run folders in a sweep's folder, by name, and whether each is finished; none where it is something else."""
    names = set(Store(uri).names())
    configured = (name for name in names if name.count("/") == 1 and name.endswith("/config.yaml"))
    return {cell: f"{cell}/{SUCCESS}" in names for cell in sorted(name.split("/")[0] for name in configured)}


def finished(uri: str, unfinished: bool) -> Store:
    """A run's store.

    Raises:
        RunError: where it is not finished, and need be.
    """
    store = Store(uri)
    if not unfinished and not store.exists(SUCCESS):
        if store.exists(INDEX):
            raise RunError(f"{uri} is an index, no run: infscan ask index={uri} asks it, and its output is a run.")
        raise RunError(
            f"{uri} has no {SUCCESS}: the run is not finished, or this is no run folder; check the path, or give the "
            "run's own command again to finish it (from Python, unfinished=True reads what there is)."
        )
    return store


def parts_of(store: Store, folder: str, manifest: Manifest | None) -> list[str]:
    """The parts of a table in order: those of the manifest; without one, those that lie there."""
    return manifest.names(folder) if manifest else [entry.name for entry in store.list(folder, suffix=".parquet")]


def _check(manifest: Manifest | None, name: str) -> Check | None:
    return manifest.parts[name].check if manifest else None


def _read(uri: str, folder: str, unfinished: bool) -> pa.Table:
    """A table whose parts are in the manifest."""
    store = finished(uri, unfinished)
    manifest = None if unfinished else read_manifest(store)
    names = parts_of(store, folder, manifest)
    parts = [read_parquet(store, name, check=_check(manifest, name)).replace_schema_metadata(None) for name in names]
    return _together(store, folder, parts)


def _together(store: Store, folder: str, parts: Sequence[pa.Table]) -> pa.Table:
    if not parts:
        raise RunError(
            f"{store.uri}/{folder} holds no Parquet; scores/ is there only with scan.scores=all, and runs of infscan "
            "0.2 and before have neither documents/ nor answers/."
        )
    return pa.concat_tables(parts)
