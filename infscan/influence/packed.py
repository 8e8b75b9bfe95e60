"""Codes as an index stores them, in bits or bytes, and their inner products with queries.

A stored layer is a scale and integers c, whose values are scale * c. One bit a coordinate is its sign, c = +-1; eight
are a multiple of the largest coordinate, c from -127 to 127.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

Bits = Literal[1, 8]
# int32 sums of products of two bytes: D may be so large.
_MOST_COORDINATES = (2**31 - 1) // 127**2
# Whole numbers up to here are exact in float32.
_EXACT = 1 << 24
# With so few queries, bits are counted and not unpacked.
_FEW = 3
# Of the two-byte floats that norms are stored as.
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Stored:
    """One layer of some rows.

    codes: uint8 [n, ceil(D bits / 8)], bits from the lowest on, signed bytes otherwise. scales: float32 [n], zero where
    a row has no finite code. rms: float16 [n], |u| / sqrt(O I): as |u|^2 estimates the squared norm of the whitened
    gradient, this is about 1 for a common row. left_out: float16 [n], |u - scale c| / |u|, what quantisation lost.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    rms: NDArray[np.float16]
    left_out: NDArray[np.float16]


def store(u_nd: NDArray[np.float32], bits: Bits, entries: int) -> Stored:
    """Quantise codes, [n, D] float32. entries: O I of the layer.

    One bit: scale = |u|^2 / |u|_1, with which <u, scale c> = |u|^2: over rotations of the code the inner product with
    any query is unbiased (Gao and Long 2024, RaBitQ, theorem 3.2). Eight: scale = max |u| / 127. Rows with a NaN or an
    infinity are stored with scale zero.
    """
    u_nd = np.where(np.isfinite(u_nd).all(axis=1, keepdims=True), u_nd, np.float32(0))
    squares = np.einsum("nd,nd->n", u_nd, u_nd, dtype=np.float64)
    if bits == 1:
        scales = _ratio(squares, np.abs(u_nd).sum(axis=1, dtype=np.float64))
        c_nd = np.where(u_nd < 0, np.float32(-1), np.float32(1))
        codes = np.packbits(u_nd >= 0, axis=1, bitorder="little")
    else:
        scales = np.abs(u_nd).max(axis=1) / np.float64(127)
        c_nd = np.rint(u_nd / np.where(scales > 0, scales, 1)[:, None].astype(np.float32))
        codes = c_nd.astype(np.int8).view(np.uint8)
    left = u_nd - scales[:, None].astype(np.float32) * c_nd
    return Stored(
        codes,
        scales.astype(np.float32),
        np.minimum(np.sqrt(squares / entries), _LARGEST).astype(np.float16),
        np.sqrt(_ratio(np.einsum("nd,nd->n", left, left, dtype=np.float64), squares)).astype(np.float16),
    )


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


@dataclass(frozen=True, eq=False)
class QueryCodes:
    """Queries' side of one layer, in bytes: v is near step_q w_q, w from -127 to 127.

    weights: int8 [K, Q], in the order of the coordinates that `unpacked` gives. steps: float32 [Q]. sums: int32 [Q], of
    each query's weights.
    """

    bits: Bits
    D: int
    weights: NDArray[np.int8]
    steps: NDArray[np.float32]
    sums: NDArray[np.int32]

    @staticmethod
    def of(v_qd: NDArray[np.float32], bits: Bits) -> QueryCodes:
        """Round v to bytes, query by query: an error of at most 1/254 of a query's largest coordinate."""
        D = v_qd.shape[1]
        assert D <= _MOST_COORDINATES, f"{D} coordinates"
        steps = np.abs(v_qd).max(axis=1) / np.float32(127)
        w_qd = np.rint(v_qd / np.where(steps > 0, steps, 1)[:, None]).astype(np.int8)
        sums = w_qd.sum(axis=1, dtype=np.int32)
        if bits == 1:
            # Coordinate 8 b + j is bit j of byte b: all lowest bits first, then all second ones, ...
            w_qd = np.pad(w_qd, ((0, 0), (0, -D % 8)))
            w_qd = w_qd.reshape(len(w_qd), -1, 8).transpose(0, 2, 1).reshape(len(w_qd), -1)
        return QueryCodes(bits, D, np.ascontiguousarray(w_qd.T), steps.astype(np.float32), sums)

    @staticmethod
    def joined(parts: Sequence[QueryCodes]) -> QueryCodes:
        """Several groups of queries, one after the other."""
        weights, steps, sums = (
            np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in ("weights", "steps", "sums")
        )
        return QueryCodes(parts[0].bits, parts[0].D, weights, steps, sums)

    @cached_property
    def planes(self) -> NDArray[np.uint8]:
        """Of one bit: [Q, 8, b], the k-th bits of w + 128, packed as codes are."""
        u_jbq = (self.weights.astype(np.int16) + 128).astype(np.uint8).reshape(8, -1, self.weights.shape[1])
        planes = np.zeros((u_jbq.shape[2], 8, u_jbq.shape[1]), np.uint8)
        for k in range(8):
            for j in range(8):
                planes[:, k] |= (((u_jbq[j] >> k) & 1) << j).T
        return planes

    @property
    def values(self) -> NDArray[np.float32]:
        """v as it is multiplied with, [Q, D]."""
        w_qk = self.weights.T
        if self.bits == 1:
            w_qk = w_qk.reshape(len(w_qk), 8, -1).transpose(0, 2, 1).reshape(len(w_qk), -1)[:, : self.D]
        return self.steps[:, None] * w_qk.astype(np.float32)


