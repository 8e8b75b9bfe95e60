"""Search an index: every row's inner product with every query, and the best rows of each query and side.

Exact over the stored codes: no row is left out by a structure of neighbours. A file at a time is mapped (or read by
byte range), held to its digests and multiplied; of its rows only those that may still be among the best are kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from infscan.influence.packed import QueryCodes, add_inner_products, counts_bits
from infscan.influence.shard_rows import shard_rows
from infscan.influence.topk import PROPONENT, SIDES
from infscan.influence.topk_tracker import ScoredRows, Thresholds, TopKTracker
from infscan.results.index_file import column_of, read_columns
from infscan.storage import Store

# Bytes of bits that a thread has unpacked at once: as much as its cache may hold.
_UNPACKED = 1 << 21
# Rows, and scores, of the files that a thread searches before it chooses among their rows.
_ROWS, _SCORES = 1 << 16, 1 << 22


@dataclass(frozen=True)
class Search:
    """What is looked for in every file."""

    # By layer.
    queries: Mapping[str, QueryCodes]
    sides: tuple[str, ...]
    capacity: int
    # Whether columns are still to be held to their digests.
    verify: bool = True

    @property
    def count(self) -> int:
        return len(next(iter(self.queries.values())).steps)


@dataclass(frozen=True)
class FileGroup:
    """Some files of an index, each with its seal: an item of work."""

    store: Store
    files: tuple[tuple[str, str], ...]
    rows: int
    # Added to sequence ids: where this index's corpus begins among several.
    first_id: int = 0


def search_files(group: FileGroup, search: Search, threads: int = 1) -> ScoredRows:
    """The best `capacity` rows of every query and side in a group of files.

    Raises:
        DamagedError: where a file does not hold what was written.
    """
    tracker = TopKTracker(search.count, search.sides, search.capacity)
    batches = list(_batches(group, max(1, min(_ROWS, _SCORES // search.count))))
    if threads == 1:
        for files in batches:
            tracker.add(_best_of(group, files, search, tracker.thresholds))
        return tracker.best()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for found in _in_turn(pool, group, batches, search, tracker, 2 * threads):
            tracker.add(found)
    return tracker.best()


def _batches(group: FileGroup, rows: int) -> Iterator[tuple[tuple[str, str], ...]]:
    """Files one after the other, so many that they have about so many rows, if all have as many."""
    at_once = max(1, rows * len(group.files) // max(1, group.rows))
    for start in range(0, len(group.files), at_once):
        yield group.files[start : start + at_once]


def _in_turn(
    pool: ThreadPoolExecutor,
    group: FileGroup,
    batches: Sequence[Sequence[tuple[str, str]]],
    search: Search,
    tracker: TopKTracker,
    ahead: int,
) -> Iterator[ScoredRows]:
    """What is found in each batch of files, a few ahead: later ones know the thresholds of earlier ones."""
    waiting: list[Future[ScoredRows]] = []
    for files in batches:
        if len(waiting) == ahead:
            yield waiting.pop(0).result()
        waiting.append(pool.submit(_best_of, group, files, search, tracker.thresholds))
    for one in waiting:
        yield one.result()


def _best_of(group: FileGroup, files: Sequence[tuple[str, str]], search: Search, thresholds: Thresholds) -> ScoredRows:
    parts = [file_scores(group.store, name, search.queries, seal, verify=search.verify) for name, seal in files]
    ids, scores_nq = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    # Nearly all rows are below every threshold once there are some, and choosing takes longer than counting.
    kept = _within(scores_nq, search.sides, thresholds)
    scores = torch.from_numpy(scores_nq[kept])
    return shard_rows(scores, ids[kept] + group.first_id, search.sides, search.capacity, thresholds)


def _within(scores_nq: NDArray[np.float32], sides: Sequence[str], thresholds: Thresholds) -> NDArray[np.intp]:
    """The rows that some query and side's threshold does not exclude."""
    kept = []
    for side in sides:
        bars_q = thresholds.strengths_qs[:, SIDES.index(side)]
        within_nq = scores_nq >= bars_q if side == PROPONENT else scores_nq <= -bars_q
        # Few are, and reducing every row takes longer.
        kept.append(np.flatnonzero(within_nq) // len(bars_q))
    return np.unique(np.concatenate(kept))


def file_scores(
    store: Store, name: str, queries: Mapping[str, QueryCodes], seal: str | None = None, *, verify: bool = True
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The sequence ids of a file's rows, and their scores by the index, [n, Q]: the layers' inner products, summed."""
    wanted = [column_of(kind, layer) for layer in queries for kind in ("code", "scale")]
    columns = read_columns(store, name, ["sequence_id", *wanted], seal, verify=verify)
    n = len(columns["sequence_id"])
    scores_nq = np.zeros((n, len(next(iter(queries.values())).steps)), np.float32)
    at_once, scratch = max(1, n), None
    if not all(counts_bits(asked) for asked in queries.values()):
        widest = max(columns[column_of("code", layer)].shape[1] for layer in queries)
        at_once = max(1, min(n, _UNPACKED // (8 * widest)))
        scratch = np.empty(at_once * 8 * widest, np.uint8)
    for start in range(0, n, at_once):
        rows = slice(start, start + at_once)
        for layer, asked in queries.items():
            codes, scales = columns[column_of("code", layer)][rows], columns[column_of("scale", layer)][rows]
            add_inner_products(scores_nq[rows], codes, scales, asked, scratch)
    return columns["sequence_id"], scores_nq


def file_groups(store: Store, files: Sequence[tuple[str, str, int]], groups: int, first_id: int = 0) -> list[FileGroup]:
    """Files (name, seal, rows) in at most so many groups of about as many rows."""
    total = sum(rows for _, _, rows in files)
    found: list[list[tuple[str, str, int]]] = [[] for _ in range(min(groups, len(files)))]
    seen = 0
    for file in files:
        found[min(len(found) - 1, seen * len(found) // max(1, total))].append(file)
        seen += file[2]
    return [
        FileGroup(store, tuple((name, seal) for name, seal, _ in some), sum(rows for _, _, rows in some), first_id)
        for some in found
        if some
    ]


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))
