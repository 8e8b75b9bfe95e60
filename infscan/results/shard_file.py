"""A finished shard: its candidates with their tokens, in one file whose presence says that the shard is done."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Sequences
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infscan.corpus.sequences import Sequence
from infscan.errors import RunError
from infscan.influence.spread import ShardSpread, Spread
from infscan.influence.topk import SIDES
from infscan.influence.topk_tracker import ScoredRows
from infscan.results.schema import CANDIDATES, OF, damaged, other_scan, read_with_footer, to_parquet
from infscan.storage import Store

FOLDER = "shards"
QUARANTINE = "quarantine"
# Sources that are counted apart; of more, none is.
MOST_SOURCES = 1000
# Of a kept sequence, what the model is given.
GIVEN = ("sequence_id", "token_ids", "loss_mask", "document_starts")
SUFFIX = ".parquet"
# What the ids of background queries begin with, whose hits nobody else counts (`infscan.steps.background`).
BACKGROUND = "background#"


@dataclass(frozen=True)
class ShardCounts:
    """What a shard saw: they add up to the plan's sequences in summary.json.

    halvings: how often its micro-batches were halved because memory ran out. spread: of its scores; None in files of
    infscan 0.2 and before.
    """

    sequences: int
    tokens: int
    nonfinite: int
    kept: int
    rows: int
    halvings: int = 0
    spread: ShardSpread | None = field(default=None, compare=False)
    # Of every source, sequences that hold some of it, and its tokens in them.
    sources: Mapping[str, tuple[int, int]] = field(default_factory=dict, compare=False)


@dataclass
class ScanCounts:
    """Sums of the finished shards' counts; halved: shards whose micro-batches were. spread: of all their scores."""

    shards: int = 0
    sequences: int = 0
    tokens: int = 0
    nonfinite: int = 0
    kept: int = 0
    rows: int = 0
    halved: int = 0
    spread: Spread | None = None
    # As of ShardCounts; None where there are more than MOST_SOURCES.
    sources: dict[str, tuple[int, int]] | None = field(default_factory=dict)

    def add(self, shard: ShardCounts) -> None:
        """Take in one more shard: each counts once."""
        self.shards += 1
        self.sequences += shard.sequences
        self.tokens += shard.tokens
        self.nonfinite += shard.nonfinite
        self.kept += shard.kept
        self.rows += shard.rows
        self.halved += shard.halvings > 0
        if self.spread is not None and shard.spread is not None:
            self.spread.add(shard.spread)
        if self.sources is not None:
            for source, (sequences, tokens) in shard.sources.items():
                before = self.sources.get(source, (0, 0))
                self.sources[source] = before[0] + sequences, before[1] + tokens
            if len(self.sources) > MOST_SOURCES:
                self.sources = None


def count_sources(sequences: Sequences[Sequence]) -> dict[str, tuple[int, int]]:
    """Of every source, how many of the sequences hold some of it, and how many of their tokens are its."""
    found: dict[str, tuple[int, int]] = {}
    for sequence in sequences:
        tokens: dict[str, int] = {}
        for span in sequence.documents:
            tokens[span.source] = tokens.get(span.source, 0) + span.end - span.start
        for source, count in tokens.items():
            before = found.get(source, (0, 0))
            found[source] = before[0] + 1, before[1] + count
    return found


def shard_path(name: str) -> str:
    return f"{FOLDER}/{name}{SUFFIX}"


def write_shard(
    store: Store,
    name: str,
    sequences: Sequences[Sequence],
    losses: NDArray[np.float32],
    hits: ScoredRows,
    query_ids: Sequences[str],
    counts: ShardCounts,
    fingerprint: str,
    *,
    tokens: bool = True,
) -> bool:
    """Write the kept sequences once each, with all their hits, in one atomic put; False where the file was there.

    sequences: all of the shard's, in the plan's order, with losses [n] in nats; only those with a hit are written.
    Without `tokens`, of a sequence there are its number, its loss and its hits.
    """
    kept, lists = _by_sequence(np.array([sequence.sequence_id for sequence in sequences], np.int64), hits, query_ids)
    rows = [
        {
            "sequence_id": sequences[place].sequence_id,
            "loss": float(losses[place]),
            **(_content(sequences[place]) if tokens else {}),
        }
        for place in kept
    ]
    table = pa.Table.from_pylist(rows, schema=CANDIDATES.remove(CANDIDATES.get_field_index("hits")))
    table = table.append_column(CANDIDATES.field("hits"), lists)
    path = shard_path(name)
    told = {name: value for name, value in vars(counts).items() if name not in ("spread", "sources")}
    facts: dict[str, Any] = {"counts": told, "sources": counts.sources, "fingerprint": fingerprint, OF: path}
    if counts.spread is not None:
        facts["spread"] = counts.spread.to_text()
    return store.create(path, to_parquet(table, facts))


