"""Ranks allotted by what they bring: few where a query's gradient is simple, many where it is not (scan.rank=auto)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def allot(
    values: Sequence[NDArray[np.floating]], totals: Sequence[float], costs: Sequence[float], kept: float
) -> list[int]:
    """How many leading columns of every layer one query keeps, so that its dropped share is at most 1 - kept.

    values: by layer, the falling singular values of what was truncated [r_l]; their squares are the columns' shares of
    the score's expected square (`Compressed`). totals: by layer, with what had been left out already. costs: of a
    column, by layer (O + I). Columns enter by their share per cost, greedily; all, where they hold less than `kept`.
    """
    squares = [np.square(np.asarray(layer, np.float64)) for layer in values]
    owners = np.repeat(np.arange(len(squares)), [len(layer) for layer in squares])
    shares = np.concatenate(squares) if squares else np.empty(0)
    order = np.argsort(-shares / np.asarray(costs, np.float64)[owners], kind="stable")
    reached = np.cumsum(shares[order])
    needed = int(np.searchsorted(reached, kept * float(np.sum(totals)))) + 1
    return np.bincount(owners[order[:needed]], minlength=len(squares)).tolist()
