"""Refined scores: rows re-scored with full-rank query gradients, with their margins, one file per unit of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infscan.influence.topk_tracker import ScoredRows
from infscan.results.schema import OF, REFINED, read_with_footer, to_parquet
from infscan.storage import Store
from infscan.storage.prefetch import prefetch

FOLDER = "refined"
_UNITS_AT_ONCE = 4


@dataclass(frozen=True)
class Unit:
    """The rows of one unit, as columns of one length.

    query_ids, sequence_ids: which rows. layer_scores: float32 [rows, layers]. token_scores: float32, the rows' input
    positions one after the other, and starts: int64 [rows + 1], where each row's begin; both empty where only scores
    were read.
    """

    query_ids: pa.Array
    sequence_ids: NDArray[np.int64]
    layer_scores: NDArray[np.float32]
    token_scores: NDArray[np.float32]
    starts: NDArray[np.int64]

    @property
    def scores(self) -> NDArray[np.float32]:
        """Full-rank scores [rows]: layer scores added in float64, in float32 as they are ranked and published."""
        return self.layer_scores.astype(np.float64).sum(axis=1).astype(np.float32)


@dataclass(frozen=True)
class Margins:
    """Some rows' scores, split over layers [rows, L] and, row by row, over input positions [length]; float32."""

    layer_scores: NDArray[np.float32]
    token_scores: list[NDArray[np.float32]]

    def stretch(self, start: int, stop: int) -> Margins:
        return Margins(self.layer_scores[start:stop], self.token_scores[start:stop])


def unit_folder(candidates_digest: str) -> str:
    """Units of another set of candidates (a shard retried after quarantine) have another folder."""
    return f"{FOLDER}/{candidates_digest[:16]}"


def unit_path(candidates_digest: str, unit: int) -> str:
    return f"{unit_folder(candidates_digest)}/unit-{unit:06d}.parquet"


def write_unit(
    store: Store,
    path: str,
    pairs: Sequences[tuple[str, int]],
    layer_scores: NDArray[np.float32],
    token_scores: Sequences[NDArray[np.float32]],
    layers: Sequences[str],
) -> None:
    """One unit's rows in one atomic put.

    pairs: (query_id, sequence_id). layer_scores: [pairs, layers]. token_scores: one array per pair, [length].
    """
    table = pa.table(
        [
            pa.array([query_id for query_id, _ in pairs], pa.string()),
            pa.array([sequence_id for _, sequence_id in pairs], pa.int64()),
            pa.array(list(layer_scores), pa.list_(pa.float32())),
            pa.array(list(token_scores), pa.list_(pa.float32())),
        ],
        schema=REFINED,
    )
    store.write(path, to_parquet(table, {"layers": list(layers), OF: path}))


def read_unit(store: Store, paths: Sequences[str], layers: Sequences[str], *, tokens: bool = True) -> Unit:
    """A unit's rows over all tracked layers, joined from its files by layer group; without `tokens`, scores alone.

    Layers come in the model's order; token scores are added over layer groups in float64, in the order of `paths`.

    Raises:
        KeyError: where the files lack one of `layers`.
    """
    columns = ["query_id", "sequence_id", "layer_scores", *(["token_scores"] if tokens else [])]
    tables, footers = zip(*(read_with_footer(store, path, columns) for path in paths), strict=True)
    first = tables[0]
    assert all(table.select([0, 1]).equals(first.select([0, 1])) for table in tables[1:]), f"{paths} hold other rows"
    column: dict[str, NDArray[np.float32]] = {}
    for footer, table in zip(footers, tables, strict=True):
        names: list[str] = footer["layers"]
        column |= zip(names, _flat(table["layer_scores"])[0].reshape(-1, len(names)).T, strict=True)
    by_token, starts = np.empty(0, np.float32), np.zeros(1, np.int64)
    if tokens:
        starts = _flat(first["token_scores"])[1]
        wide = np.zeros(starts[-1], np.float64)
        for table in tables:
            wide += _flat(table["token_scores"])[0]
        by_token = wide.astype(np.float32)
    return Unit(
        pc.dictionary_encode(first["query_id"]).combine_chunks(),
        first["sequence_id"].to_numpy(),
        np.stack([column[name] for name in layers], axis=1),
        by_token,
        starts,
    )


