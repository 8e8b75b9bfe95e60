"""Dense scores: every scanned sequence's scan score against every query, one part per shard (scan.scores=all)."""

from __future__ import annotations

from collections.abc import Sequence as Sequences

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infscan.corpus.sequences import Sequence
from infscan.results.schema import OF, other_scan, read_with_footer, to_parquet
from infscan.storage import Store

FOLDER = "scores"


def scores_path(name: str) -> str:
    """Of a shard."""
    return f"{FOLDER}/{name}.parquet"


def score_column(query_id: str) -> str:
    return f"score_{query_id}"


def check_scores(store: Store, name: str, fingerprint: str) -> None:
    """Hold a part to its footer, which says what it is of and what is in it.

    Raises:
        DamagedError: where it is not what was written, or was written under another name.
        RunError: where it is of another scan.
    """
    path = scores_path(name)
    if read_with_footer(store, path, None)[1]["fingerprint"] != fingerprint:
        raise other_scan(store, path)


def write_scores(
    store: Store,
    name: str,
    sequences: Sequences[Sequence],
    scores_nq: NDArray[np.float32],
    query_ids: Sequences[str],
    fingerprint: str,
) -> None:
    """One part: sequence_id, document_id, then score_<query_id> float32 for each query.

    It is written before the shard's file, whose presence then says that the part is there too.
    scores_nq: [n, Q], in the sequences' order; a score that is not finite stays as it is, so that it is seen.
    """
    columns: dict[str, pa.Array] = {
        "sequence_id": pa.array([sequence.sequence_id for sequence in sequences], pa.int64()),
        "document_id": pa.array([sequence.document_id for sequence in sequences], pa.string()),
    }
    for query, query_id in enumerate(query_ids):
        columns[score_column(query_id)] = pa.array(np.ascontiguousarray(scores_nq[:, query]), pa.float32())
    path = scores_path(name)
    store.write(path, to_parquet(pa.table(columns), {"fingerprint": fingerprint, OF: path}))
