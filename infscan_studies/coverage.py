"""How much of an unfiltered scan's top the TF-IDF filter would have kept, against how many sequences it keeps.

Grosse et al. 2023 (section 3.2.1) kept the 10,000 best sequences of every query. Here a finished scan of a whole corpus
is held against the filter's candidates of the same corpus and queries: of the scan's top n rows, the share whose rank
in the filter is at most k (docs/method.md#studies).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from infscan.errors import RunError
from infscan.results.read import read_summary, read_top
from infscan.results.schema import read_with_footer, to_parquet
from infscan.steps.tfidf import CANDIDATES
from infscan.storage import Store
from infscan_studies.comparison import AVERAGE
from infscan_studies.config import CoverageConfig, ValidateJob

NAME = "coverage"


def coverage(
    top: pa.Table, candidates: pa.Table, tops: Sequence[int], ks: Sequence[int], known: int | None = None
) -> pa.Table:
    """Rows (query, side, top, k, rows, share), and of every side, top and k the queries' average (query `(average)`).

    top: a run's (query_id, side, rank, sequence_id). candidates: the filter's (query_id, rank, sequence_id).
    known: how many rows per query the filter kept, None where it kept all.
    share: of the `rows` rows of the scan with rank <= top, those that the filter ranks k or better; null for a k above
    `known`, since the ranks in between are not.
    """
    ranks = {
        (query, number): rank
        for query, number, rank in zip(*(candidates[name].to_pylist() for name in _KEYS), strict=True)
    }
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in top.select(["query_id", "side", "rank", "sequence_id"]).to_pylist():
        rank = ranks.get((row["query_id"], row["sequence_id"]), np.inf)
        found.setdefault((row["query_id"], row["side"]), []).append((row["rank"], rank))
    rows: list[dict[str, Any]] = []
    for (query, side), pairs in sorted(found.items()):
        for n in tops:
            mine = np.array([rank for place, rank in pairs if place <= n])
            rows += [
                _row(query, side, n, k, len(mine), float(np.mean(mine <= k)) if known is None or k <= known else None)
                for k in ks
            ]
    for side in sorted({row["side"] for row in rows}):
        for n in tops:
            for k in ks:
                alike = [row for row in rows if (row["side"], row["top"], row["k"]) == (side, n, k)]
                shares = [row["share"] for row in alike if row["share"] is not None]
                share = float(np.mean(shares)) if shares else None
                rows.append(_row(AVERAGE, side, n, k, sum(row["rows"] for row in alike), share))
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


_SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("side", pa.string()),
        *((name, pa.int64()) for name in ("top", "k", "rows")),
        ("share", pa.float64()),
    ]
)


_KEYS = ("query_id", "sequence_id", "rank")


def _row(query: str, side: str, top: int, k: int, rows: int, share: float | None) -> dict[str, Any]:
    return {"query": query, "side": side, "top": top, "k": k, "rows": rows, "share": share}


def validate(config: ValidateJob, log: Callable[[str], None]) -> tuple[None, pa.Table, dict[str, Any]]:
    """The study for a finished run (truth.run) and a filter's output (truth.filter).

    The table goes to <output>/validate/coverage.parquet.

    Raises:
        RunError: where the two are of different corpora or queries, or one is not finished.
    """
    truth = config.truth
    assert isinstance(truth, CoverageConfig)
    assert truth.run is not None
    assert truth.filter is not None
    candidates, footer = read_with_footer(Store(truth.filter), CANDIDATES)
    inputs = read_summary(truth.run)["inputs"]
    for key in ("corpus", "queries"):
        if inputs[key] != footer[key]:
            raise RunError(
                f"{truth.run} scanned other {key} than {truth.filter} filtered; run infscan tfidf on the run's own "
                "(corpus.path=<run>/corpus, the same queries)."
            )
    known = footer["top_k"] if footer["top_k"] < footer["sequences"] else None
    table = coverage(read_top(truth.run), candidates, truth.tops, truth.ks, known)
    facts = {"run": truth.run, "filter": truth.filter, "sequences": footer["sequences"], "top_k": footer["top_k"]}
    Store(config.output).write(f"validate/{NAME}.parquet", to_parquet(table, facts))
    return None, table, facts
