"""Made-up sequences, margins and a small published run."""

from __future__ import annotations

import numpy as np

from infscan.corpus.sequences import Sequence, Span
from infscan.influence.standings import Hits
from infscan.influence.topk import SIDES
from infscan.results.publish import SUCCESS, Publisher, Ranked, rank_rows
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


def hits(rows: list[tuple[str, str, int, float]]) -> Hits:
    """rows: (query id, side, sequence_id, scan score)."""
    return Hits(
        queries=np.asarray([QUERIES.index(query) for query, *_ in rows], np.int32),
        sides=np.asarray([SIDES.index(side) for _, side, *_ in rows], np.int8),
        sequence_ids=np.asarray([sequence_id for *_, sequence_id, _ in rows], np.int64),
        scores=np.asarray([score for *_, score in rows], np.float32),
    )


def put_shard(store: Store, name: str, ids: list[int], rows: list[tuple[str, str, int, float]]) -> None:
    losses = np.asarray([index / 8 for index in ids], np.float32)
    write_shard(store, name, [sequence(index) for index in ids], losses, hits(rows), QUERIES, COUNTS, "print")


def margins(seed: int, score: float, length: int = 5) -> Margins:
    """Random margins over layers and tokens, both adding up to `score`."""
    rng = np.random.default_rng(seed)

    def split(parts: int) -> np.ndarray:
        values = rng.normal(size=parts)
        return (values + (score - values.sum()) / parts).astype(np.float32)

    return Margins(split(len(LAYERS)), split(length))


def ranked(query_id: str, side: str, scores: dict[int, float], top_k: int = 10) -> list[Ranked]:
    """Rows ranked by refined score; scan scores are a tenth less."""
    ids = np.asarray(list(scores), np.int64)
    scan_scores = np.asarray([0.9 * score for score in scores.values()], np.float32)
    return rank_rows(query_id, side, ids, scan_scores, lambda index: margins(index, scores[index]), top_k)


def published(store: Store) -> list[list[Ranked]]:
    """Two shards and a finished publication of them; returns the rows."""
    proponents = {3: 2.0, 1: 5.0, 12: 3.0}
    opponents = {11: -4.0, 2: -1.0}
    for name, ids in {"shard-000000": [0, 1, 2, 3], "shard-000001": [10, 11, 12, 13]}.items():
        rows = [("alpha", "proponent", index, score) for index, score in proponents.items() if index in ids]
        rows += [("alpha", "opponent", index, score) for index, score in opponents.items() if index in ids]
        put_shard(store, name, ids, rows)
    groups = [
        ranked("alpha", "proponent", proponents) + ranked("alpha", "opponent", opponents),
        [],
        ranked("beta#1", "proponent", {1: 0.5}),
    ]
    publisher = Publisher(store, LAYERS, lambda ids: " ".join(map(str, ids)), "print")
    wanted = [("shard-000000", np.asarray([1, 2, 3])), ("shard-000001", np.asarray([11, 12]))]
    publisher.write_rows(groups, publisher.write_sequences(wanted))
    publisher.remove_stale()
    store.write_json("summary.json", {"counts": {}})
    store.write(SUCCESS, b"")
    return groups
