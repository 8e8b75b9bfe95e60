"""Hold a finished run to its manifest: every file read whole, and what is beside them looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from infscan.errors import DamagedError, RunError, StorageError
from infscan.results.dense import FOLDER as SCORES
from infscan.results.manifest import SUCCESS, TABLES, Manifest, Part, is_table_part, read_manifest
from infscan.results.read import finished, read_scan_part
from infscan.results.schema import read_parquet
from infscan.results.shard_file import FOLDER as SHARDS
from infscan.storage import Store
from infscan.storage.prefetch import prefetch

_SHOWN = 3


def verify(uri: str) -> tuple[int, bool]:
    """How many files were read, and whether there is a manifest; without one, files are held to their own checksums.

    Parts of the publication, of scores/ and shards that are there; of a run whose shards/ were removed the tables.

    Raises:
        RunError: where the run is not finished.
        DamagedError: naming the first files that are missing, damaged, or of another publication or scan.
    """
    store = finished(uri, unfinished=False)
    manifest = read_manifest(store)
    checks = list(_published(store, manifest)) + list(_footers(store, manifest))
    troubles = [*_strangers(store, manifest), *(found for found in prefetch(store, _trouble, checks) if found)]
    if troubles:
        more = f" (and {len(troubles) - _SHOWN} more)" if len(troubles) > _SHOWN else ""
        raise DamagedError(f"{' '.join(troubles[:_SHOWN])}{more}")
    return len(checks), manifest is not None


Verification = Callable[[], object]


def _trouble(check: Verification) -> str | None:
    try:
        check()
    except (StorageError, RunError) as error:
        return str(error)
    return None


def _published(store: Store, manifest: Manifest | None) -> Iterator[Verification]:
    """Of the tables, and what was committed with them."""
    if manifest is None:
        for name in (name for folder in (*TABLES, "queries") for name in _parquet(store, folder)):
            yield partial(_check_table, store, name)
        return
    for name, part in manifest.parts.items():
        check = _check_table if name.endswith(".parquet") else _check_bytes
        yield partial(check, store, name, part)


def _footers(store: Store, manifest: Manifest | None) -> Iterator[Verification]:
    """Of shards and dense scores, which say in their footers what they are of."""
    scan = manifest.scan if manifest else None
    scores = list(manifest.scores or ()) if manifest else _parquet(store, SCORES)
    for name in (*scores, *_parquet(store, SHARDS)):
        yield partial(read_scan_part, store, name, scan)


def _check_table(store: Store, name: str, part: Part | None = None) -> None:
    """part: what the manifest says of it."""
    table = read_parquet(store, name, check=part.check if part else None)
    if part is not None and part.rows is not None and len(table) != part.rows:
        raise DamagedError(f"{store.uri}/{name} has {len(table)} rows, and {SUCCESS} says {part.rows}.")


def _check_bytes(store: Store, name: str, part: Part) -> None:
    part.check(f"{store.uri}/{name}", store.read(name))


def _parquet(store: Store, folder: str) -> list[str]:
    return [entry.name for entry in store.list(folder, suffix=".parquet")]


def _strangers(store: Store, manifest: Manifest | None) -> list[str]:
    """Parts of another publication beside those of this one, which other readers would take for its rows."""
    if manifest is None:
        return []
    there = (name for folder in TABLES for name in _parquet(store, folder))
    return [
        f"{store.uri}/{name} is not of this publication; remove it, or give the run's own command again."
        for name in there
        if is_table_part(name) and name not in manifest.parts
    ]
