"""Cut a shard's sequences into micro-batches by their lengths alone, and pad one for the model.

The cut depends on nothing but the lengths and the token budget, so the same shard gives the same batches on any number
of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def micro_batches(lengths: np.ndarray | Sequence[int], tokens_per_batch: int) -> list[np.ndarray]:
    """Partition the positions 0..n-1 into batches of like lengths.

    Args:
        lengths: [n], tokens per sequence.
        tokens_per_batch: the most padded tokens (longest x rows) a batch may have; a longer sequence gets a batch
            of its own.

    Returns:
        int64 arrays of positions, sorted by (length, position) within and across batches.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.argsort(sizes, kind="stable")
    batches: list[np.ndarray] = []
    begin = 0
    for at, position in enumerate(order):
        if at > begin and sizes[position] * (at - begin + 1) > tokens_per_batch:
            batches.append(order[begin:at])
            begin = at
    if begin < len(order):
        batches.append(order[begin:])
    return batches


def pad(sequences: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of several sequences as (ids int64 [B, T], mask bool [B, T]), padded with 0 on the right."""
    longest = max(map(len, sequences), default=0)
    ids = np.zeros((len(sequences), longest), np.int64)
    mask = np.zeros((len(sequences), longest), np.bool_)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask


def pad_positions(starts: Sequence[np.ndarray | None], T: int) -> np.ndarray | None:
    """Positions that begin anew where documents do, int64 [B, T]; None where every sequence is one document.

    starts: of each sequence, int64 ascending from 0. Padding goes on from the last document, which does not see it.
    """
    if all(one is None or len(one) == 1 for one in starts):
        return None
    positions = np.tile(np.arange(T, dtype=np.int64), (len(starts), 1))
    for row, one in enumerate(starts):
        if one is not None:
            begins = np.zeros(T, np.int64)
            begins[one] = one
            positions[row] -= np.maximum.accumulate(begins)
    return positions


def pad_losses(losses: Sequence[np.ndarray | None], mask: np.ndarray) -> np.ndarray:
    """Which tokens of padded sequences have a loss: bool [B, T], within `mask`; None is a sequence that has it all."""
    padded = mask.copy()
    for row, loss in enumerate(losses):
        if loss is not None:
            padded[row, : len(loss)] = loss
    return padded
