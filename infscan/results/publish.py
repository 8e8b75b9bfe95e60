"""Publish a run: rank the refined candidates and write the tables that people read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infscan.influence.topk import best_rows
from infscan.results.refined import Margins
from infscan.results.schema import LAYERS, SEQUENCES, TOKENS, TOP, to_parquet
from infscan.results.shard_file import read_candidates
from infscan.storage import Store

SUCCESS = "_SUCCESS"
INDEX = "run.parquet"
_QUERIES_PER_PART = 64
_SHARDS_PER_PART = 256


@dataclass(frozen=True)
class Ranked:
    """A published row, before its provenance is looked up."""

    query_id: str
    side: str
    rank: int
    sequence_id: int
    score: float
    scan_score: float
    margins: Margins


def rank_rows(
    query_id: str,
    side: str,
    sequence_ids: NDArray[np.int64],
    scan_scores: NDArray[np.float32],
    margins: Callable[[int], Margins],
    top_k: int,
) -> list[Ranked]:
    """One query's and side's candidates by refined score.

    A row whose sign changed when it was refined is no longer on the side, one that is not finite on none.
    """
    refined = [margins(int(sequence_id)) for sequence_id in sequence_ids]
    scores = np.asarray([row.score for row in refined], np.float32)
    return [
        Ranked(query_id, side, rank, int(sequence_ids[row]), float(scores[row]), float(scan_scores[row]), refined[row])
        for rank, row in enumerate(best_rows(scores, sequence_ids, side, top_k), start=1)
    ]


def is_spurious(token_scores: NDArray[np.float32]) -> bool:
    """G23's mark of a row that hangs on a few tokens: |x|_2 / |x|_1 > 2/3 over its token scores."""
    wide = token_scores.astype(np.float64)
    l1 = float(np.abs(wide).sum())
    return l1 > 0 and float(np.linalg.norm(wide)) / l1 > 2 / 3


class Publisher:
    """Writes top, layers, tokens (by groups of queries) and sequences (by groups of shards), then removes stale parts.

    decode: token ids to text; None where the model has no tokenizer (text is then null). label: a sequence's corpus
    among several, by its number; None where there is one.
    """

    def __init__(
        self,
        store: Store,
        layers: Sequences[str],
        decode: Callable[[list[int]], str] | None,
        fingerprint: str,
        label: Callable[[int], str | None] = lambda number: None,
    ):
        self.store, self.layers, self.decode, self.label = store, layers, decode, label
        self.footer = {"fingerprint": fingerprint}
        self.written: set[str] = set()

    def write_sequences(self, wanted: Sequences[tuple[str, NDArray[np.int64]]]) -> dict[int, tuple[str, str]]:
        """The published sequences, each once, by sequence_id. Returns (document_id, source) by sequence_id.

        wanted: shard names in order, with the published sequence_ids that lie in each.
        """
        provenance: dict[int, tuple[str, str]] = {}
        # One part even where nothing is published: readers then find an empty table.
        for part, start in enumerate(range(0, max(1, len(wanted)), _SHARDS_PER_PART)):
            rows = []
            for name, sequence_ids in wanted[start : start + _SHARDS_PER_PART]:
                rows += [self._sequence(row) for row in read_candidates(self.store, name, sequence_ids).to_pylist()]
            rows.sort(key=lambda row: row["sequence_id"])
            provenance |= {row["sequence_id"]: (row["document_id"], row["source"]) for row in rows}
            self._write("sequences", part, pa.Table.from_pylist(rows, schema=SEQUENCES))
        return provenance

    def _sequence(self, row: dict[str, Any]) -> dict[str, Any]:
        first = row["documents"][0]
        text = self.decode(row["token_ids"]) if self.decode else None
        known = {"document_id": first["id"], "source": first["source"], "corpus": self.label(row["sequence_id"])}
        return row | known | {"text": text}

    def write_rows(self, by_query: Iterable[list[Ranked]], provenance: dict[int, tuple[str, str]]) -> int:
        """top, layers and tokens, sorted by query_id, side and rank. Returns the rows of top.

        by_query: one list per query (its rows of both sides), in the order of query_id.
        """
        written, part, batch = 0, 0, list[Ranked]()
        queries = 0
        for ranked in by_query:
            batch += sorted(ranked, key=lambda row: (row.side, row.rank))
            queries += 1
            if queries == _QUERIES_PER_PART:
                self._write_part(part, batch, provenance)
                written, part, batch, queries = written + len(batch), part + 1, [], 0
        if queries or part == 0:
            self._write_part(part, batch, provenance)
        return written + len(batch)

    def _write_part(self, part: int, rows: list[Ranked], provenance: dict[int, tuple[str, str]]) -> None:
        top = [
            {
                "query_id": row.query_id,
                "side": row.side,
                "rank": row.rank,
                "sequence_id": row.sequence_id,
                "score": row.score,
                "scan_score": row.scan_score,
                "spurious": is_spurious(row.margins.token_scores),
                "document_id": provenance[row.sequence_id][0],
                "source": provenance[row.sequence_id][1],
                "corpus": self.label(row.sequence_id),
            }
            for row in rows
        ]
        self._write("top", part, pa.Table.from_pylist(top, schema=TOP))
        pairs = {(row.query_id, row.sequence_id): row for row in rows}
        layers = [
            {"query_id": query_id, "sequence_id": sequence_id, "layer": layer, "score": float(score)}
            for (query_id, sequence_id), row in pairs.items()
            for layer, score in zip(self.layers, row.margins.layer_scores, strict=True)
        ]
        self._write("layers", part, pa.Table.from_pylist(layers, schema=LAYERS))
        tokens = [
            {"query_id": query_id, "sequence_id": sequence_id, "scores": row.margins.token_scores.tolist()}
            for (query_id, sequence_id), row in pairs.items()
        ]
        self._write("tokens", part, pa.Table.from_pylist(tokens, schema=TOKENS))

    def _write(self, folder: str, part: int, table: pa.Table) -> None:
        name = f"{folder}/part-{part:05d}.parquet"
        self.store.write(name, to_parquet(table, self.footer))
        self.written.add(name)

    def remove_stale(self) -> None:
        """Parts that an earlier, larger publication left behind."""
        for folder in ("top", "layers", "tokens", "sequences"):
            for entry in self.store.list(folder, suffix=".parquet"):
                if entry.name not in self.written:
                    self.store.remove(entry.name)