def inner_products(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], queries: QueryCodes, scratch: NDArray[np.uint8] | None = None
) -> NDArray[np.float32]:
    """<v_q, scale_n c_n> of every row and query: [n, Q] float32, the integers summed exactly.

    scratch: uint8 [at least n, K], where bits are unpacked; it may be used again for the next rows.
    """
    if queries.bits == 1:
        few = len(queries.steps) <= _FEW
        # c = 2 bit - 1.
        sums_nq = _counted(codes, queries) if few else _products(unpacked(codes, scratch), queries.weights, 1)
        sums_nq = 2 * sums_nq - queries.sums
    else:
        sums_nq = _products(codes, queries.weights, 127)
    return sums_nq.astype(np.float32) * (scales[:, None] * queries.steps)


def _products(left_nk: NDArray[np.uint8], weights_kq: NDArray[np.int8], largest: int) -> NDArray[np.int32]:
    """Of signed bytes, the left ones at most `largest` in size, summed exactly.

    A CPU whose products of bytes are slower than those of float32 (without AVX-512, by thirty times) multiplies so many
    coordinates at a time that no sum leaves float32's whole numbers.
    """
    with warnings.catch_warnings():
        # What is mapped or shared cannot be written to, and is not.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        left, right = torch.from_numpy(left_nk.view(np.int8)), torch.from_numpy(weights_kq)
    if _multiplies_bytes():
        return np.asarray(torch._int_mm(left, right).numpy(), np.int32)
    at_once = _EXACT // (127 * largest)
    sums = [
        (one.float() @ other.float()).to(torch.int32)
        for one, other in zip(left.split(at_once, dim=1), right.split(at_once), strict=True)
    ]
    return np.asarray(torch.stack(sums).sum(dim=0, dtype=torch.int32).numpy(), np.int32)


@cache
def _multiplies_bytes() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _counted(codes: NDArray[np.uint8], queries: QueryCodes) -> NDArray[np.int32]:
    """Sums of w over set bits, [n, Q]: plane by plane of w + 128, the bits that both have are counted."""
    b = codes.shape[1]
    wide = next(kind for kind in (np.uint64, np.uint32, np.uint16, np.uint8) if b % np.dtype(kind).itemsize == 0)
    words, planes = np.ascontiguousarray(codes).view(wide), queries.planes.view(wide)
    both, counts = np.empty_like(words), np.empty(words.shape, np.uint8)
    set_n = np.bitwise_count(words, out=counts).sum(axis=1, dtype=np.int32)
    sums_nq = np.empty((len(codes), len(planes)), np.int32)
    # At most 64 bits of a word times 255.
    weighed = np.empty(words.shape, np.uint16)
    for query, mine in enumerate(planes):
        weighed[:] = 0
        for plane in mine[::-1]:
            np.bitwise_and(words, plane, out=both)
            np.bitwise_count(both, out=counts)
            np.left_shift(weighed, 1, out=weighed)
            np.add(weighed, counts, out=weighed)
        sums_nq[:, query] = weighed.sum(axis=1, dtype=np.int32) - 128 * set_n
    return sums_nq


def unpacked(codes: NDArray[np.uint8], scratch: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Bits as bytes 0 and 1, [n, 8 b] from [n, b]: every byte's lowest bit first, then every byte's second, ..."""
    n, b = codes.shape
    out = np.empty((n, 8 * b), np.uint8) if scratch is None else scratch.reshape(-1)[: n * 8 * b].reshape(n, 8 * b)
    for bit in range(8):
        plane = out[:, bit * b : (bit + 1) * b]
        np.right_shift(codes, bit, out=plane)
        np.bitwise_and(plane, 1, out=plane)
    return out
