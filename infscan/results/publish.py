"""Publish a run: rank the refined candidates and write the tables that people read.

What is in memory does not grow with the number of queries, but for some dozens of bytes a candidate, a published row
and a document of a published sequence: tokens, margins and texts are there of one part at a time (margins of
`_MARGINS_BYTES`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infscan.influence.spread import Spread
from infscan.influence.topk import PROPONENT, SIDES, best_rows
from infscan.influence.topk_tracker import ScoredRows
from infscan.results.answers import Alike, Best, Scale, answers_table, best_of, most_alike
from infscan.results.documents import SequenceDocuments
from infscan.results.manifest import TABLES, Part, is_table_part, table_part_name
from infscan.results.refined import Margins
from infscan.results.schema import LAYERS, ROW_DOCUMENTS, SEQUENCES, TOKENS, TOP, to_parquet
from infscan.results.shard_file import read_candidates
from infscan.results.statements import Asked, hubs, ranks_by_size
from infscan.storage import Store
from infscan.storage.prefetch import prefetch

INDEX = "run.parquet"
# A part of top, layers and tokens ends with the query that fills it, one of sequences with the row.
_QUERIES_PER_PART = 64
_ROWS_PER_PART = 1 << 14
_SHARDS_PER_PART = 256
_SEQUENCES_PER_PART = 1 << 13
# Several parts' margins are read at once, so that the units of one query group are not read for every part of it.
_MARGINS_BYTES = 256 << 20


@dataclass(frozen=True)
class Ranking:
    """The published rows, by query, side's name and rank, as columns of one length.

    rows: intp, their places among the candidates. ranks: int32, from 1. scores: float32, refined. candidates: all, with
    their scan scores.
    """

    candidates: ScoredRows
    rows: NDArray[np.intp]
    ranks: NDArray[np.int32]
    scores: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def queries(self) -> NDArray[np.int32]:
        return self.candidates.queries[self.rows]

    @property
    def sequence_ids(self) -> NDArray[np.int64]:
        return self.candidates.sequence_ids[self.rows]

    def stretch(self, start: int, stop: int) -> Ranking:
        return Ranking(self.candidates, self.rows[start:stop], self.ranks[start:stop], self.scores[start:stop])


def rank_rows(candidates: ScoredRows, scores: NDArray[np.float32], top_k: int) -> Ranking:
    """The top_k candidates of each query and side by refined score.

    A row whose sign changed when it was refined is no longer on the side, one that is not finite on none.
    candidates: by query, each side's together. scores: float32, refined, of the candidates.
    """
    keys = candidates.queries.astype(np.int64) * len(SIDES) + candidates.sides
    ends = [*np.flatnonzero(np.diff(keys, prepend=-1)).tolist(), len(keys)]
    by_name: list[tuple[int, str, NDArray[np.intp]]] = []
    for start, stop in pairwise(ends):
        query, side = divmod(int(keys[start]), len(SIDES))
        best = best_rows(scores[start:stop], candidates.sequence_ids[start:stop], SIDES[side], top_k)
        by_name.append((query, SIDES[side], start + best))
    by_name.sort(key=lambda found: found[:2])
    rows = np.concatenate([np.empty(0, np.intp), *(best for *_, best in by_name)])
    ranks = np.concatenate([np.empty(0, np.int32), *(np.arange(1, len(best) + 1) for *_, best in by_name)])
    return Ranking(candidates, rows, ranks.astype(np.int32), scores[rows])


def is_spurious(token_scores: NDArray[np.float32]) -> bool:
    """Whether a row hangs on a few tokens: |x|_2 / |x|_1 > 2/3 over its token scores (docs/method.md#margins)."""
    wide = token_scores.astype(np.float64)
    l1 = float(np.abs(wide).sum())
    return l1 > 0 and float(np.linalg.norm(wide)) / l1 > 2 / 3


class Publisher:
    """Writes top, layers, tokens and documents (by groups of queries) and sequences (by groups of shards), then removes
    stale parts.

    query_ids: of all queries, ascending. decode: token ids to text; None where the model has no tokenizer (text is then
    null). label: a sequence's corpus among several, by its number; None where there is one. scan: the fingerprint that
    shard files must have; None where any will do. fence: called before whatever is written or removed; it raises where
    this driver may not any more. spread: of all scan scores; None where it is not known. texts: each
    token's text; None as of decode. asked: of every query, what it asked; none where nobody knows.

    Attributes:
        parts: what was written, by name, for the manifest.
    """

    def __init__(
        self,
        store: Store,
        layers: Sequences[str],
        query_ids: Sequences[str],
        decode: Callable[[list[int]], str] | None,
        fingerprint: str,
        label: Callable[[int], str | None] = lambda number: None,
        scan: str | None = None,
        fence: Callable[[], None] = lambda: None,
        spread: Spread | None = None,
        texts: Callable[[list[int]], list[str]] | None = None,
        asked: Sequences[Asked] = (),
    ):
        self.store, self.layers, self.label = store, layers, label
        self.decode, self.texts, self.asked = decode, texts, asked
        self.scan, self.fence = scan, fence
        self.query_ids = pa.array(query_ids, pa.string())
        self.footer = {"fingerprint": fingerprint}
        self.scale = Scale(spread, len(query_ids))
        self.parts: dict[str, Part] = {}

    def documents(self, wanted: Iterable[tuple[str, NDArray[np.int64]]]) -> SequenceDocuments:
        """The documents of the published sequences.

        wanted: shard names in order, with the published sequence_ids that lie in each, ascending.
        """

        columns = ("sequence_id", "documents")

        def read(shard: tuple[str, NDArray[np.int64]]) -> pa.Table:
            return read_candidates(self.store, *shard, columns=columns, fingerprint=self.scan)

        return SequenceDocuments(prefetch(self.store, read, wanted))

    def statements(
        self, wanted: Iterable[tuple[str, NDArray[np.int64]]], ranking: Ranking
    ) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
        """Of every row of a ranking, whether its sequence states the query's completion, and at which token (-1)."""
        order = np.argsort(ranking.sequence_ids, kind="stable")
        ids, places = ranking.sequence_ids[order], np.full(len(ranking), -1, np.int32)

        def read(shard: tuple[str, NDArray[np.int64]]) -> pa.Table:
            return read_candidates(self.store, *shard, columns=("sequence_id", "token_ids"), fingerprint=self.scan)

        for table in prefetch(self.store, read, wanted if self.asked else ()):
            for sequence_id, tokens in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
                texts = self.texts(tokens) if self.texts else None
                for row in order[slice(*np.searchsorted(ids, [sequence_id, sequence_id + 1]))].tolist():
                    place = self.asked[ranking.queries[row]].place(tokens, texts)
                    places[row] = -1 if place is None else place
        return places >= 0, places

    def write_sequences(self, wanted: Iterable[tuple[str, NDArray[np.int64]]], documents: SequenceDocuments) -> None:
        """The published sequences, each once, by sequence_id, with their documents as `write_rows` weighed them."""
        for part, shards in enumerate(_sequence_parts(wanted)):
            found = prefetch(self.store, self._candidates, shards)
            self._write("sequences", part, self._sequences(list(found), documents))

    def _candidates(self, shard: tuple[str, NDArray[np.int64]]) -> pa.Table:
        return read_candidates(self.store, *shard, fingerprint=self.scan)

    def _sequences(self, kept: list[pa.Table], documents: SequenceDocuments) -> pa.Table:
        if not kept:
            return SEQUENCES.empty_table()
        rows = pa.concat_tables(kept).sort_by("sequence_id").combine_chunks()
        heaviest = pa.array(documents.heaviest(rows["sequence_id"].to_numpy()))
        ids = rows["token_ids"].to_pylist()
        texts = [self.decode(one) if self.decode else None for one in ids]
        tokens = [self.texts(one) if self.texts else None for one in ids]
        added = {
            "document_id": documents.ids.take(heaviest),
            "source": documents.sources.take(heaviest).cast(pa.string()),
            "text": pa.array(texts, pa.string()),
            "tokens": pa.array(tokens, pa.list_(pa.string())),
            "corpus": self._labels(rows["sequence_id"].to_numpy()),
        }
        columns = [added[name] if name in added else rows[name] for name in SEQUENCES.names]
        return pa.table(columns, schema=SEQUENCES).combine_chunks()

    def beside(
        self,
        ranking: Ranking,
        wanted: Iterable[tuple[str, NDArray[np.int64]]],
        background: Sequences[tuple[int, int, int]] = (),
    ) -> dict[str, pa.Array]:
        """What top says of a ranking's rows beside their scores, by column. wanted: as of `documents`; background: as
        of `hubs`."""
        sides = ranking.candidates.sides[ranking.rows]
        found: dict[str, pa.Array] = {
            "size_rank": pa.array(ranks_by_size(ranking.queries, ranking.scores, ranking.sequence_ids))
        }
        if not self.asked:
            return found
        stated, places = self.statements(wanted, ranking)
        nats = np.asarray([one.nats for one in self.asked], np.float64)[ranking.queries]
        questions = [one.question for one in self.asked]
        near = hubs(questions, ranking.queries, sides, ranking.ranks, ranking.sequence_ids, background)
        return found | {
            "states_completion": pa.array(stated),
            "states_at": pa.array(places, pa.int32(), mask=~stated),
            "score_per_nat": pa.array((ranking.scores / nats).astype(np.float32), from_pandas=True),
            "hub": pa.array(near),
        }

    def write_rows(
        self,
        ranking: Ranking,
        margins: Callable[[NDArray[np.intp]], Margins],
        documents: SequenceDocuments,
        most_tokens: int,
        beside: Mapping[str, pa.Array] | None = None,
        targets: Callable[[Ranking], Sequences[NDArray[np.float32] | None]] | None = None,
    ) -> None:
        """top, layers, tokens and documents, sorted by query_id, side and rank; and answers.

        margins: of some of the candidates, which the ranking's rows are. most_tokens: that a sequence has. beside:
        columns of top by name, of the whole ranking; those of TOP that nobody gives are null. targets: of a stretch of
        the ranking, the rows' influences by token; None where there are none.
        """
        row_bytes = 4 * (len(self.layers) + (1 + (targets is not None)) * most_tokens)
        part = 0
        best: dict[int, Best] = {}
        alike: dict[int, Alike] = {}
        for parts in _together(_row_parts(ranking, len(self.query_ids)), _MARGINS_BYTES // row_bytes):
            first, last = parts[0][0], parts[-1][1]
            found = margins(ranking.rows[first:last])
            for start, stop in parts:
                mine = found.stretch(start - first, stop - first)
                given = {name: column[start:stop] for name, column in (beside or {}).items()}
                stretch = ranking.stretch(start, stop)
                taught = targets(stretch) if targets is not None else None
                strongest, likest = self._write_part(part, stretch, mine, documents, given, taught)
                best |= strongest
                alike |= likest
                part += 1
        unlikely = [one.unlikely for one in self.asked]
        self._write("answers", 0, answers_table(self.query_ids.to_pylist(), self.scale, best, unlikely, alike))

    def _write_part(
        self,
        part: int,
        ranking: Ranking,
        margins: Margins,
        documents: SequenceDocuments,
        beside: Mapping[str, pa.Array],
        targets: Sequences[NDArray[np.float32] | None] | None,
    ) -> tuple[dict[int, Best], dict[int, Alike]]:
        """Returns the strongest proponents and the rows most like the question, by query."""
        sequence_ids, sides = ranking.sequence_ids, ranking.candidates.sides[ranking.rows]
        stated = beside["states_completion"].to_numpy(zero_copy_only=False) if "states_completion" in beside else None
        alike = beside["similarity_z"].to_numpy(zero_copy_only=False) if "similarity_z" in beside else None
        standing = self.scale.standing(ranking.queries, sides, ranking.scores, stated, alike)
        query_ids = self.query_ids.take(pa.array(ranking.queries))
        split = documents.split(sequence_ids, ranking.scores, margins.token_scores)
        strongest = pa.array(split.strongest)
        known = {
            "query_id": query_ids,
            "side": pa.array(SIDES).take(pa.array(sides)),
            "rank": ranking.ranks,
            "sequence_id": sequence_ids,
            "score": ranking.scores,
            "scan_score": ranking.candidates.scores[ranking.rows],
            "z": pa.array(standing.z, from_pandas=True),
            "share": pa.array(standing.shares, from_pandas=True),
            "stands_out": standing.stands_out,
            "spurious": pa.array([is_spurious(by_token) for by_token in margins.token_scores], pa.bool_()),
            "document_id": documents.ids.take(strongest),
            "document_share": split.shares,
            "source": documents.sources.take(strongest).cast(pa.string()),
            "corpus": self._labels(sequence_ids),
            **beside,
        }
        columns = [known.get(field.name, pa.nulls(len(ranking), field.type)) for field in TOP]
        table = pa.table(columns, schema=TOP).combine_chunks()
        self._write("top", part, table)
        count = len(self.layers)
        layers = [
            query_ids.take(pa.array(np.repeat(np.arange(len(ranking)), count))),
            np.repeat(sequence_ids, count),
            pa.array(self.layers, pa.string()).take(pa.array(np.tile(np.arange(count), len(ranking)))),
            margins.layer_scores.reshape(-1),
        ]
        self._write("layers", part, pa.table(layers, schema=LAYERS))
        starts = np.cumsum([0, *map(len, margins.token_scores)], dtype=np.int32)
        values = np.concatenate([np.empty(0, np.float32), *margins.token_scores])
        by_target = pa.array(targets or [None] * len(ranking), pa.list_(pa.float32()))
        tokens = [query_ids, sequence_ids, pa.ListArray.from_arrays(starts, pa.array(values)), by_target]
        self._write("tokens", part, pa.table(tokens, schema=TOKENS))
        places = pa.array(split.places)
        by_document = [
            query_ids.take(pa.array(split.rows)),
            sequence_ids[split.rows],
            documents.ids.take(places),
            documents.sources.take(places).cast(pa.string()),
            documents.begins[split.places],
            documents.ends[split.places],
            split.scores,
        ]
        self._write("documents", part, pa.table(by_document, schema=ROW_DOCUMENTS))
        named = [table[name].to_pylist() for name in ("document_id", "source", "score", "states_completion")]
        best, likest = {}, {}
        for query in np.unique(ranking.queries).tolist():
            both = np.flatnonzero(ranking.queries == query)
            mine = both[sides[both] == SIDES.index(PROPONENT)]
            if found := best_of(*([column[row] for row in mine.tolist()] for column in named)):
                best[query] = found
            ids = [named[0][row] for row in both.tolist()]
            if like := most_alike(ids, standing.alike[both], standing.states[both]):
                likest[query] = like
        return best, likest

    def _labels(self, sequence_ids: NDArray[np.int64]) -> pa.Array:
        return pa.array(map(self.label, sequence_ids.tolist()), pa.string())

    def _write(self, folder: str, part: int, table: pa.Table) -> None:
        data = to_parquet(table, self.footer)
        self.put(table_part_name(folder, part, data), data, len(table))

    def put(self, name: str, data: bytes, rows: int | None = None) -> None:
        """Write a file of the publication."""
        self.fence()
        self.store.write(name, data)
        self.parts[name] = Part.of(data, rows)

    def remove_stale(self) -> None:
        """Parts that earlier publications left. Listed before the fence, none can be of a driver that took over."""
        there = [name for folder in TABLES for name in self.store.names(folder)]
        for name in there:
            if is_table_part(name) and name not in self.parts:
                self.fence()
                self.store.remove(name)


def _sequence_parts(wanted: Iterable[tuple[str, NDArray[np.int64]]]) -> Iterator[list[tuple[str, NDArray[np.int64]]]]:
    """What goes into each part of `sequences`; at least one, so that readers find an empty table."""
    part: list[tuple[str, NDArray[np.int64]]] = []
    room = _SEQUENCES_PER_PART
    for name, sequence_ids in wanted:
        for start in range(0, len(sequence_ids), _SEQUENCES_PER_PART):
            piece = sequence_ids[start : start + _SEQUENCES_PER_PART]
            if len(part) == _SHARDS_PER_PART or len(piece) > room:
                yield part
                part, room = [], _SEQUENCES_PER_PART
            part.append((name, piece))
            room -= len(piece)
    yield part


def _row_parts(ranking: Ranking, queries: int) -> Iterator[tuple[int, int]]:
    """Which rows [start, stop) go into each part of top, layers and tokens; at least one."""
    ends = np.cumsum(np.bincount(ranking.queries, minlength=queries))
    start = stop = count = 0
    for end in ends.tolist():
        if count == _QUERIES_PER_PART or (count and end - start > _ROWS_PER_PART):
            yield start, stop
            start, count = stop, 0
        stop, count = end, count + 1
    yield start, stop


def _together(parts: Iterable[tuple[int, int]], rows: int) -> Iterator[list[tuple[int, int]]]:
    """Parts one after the other that have at most so many rows in all; one alone may have more."""
    some: list[tuple[int, int]] = []
    for part in parts:
        if some and part[1] - some[0][0] > rows:
            yield some
            some = []
        some.append(part)
    yield some