def _flat(lists: pa.ChunkedArray) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The lists' values one after the other, and where each list begins."""
    array = lists.combine_chunks()
    lengths = pc.list_value_length(array).to_numpy()
    return array.flatten().to_numpy(), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


class RefinedRows:
    """All refined units of a run, for its candidates: scores at once, margins of as many rows as one asks for.

    groups: the queries of each query group, as ranges of indices into query_ids. paths: for each query group, its units
    by layer group. best: by query. In memory are 8 bytes a candidate and, while units are read, some dozens of bytes a
    candidate of one query group and one unit (of an object store `_UNITS_AT_ONCE`).

    Attributes:
        scores: float32, the refined score of every row of `best`.
    """

    def __init__(
        self,
        store: Store,
        groups: Sequences[range],
        paths: Sequences[Sequences[Sequences[str]]],
        layers: Sequences[str],
        query_ids: Sequences[str],
        best: ScoredRows,
    ) -> None:
        self.store, self.layers, self.best = store, layers, best
        self._query_ids = pa.array(query_ids, pa.string())
        # Of each query group: its stretch of `best`, which is sorted by query, and of each unit the files.
        ends = [group.stop for group in groups]
        starts = np.searchsorted(best.queries, [group.start for group in groups])
        self._file_ranges = list(zip(starts.tolist(), np.searchsorted(best.queries, ends).tolist(), strict=True))
        self._units = [list(zip(*by_layers, strict=True)) for by_layers in paths]
        self.scores = np.empty(len(best), np.float32)
        # Of each candidate, its unit within its query group.
        self._unit_of = np.empty(len(best), np.int32)
        for group, units in enumerate(self._units):
            rows_of = self._finder(group)
            for number, unit in enumerate(self._read(units, tokens=False)):
                rows = rows_of(unit)
                self.scores[rows] = unit.scores
                self._unit_of[rows] = number

    def margins(self, rows: NDArray[np.intp]) -> Margins:
        """The margins of these rows of `best`, in their order: 4 (L + T) bytes a row, and one unit."""
        by_layer = np.empty((len(rows), len(self.layers)), np.float32)
        by_token: list[NDArray[np.float32]] = [np.empty(0, np.float32)] * len(rows)
        place = np.full(len(self.best), -1, np.int32)
        place[rows] = np.arange(len(rows), dtype=np.int32)
        for group, (start, stop) in enumerate(self._file_ranges):
            wanted = rows[(start <= rows) & (rows < stop)]
            units = [self._units[group][number] for number in np.unique(self._unit_of[wanted])]
            rows_of = self._finder(group) if units else None
            for unit in self._read(units, tokens=True):
                assert rows_of is not None
                places = place[rows_of(unit)]
                (found,) = np.nonzero(places >= 0)
                by_layer[places[found]] = unit.layer_scores[found]
                for row in found.tolist():
                    by_token[places[row]] = unit.token_scores[unit.starts[row] : unit.starts[row + 1]].copy()
        return Margins(by_layer, by_token)

    def _read(self, units: Sequences[tuple[str, ...]], *, tokens: bool) -> Iterator[Unit]:
        def read(paths: tuple[str, ...]) -> Unit:
            return read_unit(self.store, paths, self.layers, tokens=tokens)

        return prefetch(self.store, read, units, _UNITS_AT_ONCE)

    def _finder(self, group: int) -> Callable[[Unit], NDArray[np.intp]]:
        """Where the rows of one of the group's units stand in `best`."""
        start, stop = self._file_ranges[group]
        ids = np.unique(self.best.sequence_ids[start:stop])

        def keys(queries: NDArray[np.int32], sequence_ids: NDArray[np.int64]) -> NDArray[np.int64]:
            return queries.astype(np.int64) * len(ids) + np.searchsorted(ids, sequence_ids)

        known = keys(self.best.queries[start:stop], self.best.sequence_ids[start:stop])
        order = np.argsort(known)
        known = known[order]

        def rows_of(unit: Unit) -> NDArray[np.intp]:
            queries = pc.index_in(unit.query_ids.dictionary, value_set=self._query_ids).to_numpy()
            found = np.searchsorted(known, keys(queries[unit.query_ids.indices.to_numpy()], unit.sequence_ids))
            return start + order[found]

        return rows_of
