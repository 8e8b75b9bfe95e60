"""Laws of the BM25 baseline: shared rare tokens count, and nothing else."""

from __future__ import annotations

import numpy as np

from infscan_studies.truth.bm25 import bm25_scores

SEQUENCES = [np.asarray(ids, np.int64) for ids in ([1, 2, 3, 4], [1, 5, 6, 7], [1, 8, 9, 10], [1, 11, 12, 13])]


def test_the_sequence_that_shares_rare_tokens_comes_first() -> None:
    scores_qn = bm25_scores(SEQUENCES, [[5, 6, 1], (9,)])
    assert scores_qn.shape == (2, 4)
    assert scores_qn.argmax(axis=1).tolist() == [1, 2]
    assert scores_qn[1].tolist().count(0.0) == 3


def test_order_within_a_sequence_changes_nothing() -> None:
    turned = [ids[::-1].copy() for ids in SEQUENCES]
    assert np.array_equal(bm25_scores(turned, [[5, 6]]), bm25_scores(SEQUENCES, [[6, 5]]))
