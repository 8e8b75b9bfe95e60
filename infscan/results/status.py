"""The state of a run, read from its folder alone, from anywhere, also while it goes on: listings and a few small files.

Nothing is written, no driver is asked, and a run that is over reads as one that goes on. Rates are by the store's own
clock, at which shard files appeared.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from infscan.errors import DamagedError, RunError, StorageError
from infscan.influence.topk import SIDES, best_rows
from infscan.influence.topk_tracker import ScoredRows
from infscan.results import index_file
from infscan.results.manifest import SUCCESS, read_manifest
from infscan.results.read import parts_of, read_cells
from infscan.results.schema import read_parquet
from infscan.results.shard_file import FOLDER, QUARANTINE, SUFFIX, read_hits
from infscan.storage import Entry, MissingError, Store
from infscan.storage.foreign import parse_json
from infscan.storage.host import process_began, this_host
from infscan.storage.store import backend_of

DRIVER = "driver.json"
# What `infscan status` exits with where a run is unfinished and nothing works on it.
NOTHING_ALIVE = 3
# A sieve's own shards, and what is there once it has ended (`infscan.steps.candidates`).
_SIEVE, _LEFT = "sieve", "sieve/candidates.json"
# A rate is of the last so many shards.
_WINDOW = 64
# Rows are provisional: of this many shard files at most, the latest ones.
_FILES_READ = 64


@dataclass(frozen=True)
class Row:
    """A row of a query and side; score is refined once the run is published, a scan's before."""

    query_id: str
    side: str
    rank: int
    sequence_id: int
    score: float


@dataclass(frozen=True)
class Driver:
    """Who drives a run, as its driver.json says and as this machine sees it; pid: None where nobody does.

    alive: its process runs on this machine; or it is another machine's, and renewed driver.json within `lease_s`.
    killed: it ran on this machine, and ended without giving driver.json back. heartbeat_age_s: since driver.json was
    last renewed, by the store's clock and this machine's; None where the store tells no times. state: what the driver
    says that it waits for.
    """

    alive: bool = False
    killed: bool = False
    heartbeat_age_s: float | None = None
    pid: int | None = None
    host: str | None = None
    since: str | None = None
    lease_s: float | None = None
    state: str | None = None


@dataclass(frozen=True)
class Status:
    """A run or an index, as read from its folder.

    phase: `new`, `prepare`, `fit`, `index`, `queries`, `sieve`, `scan`, `refine` or `finished`. made: files by kind
    that show how far a phase without shards is. shards, sequences: of its plan; None before there is one.
    sequences_per_s, eta_s: by the last shards; None where fewer than two are there. last: seconds since 1970, of the
    last shard's file. read: shard files that `top` is of; None where it is of the published tables.
    """

    uri: str
    phase: str
    made: Mapping[str, int] = field(default_factory=dict)
    shards: int | None = None
    sequences: int | None = None
    done: int = 0
    quarantined: Mapping[str, str] = field(default_factory=dict)
    sequences_per_s: float | None = None
    eta_s: float | None = None
    last: float | None = None
    driver: Driver = Driver()
    warnings: tuple[str, ...] = ()
    top: tuple[Row, ...] = ()
    read: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_status(uri: str, *, rows: int = 3) -> Status:
    """The state of the run at `uri`, with the `rows` strongest rows of every query and side so far.

    Raises:
        RunError: where the folder is no run's.
        StorageError: where it cannot be read.
    """
    store = Store(uri)
    there = {entry.name for entry in store.list("queries")}
    plan = _object(store, "plan.json")
    driver = _driver(store)
    if (plan is None or "fields" in plan) and driver.pid is None and not store.exists("config.yaml"):
        holds = "factors'" if plan else "no"
        raise RunError(
            f"{store.uri} is no run's folder: it has {holds} plan.json and no config.yaml; give a run's output."
        )
    files, kind = _shards(store, asks=bool(there))
    published = store.exists(SUCCESS)
    finished = published or (kind == "index" and store.exists(index_file.MANIFEST))
    summary = _object(store, "summary.json") if published else None
    warnings = (summary or {}).get("warnings", [])
    shards, sequences, per_shard = _planned(store, plan or {})
    names = {entry.name.rpartition("/")[2].removesuffix(SUFFIX) for entry in files}
    made = _made(store)
    rate, eta = _pace(files, shards, per_shard)
    phase = _phase(plan, files, shards, there, made) if kind == "scan" else kind
    known = Status(
        uri=store.uri,
        phase="finished" if finished else phase,
        made=made,
        shards=shards,
        sequences=sequences,
        done=len(files),
        quarantined=_quarantined(store, names),
        sequences_per_s=rate,
        eta_s=None if finished else eta,
        last=max((entry.modified for entry in files if entry.modified), default=None),
        driver=driver,
        warnings=tuple(map(str, warnings if isinstance(warnings, list) else ())),
    )
    if not rows:
        return known
    # A sieve's scores are of some layers, and others' are what is published; codes have none.
    ranked = files if kind == "scan" else []
    top, read = (_published(store, rows), None) if published else _provisional(store, ranked, rows)
    return Status(**(vars(known) | {"top": tuple(top), "read": read}))


