"""BM25 over token ids: what shared words alone say (Robertson et al.; the rank-bm25 package's Okapi variant)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from infscan.errors import ConfigError


def bm25_scores(sequences: Sequence[NDArray[np.int64]], queries: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """[Q, N]: each query's BM25 score (k1 = 1.5, b = 0.75) for each sequence; its statistics are these sequences'.

    queries: token ids of prompt plus completion, a repeated token counting as often as it occurs.

    Raises:
        ConfigError: where rank-bm25 is not installed.
    """
    try:
        from rank_bm25 import BM25Okapi
    except ImportError:
        raise ConfigError(
            "rank-bm25 is not installed, and BM25 is one of the baselines; install infscan[studies]."
        ) from None
    index = BM25Okapi([sequence.tolist() for sequence in sequences])
    return np.stack([np.asarray(index.get_scores(list(query)), np.float64) for query in queries])
