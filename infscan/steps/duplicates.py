"""Near-duplicates in gradient space: pairs of sequences that would move every completion alike, from their codes alone.

Rows whose codes agree in a few bytes of signs are compared, for many choices of bytes; so a pair of cosine 0.9 is found
with a chance of 0.99 and more, and not all pairs are looked at (random hyperplanes; Charikar 2002). The cosine is that
of whitened gradients, as the codes estimate it: layer by layer cos(pi d), d the share of signs that differ, or the
codes' own where they have eight bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infscan.results.index_file import Column, column_of, read_columns
from infscan.steps.ask import OpenIndex

# (bytes of signs that must agree, choices of them): fewer bytes for few rows, of which random agreement is rare.
_FEW_ROWS, _FEW, _MANY = 1 << 17, (2, 64), (3, 256)
# Of rows that agree, each is compared with so many that follow: a thousand copies are linked, not all paired.
_NEXT = 8
_AT_ONCE = 1 << 14

Pairs = NDArray[np.int64]


@dataclass(frozen=True)
class _Codes:
    """All rows of an index, by layer. signs: uint8 [N, bytes]. scales: [N]; norms: [N], of the code's values."""

    sequence_ids: NDArray[np.int64]
    codes: Mapping[str, Column]
    signs: Mapping[str, Column]
    scales: Mapping[str, Column]
    norms: Mapping[str, Column]
    bits: int


def near_duplicates(found: OpenIndex, similar: float, seed: int = 0) -> pa.Table:
    """Pairs of at least this cosine, the most alike first: sequence_id, other_id (the larger), cosine.

    Of many copies of one row not every pair is listed, but each with some. A row whose gradient is not finite or zero
    has no pairs.

    Raises:
        DamagedError: where a file of the index does not hold what was written.
    """
    rows = _read(found)
    pairs = _candidates(rows, seed)
    cosines = np.concatenate(
        [np.empty(0), *(_cosines(rows, pairs[start : start + _AT_ONCE]) for start in range(0, len(pairs), _AT_ONCE))]
    )
    pairs, cosines = pairs[cosines >= similar], cosines[cosines >= similar]
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -cosines))
    one, other = rows.sequence_ids[pairs[order, 0]], rows.sequence_ids[pairs[order, 1]]
    return pa.table({"sequence_id": one, "other_id": other, "cosine": cosines[order].astype(np.float32)})


def _read(found: OpenIndex) -> _Codes:
    layers, bits = list(found.manifest.layers), int(found.manifest.fields["code"]["bits"])
    wanted = ["sequence_id", *(column_of(kind, layer) for layer in layers for kind in ("code", "scale"))]
    parts = [read_columns(found.store, name, wanted, file.seal) for name, file in sorted(found.manifest.files.items())]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in wanted}
    codes = {layer: columns[column_of("code", layer)] for layer in layers}
    scales = {layer: columns[column_of("scale", layer)] for layer in layers}
    if bits == 1:
        norms = {layer: scales[layer] * np.float32(np.sqrt(8 * codes[layer].shape[1])) for layer in layers}
        return _Codes(columns["sequence_id"], codes, codes, scales, norms, bits)
    signed = {layer: code.view(np.int8) for layer, code in codes.items()}
    norms = {layer: scales[layer] * np.linalg.norm(code.astype(np.float32), axis=1) for layer, code in signed.items()}
    signs = {layer: np.packbits(code >= 0, axis=1) for layer, code in signed.items()}
    return _Codes(columns["sequence_id"], signed, signs, scales, norms, bits)


def _candidates(rows: _Codes, seed: int) -> Pairs:
    """Pairs of rows (the first the smaller) whose signs agree somewhere, each once: [P, 2]."""
    counted = np.sqrt(sum(np.square(norms.astype(np.float64)) for norms in rows.norms.values()))
    there = np.flatnonzero(counted > 0)
    count, choices = _FEW if len(there) <= _FEW_ROWS else _MANY
    places = [(layer, byte) for layer, signs in rows.signs.items() for byte in range(signs.shape[1])]
    rng = np.random.default_rng(seed)
    N, found = len(rows.sequence_ids), np.empty(0, np.int64)
    for _ in range(choices):
        key = np.zeros(len(there), np.uint32)
        for place in rng.choice(len(places), min(count, len(places)), replace=False).tolist():
            layer, byte = places[place]
            key = (key << np.uint32(8)) | rows.signs[layer][there, byte].astype(np.uint32)
        order = np.argsort(key, kind="stable")
        alike, ordered = there[order], key[order]
        # Rows with one key stand together, ascending.
        pairs = [
            alike[:-step][same] * N + alike[step:][same]
            for step in range(1, min(_NEXT, len(alike) - 1) + 1)
            if (same := ordered[:-step] == ordered[step:]).any()
        ]
        found = np.unique(np.concatenate([found, *pairs]))
    return np.stack([found // max(N, 1), found % max(N, 1)], axis=1)


def _cosines(rows: _Codes, pairs: Pairs) -> NDArray[np.float64]:
    one, other = pairs.T
    products, squares = np.zeros(len(pairs)), np.zeros((2, len(pairs)))
    for layer, codes in rows.codes.items():
        norms, scales = rows.norms[layer].astype(np.float64), rows.scales[layer].astype(np.float64)
        if rows.bits == 1:
            differ = np.bitwise_count(codes[one] ^ codes[other]).sum(axis=1, dtype=np.int64) / (8 * codes.shape[1])
            products += norms[one] * norms[other] * np.cos(np.pi * differ)
        else:
            inner = np.einsum("nd,nd->n", codes[one].astype(np.float32), codes[other].astype(np.float32))
            products += inner * scales[one] * scales[other]
        squares += np.square(norms[one]), np.square(norms[other])
    return products / np.sqrt(squares[0] * squares[1])
