"""Which layers carry influence: the published rows' layer margins, by block and by lower, middle and upper third.

Grosse et al. 2023 (section 5.3.2) find influence spread over all layers on average, with more of it in the upper layers
for memorised and factual queries and in the middle ones for abstract ones. A layer's part is that of the absolute
margins: margins of both signs cancel in a score.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infscan.influence.agreement import INTERVAL
from infscan.report.thirds import THIRDS, block_of, thirds
from infscan.results.read import read_layers, read_top
from infscan_studies.config import LayersConfig

ALL = "*"  # the row over all queries; no query id can be this

# part: a layer's share of the rows' absolute layer margins, averaged over rows (each row's shares add up to 1), with a
# 95 % interval: over queries for all of them, over rows for one query. signed: its share of the scores themselves.
SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("side", pa.string()),
        ("layer", pa.string()),
        ("block", pa.int32()),
        ("third", pa.string()),
        ("rows", pa.int64()),
        ("part", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("signed", pa.float64()),
    ]
)


def by_layer(top: pa.Table, margins: pa.Table, config: LayersConfig, seed: int) -> pa.Table:
    """Rows by query, side and layer, and of every side the average over queries (query `*`).

    top, margins: of `read_top` and `read_layers`.
    """
    layers = list(dict.fromkeys(margins["layer"].to_pylist()))
    third = thirds(layers)
    column = {layer: index for index, layer in enumerate(layers)}
    scores: dict[tuple[str, int], np.ndarray] = defaultdict(lambda: np.zeros(len(layers)))
    for row in margins.to_pylist():
        scores[row["query_id"], row["sequence_id"]][column[row["layer"]]] = row["score"]
    by_side: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for row in top.filter(pc.field("rank") <= config.rows).to_pylist():
        by_side[row["side"], row["query_id"]].append(scores[row["query_id"], row["sequence_id"]])
    found = []
    for side in sorted({side for side, _ in by_side}, reverse=True):
        mine = {query: np.stack(rows) for (other, query), rows in by_side.items() if other == side}
        parts = {query: _parts(rows) for query, rows in mine.items()}
        means = np.stack([each.mean(axis=0) for each in parts.values()])
        signed = np.stack([rows.sum(axis=0) / rows.sum() for rows in mine.values()])
        count = sum(map(len, mine.values()))
        tables = [(ALL, count, means, signed.mean(axis=0))]
        tables += [(q, len(mine[q]), parts[q], each) for q, each in zip(mine, signed, strict=True)]
        for query, rows, parts_nl, signed_l in tables:
            low, high = _interval(parts_nl, config.resamples, seed)
            found += [
                {
                    "query": query,
                    "side": side,
                    "layer": layer,
                    "block": block_of(layer),
                    "third": third[layer],
                    "rows": rows,
                    "part": float(parts_nl[:, index].mean()),
                    "low": float(low[index]),
                    "high": float(high[index]),
                    "signed": float(signed_l[index]),
                }
                for layer, index in column.items()
            ]
    return pa.Table.from_pylist(found, schema=SCHEMA)


def _parts(rows_nl: np.ndarray) -> np.ndarray:
    absolute = np.abs(rows_nl)
    return absolute / absolute.sum(axis=1, keepdims=True)


def _interval(parts_nl: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean's 95 % percentile interval, by layer, rows drawn anew."""
    drawn_rn = np.random.default_rng(seed).integers(0, len(parts_nl), (resamples, len(parts_nl)))
    low, high = np.percentile(parts_nl[drawn_rn].mean(axis=1), INTERVAL, axis=0)
    return low, high


def study(run: str, config: LayersConfig, seed: int) -> pa.Table:
    """The study of a finished run.

    Raises:
        RunError: where it is not finished.
    """
    return by_layer(read_top(run), read_layers(run), config, seed)


def third_parts(table: pa.Table, side: str) -> dict[str, dict[str, float]]:
    """By query: the part of each third."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(THIRDS, 0.0))
    for row in table.filter(pc.field("side") == side).to_pylist():
        found[row["query"]][row["third"]] += row["part"]
    return dict(found)


def words(table: pa.Table) -> list[str]:
    """What was found, and what that cannot say."""
    said = []
    mine = third_parts(table, "proponent")
    every = {third: len(_layers(table, third)) for third in THIRDS}
    count = sum(every.values())
    if ALL in mine:
        parts = ", ".join(
            f"{third} {mine[ALL][third]:.0%} ({every[third]} of {count} layers: {every[third] / count:.0%} if uniform)"
            for third in THIRDS
            if every[third]
        )
        said.append(f"Proponents' absolute margins, over {len(mine) - 1} queries: {parts}.")
        strongest = max(table.filter(pc.field("query") == ALL).to_pylist(), key=lambda row: row["part"])
        said.append(
            f"The strongest layer is {strongest['layer']}: {strongest['part']:.0%} "
            f"[{strongest['low']:.0%}, {strongest['high']:.0%}]."
        )
        for third in THIRDS:
            if every[third]:
                query = max((q for q in mine if q != ALL), key=lambda q: mine[q][third])
                said.append(f"Most {third}: {query} ({mine[query][third]:.0%}).")
    thinnest = min((count for count in every.values()), default=0)
    if thinnest == 0:
        said.append("The model has fewer than three blocks, or tracked layers in some of them only: a third is empty.")
    return [
        *said,
        "It cannot say: anything of layers that are not tracked; and thirds of a few blocks are coarse. A layer's part "
        "is of the published rows, the strongest ones, not of all sequences.",
    ]


def _layers(table: pa.Table, third: str) -> set[str]:
    return set(table.filter(pc.field("third") == third)["layer"].to_pylist())