def read_sweep(uri: str) -> dict[str, Status]:
    """The state of every cell of a sweep's folder, by its name, without rows; none where it is no sweep's.

    Raises:
        StorageError: where it cannot be read.
    """
    uri = Store(uri).uri
    if Store(uri).exists("config.yaml"):
        return {}
    return {cell: read_status(f"{uri}/{cell}", rows=0) for cell in read_cells(uri)}


def exit_code(*found: Status) -> int:
    """What the command exits with for a run, or a sweep's cells: 3 where some are unfinished and no driver lives."""
    finished = all(status.phase == "finished" for status in found)
    return 0 if finished or any(status.driver.alive for status in found) else NOTHING_ALIVE


def _json(store: Store, name: str) -> Any:
    try:
        return store.read_json(name)
    except MissingError:
        return None


def _shards(store: Store, *, asks: bool) -> tuple[list[Entry], str]:
    """The shard files of the pass that goes on, and its name: `sieve`, `index` or, where the run has queries (`asks`),
    `scan`."""
    if not store.exists(_LEFT) and (sieved := store.list(f"{_SIEVE}/{FOLDER}", suffix=SUFFIX)):
        return sieved, "sieve"
    if not asks and (codes := store.list(index_file.FOLDER, suffix=index_file.SUFFIX)):
        return codes, "index"
    return store.list(FOLDER, suffix=SUFFIX), "scan"


def _planned(store: Store, plan: Mapping[str, Any]) -> tuple[int | None, int | None, float | None]:
    """Its shards, its sequences, and sequences by shard: of the run's plan, or of what a sieve left with the audit."""
    left = _object(store, _LEFT)
    if left is not None:
        shards, sequences = _number(left.get("shards")), _number(left.get("sequences"))
        return shards, sequences, None if sequences is None else sequences / max(1, shards or 1)
    selection = plan.get("selection")
    size = selection.get("size") if isinstance(selection, dict) else None
    return _number(plan.get("shards")), _number(size), _number(plan.get("shard_sequences"))


def _object(store: Store, name: str) -> dict[str, Any] | None:
    """Raises StorageError where it is something else than an object."""
    value = _json(store, name)
    if value is not None and not isinstance(value, dict):
        raise StorageError(f"{store.uri}/{name} holds no JSON object; restore or remove it")
    return value


def _number(value: Any) -> int | None:
    """A count of a run's file, which a stranger may have written."""
    return value if type(value) is int and value >= 0 else None


def _driver(store: Store) -> Driver:
    """Nobody where there is no driver.json, or one that no driver of this version wrote."""
    told = _json(store, DRIVER)
    renewed = backend_of(store.uri).stat(f"{store.uri}/{DRIVER}")
    if told is None or renewed is None:
        return Driver()
    age = None if renewed.modified is None else max(0.0, time.time() - renewed.modified)
    try:
        here = told["host"] == asdict(this_host())
        runs = here and process_began(told["pid"]) == told["began"]
        return Driver(
            alive=runs if here else age is None or age <= told["lease_s"],
            killed=here and not runs,
            heartbeat_age_s=age,
            pid=told["pid"],
            host=told["host"]["name"],
            since=told["since"],
            lease_s=told["lease_s"],
            state=told.get("state") or None,
        )
    except (KeyError, TypeError):
        return Driver()