def _by_sequence(
    sequence_ids: NDArray[np.int64], hits: ScoredRows, query_ids: Sequences[str]
) -> tuple[list[int], pa.Array]:
    """The places among `sequence_ids` that have hits, ascending, and the hits of each as CANDIDATES has them.

    Hits are sorted, so that the file's bytes depend on them and not on their order. A first shard may have a million:
    they are never objects of Python.
    """
    by_id = np.argsort(sequence_ids)
    places = by_id[np.searchsorted(sequence_ids, hits.sequence_ids, sorter=by_id)]
    order = np.lexsort((hits.sides, hits.queries, places))
    kept, counts = np.unique(places, return_counts=True)
    columns = [
        pa.array(query_ids, pa.string()).take(pa.array(hits.queries[order])),
        pa.array(SIDES, pa.string()).take(pa.array(hits.sides[order])),
        pa.array(hits.scores[order], pa.float32()),
    ]
    of_all = pa.StructArray.from_arrays(columns, fields=list(CANDIDATES.field("hits").type.value_type))
    starts = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    return kept.tolist(), pa.ListArray.from_arrays(starts, of_all)


def _content(sequence: Sequence) -> dict[str, Any]:
    return {
        "token_ids": sequence.token_ids.tolist(),
        "documents": [asdict(span) for span in sequence.documents],
        "path": sequence.path,
        "byte_offset": sequence.byte_offset,
        "loss_mask": None if sequence.loss is None else sequence.loss.tolist(),
        "document_starts": None if sequence.starts is None else sequence.starts.tolist(),
    }


def finished_shards(store: Store) -> set[str]:
    """Names of the shards whose file is there, from a fresh listing."""
    return {name.rpartition("/")[2].removesuffix(SUFFIX) for name in store.names(FOLDER) if name.endswith(SUFFIX)}


def quarantined_shards(store: Store) -> frozenset[str]:
    """Names of the shards that were given up: they have a note, and no file, which would outrank it."""
    notes = {entry.name.rpartition("/")[2].removesuffix(".json") for entry in store.list(QUARANTINE, suffix=".json")}
    return frozenset(notes - finished_shards(store)) if notes else frozenset()


def read_hits(
    store: Store, name: str, query_ids: Sequences[str], fingerprint: str | None = None, *, whole: bool = False
) -> tuple[ScoredRows, ShardCounts]:
    """A finished shard's hits and counts, without its tokens.

    fingerprint: of the scan that it must be of; None where any will do. whole: hold every column to its digest, those
    included that are not used here. Hits of background queries are left out where `query_ids` has none of them.

    Raises:
        RunError: where it is of another scan, or a hit belongs to a query that is not among `query_ids`.
        DamagedError: where it does not hold what was written.
    """
    path = shard_path(name)
    table, footer = read_with_footer(store, path, None if whole else ["sequence_id", "hits"])
    if fingerprint is not None and footer["fingerprint"] != fingerprint:
        raise other_scan(store, path)
    spread = ShardSpread.from_text(footer["spread"]) if "spread" in footer else None
    sources = {source: (one, two) for source, (one, two) in footer.get("sources", {}).items()}
    counts = ShardCounts(**footer["counts"], spread=spread, sources=sources)
    hits = pc.list_flatten(table["hits"])
    parents = pc.list_parent_indices(table["hits"])
    sequence_ids = pc.take(table["sequence_id"], parents)
    if BACKGROUND not in "".join(query_ids):
        asked = pc.invert(pc.starts_with(_field(hits, "query_id"), BACKGROUND))
        hits, sequence_ids = hits.filter(asked), sequence_ids.filter(asked)
    queries = pc.index_in(_field(hits, "query_id"), value_set=pa.array(list(query_ids), pa.string()))
    if queries.null_count:
        raise RunError(
            f"{store.uri}/{path} holds hits of other queries than this run's; remove the file and scan again."
        )
    sides = pc.index_in(_field(hits, "side"), value_set=pa.array(list(SIDES)))
    return (
        ScoredRows(
            queries=queries.to_numpy().astype(np.int32),
            sides=sides.to_numpy().astype(np.int8),
            sequence_ids=sequence_ids.to_numpy().astype(np.int64),
            scores=_field(hits, "scan_score").to_numpy().astype(np.float32),
        ),
        counts,
    )


def _field(hits: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    return pc.struct_field(hits, name)


def read_candidates(
    store: Store,
    name: str,
    sequence_ids: NDArray[np.int64],
    *,
    columns: Sequences[str] | None = None,
    fingerprint: str | None = None,
) -> pa.Table:
    """Rows of a shard file by sequence_id; some of its columns, or all but the hits.

    fingerprint: of the scan that it must be of, with all of these rows; None where any will do.

    Raises:
        RunError: where it is of another scan.
        DamagedError: where it does not hold what was written, or a row is missing.
    """
    everything = [column for column in CANDIDATES.names if column != "hits"]
    path = shard_path(name)
    table, footer = read_with_footer(store, path, list(columns) if columns else everything)
    if fingerprint is not None and footer["fingerprint"] != fingerprint:
        raise other_scan(store, path)
    found = table.filter(pc.is_in(table["sequence_id"], value_set=pa.array(sequence_ids)))
    if fingerprint is not None and len(found) != len(sequence_ids):
        raise damaged(f"{store.uri}/{path}", f"{len(sequence_ids) - len(found)} candidates are missing from it")
    return found.replace_schema_metadata(None)
