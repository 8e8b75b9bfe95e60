"""How all scan scores are spread (scan.scores=all): counted by sign and size, in one pass over the parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infscan.results.dense import FOLDER, score_column
from infscan.results.schema import read_parquet
from infscan.results.shard_file import quarantined_shards
from infscan.storage import Store

# Bins are a quarter of a decade wide, from 1e-12 on; what is smaller counts as zero, what is larger in the last.
PER_DECADE, LOWEST, BINS = 4, -12, 120
# More than this is not read for a picture: parts are then taken evenly spaced over the corpus.
MOST_BYTES = 1 << 30


def count(scores: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Positive and negative scores by |score|, each [BINS], and how many are zero; NaN and infinities are not counted.

    Bin k holds 10^(LOWEST + k / PER_DECADE) <= |score| < 10^(LOWEST + (k + 1) / PER_DECADE).
    """
    finite = scores[np.isfinite(scores)].astype(np.float64)
    with np.errstate(divide="ignore"):
        place = np.floor((np.log10(np.abs(finite)) - LOWEST) * PER_DECADE)
    small = place < 0
    bins = np.clip(place[~small], 0, BINS - 1).astype(np.int64)
    positive = finite[~small] > 0
    return (
        np.bincount(bins[positive], minlength=BINS),
        np.bincount(bins[~positive], minlength=BINS),
        int(small.sum()),
    )


def histograms(store: Store, query_ids: Sequence[str], most_bytes: int = MOST_BYTES) -> dict[str, dict[str, Any]]:
    """Per query, what the page draws of its scores; {} where the run kept none.

    parts, of: how many of the shards' parts were read. first: the exponent at which the first bin that is kept begins.
    """
    given_up = quarantined_shards(store)
    entries = [
        entry
        for entry in store.list(FOLDER, suffix=".parquet")
        if entry.name.rpartition("/")[2].removesuffix(".parquet") not in given_up
    ]
    if not entries or not query_ids:
        return {}
    step = -(-sum(entry.size for entry in entries) // most_bytes)
    read = entries[::step]
    columns = [score_column(query_id) for query_id in query_ids]
    totals = np.zeros((len(columns), 2, BINS), np.int64)
    zeros = np.zeros(len(columns), np.int64)
    for entry in read:
        table = read_parquet(store, entry.name, columns)
        for row, column in enumerate(columns):
            positive, negative, zero = count(table[column].to_numpy())
            totals[row, 0] += positive
            totals[row, 1] += negative
            zeros[row] += zero
    return {
        query_id: _kept(totals[row], int(zeros[row])) | {"parts": len(read), "of": len(entries)}
        for row, query_id in enumerate(query_ids)
    }


def _kept(counts: NDArray[np.int64], zeros: int) -> dict[str, Any]:
    used = np.flatnonzero(counts.sum(axis=0))
    start, stop = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
    return {
        "first": LOWEST + start / PER_DECADE,
        "per_decade": PER_DECADE,
        "positive": counts[0, start:stop].tolist(),
        "negative": counts[1, start:stop].tolist(),
        "zero": zeros,
    }