def _made(store: Store) -> dict[str, int]:
    """How many files of a kind are there: what a phase leaves behind as it goes on."""
    kinds = {
        "corpus parts": ("corpus", "part-", ".parquet"),
        "covariance sums": ("factors/covariance", "", ".safetensors"),
        "Lambda sums": ("factors/lambda", "", ".safetensors"),
        "query batches": ("queries", "", ".safetensors"),
        "refined units": ("refined", "", ".parquet"),
    }
    found = {
        kind: sum(entry.name.rpartition("/")[2].startswith(prefix) for entry in store.list(folder, suffix=suffix))
        for kind, (folder, prefix, suffix) in kinds.items()
    }
    return {kind: count for kind, count in found.items() if count}


def _phase(plan: Any, files: list[Entry], shards: int | None, queries: set[str], made: Mapping[str, int]) -> str:
    if shards is not None and len(files) >= shards:
        return "refine"
    if files:
        return "scan"
    if plan is None:
        return "prepare" if "corpus parts" in made else "new"
    return "queries" if queries else "fit"


def _pace(files: list[Entry], shards: int | None, shard_sequences: float | None) -> tuple[float | None, float | None]:
    """Sequences per second and seconds left, by the moments at which the last shards' files appeared."""
    moments = sorted(entry.modified for entry in files if entry.modified is not None)[-_WINDOW:]
    if len(moments) < 2 or moments[-1] <= moments[0] or shards is None or shard_sequences is None:
        return None, None
    per_s = (len(moments) - 1) / (moments[-1] - moments[0])
    return per_s * shard_sequences, max(0, shards - len(files)) / per_s


def _quarantined(store: Store, finished: set[str]) -> dict[str, str]:
    """Shards given up, with the reason; a shard's file outranks its note."""
    found: dict[str, str] = {}
    for entry in store.list(QUARANTINE, suffix=".json"):
        name = entry.name.rpartition("/")[2].removesuffix(".json")
        note = _json(store, entry.name)
        if name not in finished and note is not None:
            found[name] = str(note.get("reason", ""))
    return found


def _published(store: Store, rows: int) -> list[Row]:
    found = []
    for name in parts_of(store, "top", read_manifest(store)):
        table = read_parquet(store, name, ["query_id", "side", "rank", "sequence_id", "score"])
        found += [Row(**row) for row in table.to_pylist() if row["rank"] <= rows]
    return found


def _provisional(store: Store, files: list[Entry], rows: int) -> tuple[list[Row], int]:
    """The strongest rows of the latest shard files; one that vanishes or is damaged meanwhile is left out."""
    latest = sorted(files, key=lambda entry: (entry.modified or 0.0, entry.name))[-_FILES_READ:]
    query_ids = _query_ids(store)
    parts: list[ScoredRows] = []
    for entry in latest:
        try:
            parts.append(read_hits(store, entry.name.rpartition("/")[2].removesuffix(SUFFIX), query_ids)[0])
        except (MissingError, DamagedError):
            continue
    hits = ScoredRows.concatenate(parts)
    found: list[Row] = []
    for query, query_id in enumerate(query_ids):
        for side, name in enumerate(SIDES):
            mine = (hits.queries == query) & (hits.sides == side)
            ids, scores = hits.sequence_ids[mine], hits.scores[mine]
            chosen = best_rows(scores, ids, name, rows)
            found += [
                Row(query_id, name, rank, int(ids[row]), float(scores[row]))
                for rank, row in enumerate(np.asarray(chosen).tolist(), start=1)
            ]
    return found, len(parts)


def _query_ids(store: Store) -> list[str]:
    """In the order of the query batch: by id."""
    try:
        lines = store.read("queries/queries.jsonl").splitlines()
    except MissingError:
        return []
    try:
        return [parse_json(line)["id"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{store.uri}/queries/queries.jsonl is damaged ({error!r}); run the scan again.") from None
