"""Made-up sequences, margins and a small published run."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from infscan.corpus.sequences import Sequence, Span
from infscan.influence.topk import SIDES
from infscan.influence.topk_tracker import ScoredRows
from infscan.results.manifest import SUCCESS
from infscan.results.publish import Publisher, Ranking, rank_rows
from infscan.results.refined import Margins
from infscan.results.shard_file import ShardCounts, write_shard
from infscan.storage import Store

LAYERS = ["layers.0.mlp.up", "layers.0.mlp.down", "layers.1.mlp.up"]
QUERIES = ["alpha", "beta#0", "beta#1"]
COUNTS = ShardCounts(sequences=4, tokens=20, nonfinite=1, kept=3, rows=5)


def sequence(sequence_id: int, length: int = 5) -> Sequence:
    """Two documents, the second of another source."""
    return Sequence(
        sequence_id=sequence_id,
        token_ids=np.arange(sequence_id, sequence_id + length, dtype=np.int64),
        documents=(Span(f"doc-{sequence_id}", "web", 0, 2), Span(f"doc-{sequence_id}b", "books", 3, length)),
        byte_offset=1000 * sequence_id,
        path="corpus/part.jsonl",
    )


def hits(rows: list[tuple[str, str, int, float]]) -> ScoredRows:
    """rows: (query id, side, sequence_id, scan score)."""
    return ScoredRows(
        queries=np.asarray([QUERIES.index(query) for query, *_ in rows], np.int32),
        sides=np.asarray([SIDES.index(side) for _, side, *_ in rows], np.int8),
        sequence_ids=np.asarray([sequence_id for *_, sequence_id, _ in rows], np.int64),
        scores=np.asarray([score for *_, score in rows], np.float32),
    )


def put_shard(store: Store, name: str, ids: list[int], rows: list[tuple[str, str, int, float]]) -> None:
    losses = np.asarray([index / 8 for index in ids], np.float32)
    write_shard(store, name, [sequence(index) for index in ids], losses, hits(rows), QUERIES, COUNTS, "print")


def margins(seed: int, score: float, length: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Random margins over layers and tokens, both adding up to `score`."""
    rng = np.random.default_rng(seed)

    def split(parts: int) -> np.ndarray:
        values = rng.normal(size=parts)
        return (values + (score - values.sum()) / parts).astype(np.float32)

    return split(len(LAYERS)), split(length)


Candidates = list[tuple[str, str, int, float]]


def ranked(rows: Candidates, top_k: int = 10) -> Ranking:
    """rows: (query id, side, sequence_id, refined score), by query and side; scan scores are a tenth less."""
    candidates = hits([(*row, 0.9 * score) for *row, score in rows])
    return rank_rows(candidates, np.asarray([score for *_, score in rows], np.float32), top_k)


def margins_of(rows: Candidates) -> Callable[[np.ndarray], Margins]:
    """Made-up margins of the rows at these places."""

    def of(places: np.ndarray) -> Margins:
        split = [margins(rows[place][2], rows[place][3]) for place in places.tolist()]
        by_layer = np.asarray([layers for layers, _ in split], np.float32).reshape(-1, len(LAYERS))
        return Margins(by_layer, [tokens for _, tokens in split])

    return of


ROWS: Candidates = [
    *(("alpha", "proponent", index, score) for index, score in {3: 2.0, 1: 5.0, 12: 3.0}.items()),
    *(("alpha", "opponent", index, score) for index, score in {11: -4.0, 2: -1.0}.items()),
    ("beta#1", "proponent", 1, 0.5),
]


def publisher(store: Store, decode: Callable[[list[int]], str] | None = None) -> Publisher:
    return Publisher(store, LAYERS, QUERIES, decode, "print")


def published(store: Store) -> None:
    """Two shards and a finished publication of them."""
    for name, ids in {"shard-000000": [0, 1, 2, 3], "shard-000001": [10, 11, 12, 13]}.items():
        put_shard(store, name, ids, [row for row in ROWS if row[0] == "alpha" and row[2] in ids])
    made = publisher(store, lambda ids: " ".join(map(str, ids)))
    wanted = [("shard-000000", np.asarray([1, 2, 3])), ("shard-000001", np.asarray([11, 12]))]
    documents = made.documents(wanted)
    made.write_rows(ranked(ROWS), margins_of(ROWS), documents, 5)
    made.write_sequences(wanted, documents)
    made.remove_stale()
    store.write_json("summary.json", {"counts": {}})
    store.write(SUCCESS, b"")
