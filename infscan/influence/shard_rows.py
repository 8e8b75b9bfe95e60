"""The rows of a shard that it writes, chosen where its scores are (docs/design.md, mechanisms 2 and 3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.influence.topk import PROPONENT, SIDES
from infscan.influence.topk_tracker import ScoredRows, Thresholds

# Scores that rows are chosen from at once: some 30 bytes each.
_AT_ONCE = 1 << 22


def shard_rows(
    scores_nq: Tensor,
    sequence_ids: NDArray[np.int64],
    sides: tuple[str, ...],
    capacity: int,
    thresholds: Thresholds,
) -> ScoredRows:
    """The rows of one shard that may still be among the C best: at most C per query and side, none below threshold.

    scores_nq: [n, Q], float32, on any device, which chooses; NaN and infinities never take part. Rows come by query,
    side and strength.
    """
    by_id = np.argsort(sequence_ids, kind="stable")
    ids_n, numbers = sequence_ids[by_id], [SIDES.index(side) for side in sides]
    rows_n = torch.from_numpy(by_id).to(scores_nq.device)
    at_once = max(1, _AT_ONCE // max(1, len(ids_n)))
    parts = [
        _chosen(column_nq[rows_n].T, ids_n, range(start, start + column_nq.shape[1]), number, capacity, thresholds)
        for number in numbers
        for start, column_nq in zip(range(0, scores_nq.shape[1], at_once), scores_nq.split(at_once, dim=1), strict=True)
    ]
    found = ScoredRows.concatenate(parts)
    # Within a query and side they are in order already.
    return found.take(np.lexsort((found.sides, found.queries)))


def _chosen(
    scores_qn: Tensor,
    ids_n: NDArray[np.int64],
    queries: range,
    side: int,
    capacity: int,
    thresholds: Thresholds,
) -> ScoredRows:
    """`shard_rows` of some queries and one side (its index in SIDES). ids_n: ascending."""

    def on_device(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(scores_qn.device)

    turned_qn = (scores_qn if SIDES[side] == PROPONENT else -scores_qn).contiguous()
    bars_q1 = on_device(thresholds.strengths_qs[queries.start : queries.stop, side])[:, None]
    bar_ids_q1 = on_device(thresholds.sequence_ids_qs[queries.start : queries.stop, side])[:, None]
    tied_qn = (turned_qn == bars_q1) & (on_device(ids_n) <= bar_ids_q1)
    keep_qn = torch.isfinite(turned_qn) & (turned_qn > 0) & ((turned_qn > bars_q1) | tied_qn)
    # One number for a row's strength and then its sequence_id: the bits of a positive float are in its order.
    after_n = torch.arange(len(ids_n) - 1, -1, -1, device=scores_qn.device)
    keys_qn = torch.where(keep_qn, (turned_qn.view(torch.int32).to(torch.int64) << 32) | after_n, -1)
    most = min(capacity, int(keep_qn.sum(dim=1).max())) if keep_qn.numel() else 0
    keys_qk = keys_qn.topk(most, dim=1).values.cpu().numpy()
    query, place = np.nonzero(keys_qk >= 0)
    found = keys_qk[query, place]
    strengths = (found >> 32).astype(np.int32).view(np.float32)
    return ScoredRows(
        queries=(query + queries.start).astype(np.int32),
        sides=np.full(len(found), side, np.int8),
        sequence_ids=ids_n[len(ids_n) - 1 - (found & 0xFFFFFFFF)].astype(np.int64),
        scores=strengths if SIDES[side] == PROPONENT else -strengths,
    )
