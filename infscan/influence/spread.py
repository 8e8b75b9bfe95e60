"""How the scores of all scanned sequences are spread, query by query: counts by size, and sums; shards add up.

A score's bin is the sign and the leading bits of its float32: 8 bins to an octave, so a bin is at most 12.5 % wide, and
counting involves no rounding. Sums are added as whole multiples of the smallest float32. Whatever the order and the
number of shards, the same scores give the same spread.
"""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Leading bits of a mantissa that tell bins apart; octaves from 2^-30 to 2^70, less being zero and more the last bin.
_MANTISSA_BITS, _LOWEST, _OCTAVES = 3, -30, 100
_SIDE = _OCTAVES << _MANTISSA_BITS
BINS = 2 * _SIDE + 1
_SHIFT = 23 - _MANTISSA_BITS
_FIRST = (127 + _LOWEST) << _MANTISSA_BITS
# A sum of float32s is a whole multiple of 2^-149.
_UNIT = 149
# Points that stand for a bin, which is taken to be filled evenly.
_POINTS = 8
# Of a normal distribution, the standard deviation in median absolute deviations.
_NORMAL = 1.4826


def bins_of(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """The bin of each finite score, 0 to BINS - 1, in the order of the scores."""
    bits = scores.astype(np.float32).view(np.uint32)
    place = np.clip(((bits & np.uint32(0x7FFFFFFF)) >> np.uint32(_SHIFT)).astype(np.int64) - _FIRST, -1, _SIDE - 1)
    return _SIDE + np.where(bits >> np.uint32(31), -(place + 1), place + 1)


def _edges() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where each bin begins and ends, ascending."""
    ends = ((np.arange(_SIDE + 1) + _FIRST).astype(np.uint32) << np.uint32(_SHIFT)).view(np.float32).astype(np.float64)
    low = np.concatenate([-ends[:0:-1], [-ends[0]], ends[:-1]])
    high = np.concatenate([-ends[-2::-1], [ends[0]], ends[1:]])
    return low, high


@dataclass(frozen=True)
class ShardSpread:
    """One shard's: of each query, the bins that are not empty with their counts, and the sums of either sign.

    lengths: int64 [Q], how many bins; bins, counts: int64, one query's after the other's. sums: float64 [Q, 2], of the
    positive and of the negative scores.
    """

    lengths: NDArray[np.int64]
    bins: NDArray[np.int64]
    counts: NDArray[np.int64]
    sums_qs: NDArray[np.float64]

    @staticmethod
    def of(scores_nq: NDArray[np.float32]) -> ShardSpread:
        """scores_nq: [n, Q]; NaN and infinities never take part."""
        lengths, bins, counts, sums = [], [], [], []
        for column in scores_nq.T:
            finite = column[np.isfinite(column)]
            found, count = np.unique(bins_of(finite), return_counts=True)
            lengths.append(len(found))
            bins.append(found)
            counts.append(count)
            wide = finite.astype(np.float64)
            sums.append((wide[wide > 0].sum(), wide[wide < 0].sum()))
        nothing = np.empty(0, np.int64)
        return ShardSpread(
            np.asarray(lengths, np.int64),
            np.concatenate([nothing, *bins]),
            np.concatenate([nothing, *counts]).astype(np.int64),
            np.asarray(sums, np.float64).reshape(-1, 2),
        )

    def to_text(self) -> str:
        """For a footer: some bytes for each bin that is not empty."""
        columns = (self.lengths.astype("<u2"), self.bins.astype("<u2"), self.counts.astype("<u4"))
        raw = b"".join(column.tobytes() for column in (*columns, self.sums_qs.astype("<f8")))
        return base64.b64encode(len(self.lengths).to_bytes(4, "little") + zlib.compress(raw, 9)).decode()

    @staticmethod
    def from_text(text: str) -> ShardSpread:
        """What `to_text` wrote."""
        data = base64.b64decode(text)
        queries, raw = int.from_bytes(data[:4], "little"), zlib.decompress(data[4:])
        lengths = np.frombuffer(raw, "<u2", queries)
        total, start = int(lengths.sum(dtype=np.int64)), 2 * queries
        return ShardSpread(
            lengths.astype(np.int64),
            np.frombuffer(raw, "<u2", total, start).astype(np.int64),
            np.frombuffer(raw, "<u4", total, start + 2 * total).astype(np.int64),
            np.frombuffer(raw, "<f8", 2 * queries, start + 6 * total).reshape(queries, 2),
        )


class Spread:
    """All shards' together: 13 kB a query. Every shard is to be added once.

    sampled: whether what is added is a uniform sample of all scores, of which sums say nothing: tails are heavy.
    """

    def __init__(self, queries: int, *, sampled: bool = False) -> None:
        self.counts_qb = np.zeros((queries, BINS), np.int64)
        self.sampled = sampled
        self._sums = [[0, 0] for _ in range(queries)]

    def add(self, shard: ShardSpread) -> None:
        """Take in one more shard."""
        rows = np.repeat(np.arange(len(shard.lengths)), shard.lengths)
        self.counts_qb[rows, shard.bins] += shard.counts
        for mine, sums in zip(self._sums, shard.sums_qs.tolist(), strict=True):
            for side in (0, 1):
                mine[side] += int(math.ldexp(sums[side], _UNIT))

    @property
    def sums_qs(self) -> NDArray[np.float64]:
        """Of each query, the sums of the positive and of the negative scores: float64 [Q, 2]; NaN of a sample."""
        if self.sampled:
            return np.full((len(self._sums), 2), np.nan)
        return np.asarray([[one / (1 << _UNIT) for one in mine] for mine in self._sums], np.float64).reshape(-1, 2)

    @property
    def centres_q(self) -> NDArray[np.float64]:
        """Of each query, the median score; NaN where none was counted."""
        low, high = _edges()
        return np.asarray([_quantile(low, high, counts) for counts in self.counts_qb], np.float64)

    @property
    def scales_q(self) -> NDArray[np.float64]:
        """Of each query, 1.4826 times the median distance to the median: the standard deviation, were it normal."""
        low, high = _edges()
        steps = (np.arange(_POINTS) + 0.5) / _POINTS
        points = low[:, None] + (high - low)[:, None] * steps
        scales = []
        for centre, counts in zip(self.centres_q, self.counts_qb, strict=True):
            used = np.flatnonzero(counts)
            distances = np.abs(points[used] - centre).ravel()
            order = np.argsort(distances, kind="stable")
            weights = np.cumsum(np.repeat(counts[used], _POINTS)[order])
            found = np.searchsorted(weights, weights[-1] / 2) if len(used) else 0
            scales.append(_NORMAL * distances[order[found]] if len(used) else np.nan)
        return np.asarray(scales, np.float64)


def _quantile(low: NDArray[np.float64], high: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    """The median of binned values, each bin filled evenly."""
    total = int(counts.sum())
    if not total:
        return float("nan")
    before = np.cumsum(counts)
    place = int(np.searchsorted(before, total / 2))
    share = (total / 2 - (before[place] - counts[place])) / counts[place]
    return float(low[place] + share * (high[place] - low[place]))
