"""Refined scores: rows re-scored with full-rank query gradients, with their margins, one file per unit of work."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infscan.results.schema import REFINED, footer_of, read_parquet, to_parquet
from infscan.storage import Store

FOLDER = "refined"


@dataclass(frozen=True)
class Margins:
    """One row's full-rank score, split over layers [L] and over input positions [length]; float32."""

    layer_scores: NDArray[np.float32]
    token_scores: NDArray[np.float32]

    @property
    def score(self) -> float:
        return float(self.layer_scores.sum(dtype=np.float64))


def unit_path(candidates_digest: str, unit: int) -> str:
    """Units of another set of candidates (a shard retried after quarantine) have another folder."""
    return f"{FOLDER}/{candidates_digest[:16]}/unit-{unit:06d}.parquet"


def write_unit(
    store: Store,
    path: str,
    pairs: Sequences[tuple[str, int]],
    layer_scores: NDArray[np.float32],
    token_scores: Sequences[NDArray[np.float32]],
    layers: Sequences[str],
) -> None:
    """One unit's rows in one atomic put.

    pairs: (query_id, sequence_id). layer_scores: [pairs, layers]. token_scores: one array per pair, [length].
    """
    table = pa.table(
        [
            pa.array([query_id for query_id, _ in pairs], pa.string()),
            pa.array([sequence_id for _, sequence_id in pairs], pa.int64()),
            pa.array(list(layer_scores), pa.list_(pa.float32())),
            pa.array(list(token_scores), pa.list_(pa.float32())),
        ],
        schema=REFINED,
    )
    store.write(path, to_parquet(table, {"layers": list(layers)}))


def read_unit(store: Store, path: str) -> tuple[list[str], dict[tuple[str, int], Margins]]:
    """The unit's layers (its part of the tracked ones) and the margins of its rows."""
    table = read_parquet(store, path)
    layers: list[str] = footer_of(table.schema, f"{store.uri}/{path}")["layers"]
    rows = table.to_pydict()
    margins = {
        (query_id, sequence_id): Margins(np.asarray(by_layer, np.float32), np.asarray(by_token, np.float32))
        for query_id, sequence_id, by_layer, by_token in zip(
            rows["query_id"], rows["sequence_id"], rows["layer_scores"], rows["token_scores"], strict=True
        )
    }
    return layers, margins


def join_layer_groups(parts: Sequences[tuple[list[str], Margins]], layers: Sequences[str]) -> Margins:
    """One row's margins over all tracked layers from the parts that were computed by layer group, in a fixed order."""
    by_layer = {name: value for names, part in parts for name, value in zip(names, part.layer_scores, strict=True)}
    tokens = np.zeros_like(parts[0][1].token_scores, np.float64)
    for _, part in parts:
        tokens += part.token_scores
    return Margins(np.asarray([by_layer[name] for name in layers], np.float32), tokens.astype(np.float32))
