"""Codes as an index stores them, in bits or bytes, and their inner products with queries.

A stored layer is a scale and integers c, whose values are scale * c. One bit a coordinate is its sign, c = +-1; eight
are a multiple of the largest coordinate, c from -127 to 127.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from infscan.influence.counting import counter

Bits = Literal[1, 8]
# int32 sums of products of two bytes: D may be so large.
_MOST_COORDINATES = (2**31 - 1) // 127**2
# Whole numbers up to here are exact in float32.
_EXACT = 1 << 24
# With so few queries, bits are counted and not unpacked where numpy counts.
_FEW = 3
# Of a query's weights where a row has signs: odd numbers of four bits, or where these lose more than this share of its
# square (a few large coordinates, which signs lose the more), of eight. A sign itself loses a third of a row's.
_LARGEST_ODD, _LARGEST_BYTE, _LOST = 15, 127, 0.02
# Steps that are tried for such weights, in shares of that which cuts nothing off.
_STEPS = np.geomspace(1, 0.1, 12, dtype=np.float32)
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
    """Queries' side of one layer: v is near step_q w_q, w from -127 to 127; odd where rows have signs.

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
        """Round v query by query.

        Eight bits: an error of at most 1/254 of the query's largest coordinate. One bit: with the step of least squared
        error among a few, since a large coordinate is better cut off than all others rounded coarsely; then with that
        for which <v, step w> = |v|^2: over rotations the inner product with any row is unbiased, as of `store`.
        """
        D = v_qd.shape[1]
        assert D <= _MOST_COORDINATES, f"{D} coordinates"
        if bits == 1:
            w_qd, lost_q = _odd_weights(v_qd, _LARGEST_ODD)
            w_qd = np.where((lost_q > _LOST)[:, None], _odd_weights(v_qd, _LARGEST_BYTE)[0], w_qd)
            squares = np.einsum("qd,qd->q", v_qd, v_qd, dtype=np.float64)
            steps = _ratio(squares, np.einsum("qd,qd->q", v_qd, w_qd, dtype=np.float64))
        else:
            steps = np.abs(v_qd).max(axis=1) / np.float32(127)
            w_qd = np.rint(v_qd / np.where(steps > 0, steps, 1)[:, None])
        w_qd = w_qd.astype(np.int8)
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
        """Of one bit: [Q, P, b], the k-th bits of (w + 2^P - 1) / 2, P = 4 or 8, packed as codes are; zero, as codes
        are, beyond D."""
        P = 4 if np.abs(self.weights).max(initial=0) <= _LARGEST_ODD else 8
        u_kq = np.where(self.weights == 0, 0, (self.weights.astype(np.int16) + (1 << P) - 1) >> 1)
        u_jbq = u_kq.astype(np.uint8).reshape(8, -1, self.weights.shape[1])
        planes = np.zeros((u_jbq.shape[2], P, u_jbq.shape[1]), np.uint8)
        for k in range(P):
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
    scores_nq = np.zeros((len(codes), len(queries.steps)), np.float32)
    add_inner_products(scores_nq, codes, scales, queries, scratch)
    return scores_nq


def add_inner_products(
    scores_nq: NDArray[np.float32],
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
    queries: QueryCodes,
    scratch: NDArray[np.uint8] | None = None,
) -> None:
    """scores += `inner_products`, in place: the same bits, however they are multiplied."""
    if queries.bits == 8:
        sums_nq = _products(codes, queries.weights, _LARGEST_BYTE**2)
    elif counts_bits(queries):
        # c = 2 bit - 1, and w is the sum of 2^p (2 bit_p - 1): where bits differ, 2^p is taken off, else added.
        words, planes = _in_words(codes, queries)
        most = ((1 << planes.shape[1]) - 1) * queries.D
        if add := counter():
            add(words, planes, scales, queries.steps, most, scores_nq)
            return
        sums_nq = most - 2 * _differing(words, planes)
    else:
        sums_nq = 2 * _products(unpacked(codes, scratch), queries.weights, _LARGEST_BYTE) - queries.sums
    scores_nq += sums_nq.astype(np.float32) * (scales[:, None] * queries.steps)


def counts_bits(queries: QueryCodes) -> bool:
    """Whether rows stay packed: then no scratch is needed, and any number of rows goes at once."""
    return queries.bits == 1 and (counter() is not None or len(queries.steps) <= _FEW)


def _odd_weights(v_qd: NDArray[np.float32], largest: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The nearest odd numbers of at most this size, with the best step of a few, and what share of |v|^2 they lose."""
    longest = np.abs(v_qd).max(axis=1) / np.float32(largest)
    longest = np.where(longest > 0, longest, 1).astype(np.float32)
    best_qd, least_q = np.empty_like(v_qd), np.full(len(v_qd), np.inf)
    for share in _STEPS:
        step = (share * longest)[:, None]
        w_qd = (2 * np.floor(v_qd / (2 * step)) + 1).clip(-largest, largest)
        lost_q = ((v_qd - step * w_qd) ** 2).sum(axis=1, dtype=np.float64)
        better = lost_q < least_q
        best_qd[better], least_q[better] = w_qd[better], lost_q[better]
    return best_qd, _ratio(least_q, np.einsum("qd,qd->q", v_qd, v_qd, dtype=np.float64))


def _products(left_nk: NDArray[np.uint8], weights_kq: NDArray[np.int8], largest: int) -> NDArray[np.int32]:
    """Of signed bytes, products at most `largest` in size, summed exactly.

    A CPU whose products of bytes are slower than those of float32 (without AVX-512, by thirty times) multiplies so many
    coordinates at a time that no sum leaves float32's whole numbers.
    """
    with warnings.catch_warnings():
        # What is mapped or shared cannot be written to, and is not.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        left, right = torch.from_numpy(left_nk.view(np.int8)), torch.from_numpy(weights_kq)
    if _multiplies_bytes():
        return np.asarray(torch._int_mm(left, right).numpy(), np.int32)
    at_once = _EXACT // largest
    sums = [
        (one.float() @ other.float()).to(torch.int32)
        for one, other in zip(left.split(at_once, dim=1), right.split(at_once), strict=True)
    ]
    return np.asarray(torch.stack(sums).sum(dim=0, dtype=torch.int32).numpy(), np.int32)


@cache
def _multiplies_bytes() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def _in_words(codes: NDArray[np.uint8], queries: QueryCodes) -> tuple[NDArray[Any], NDArray[Any]]:
    """Codes and planes as the widest words that their bytes are whole numbers of."""
    b = codes.shape[1]
    wide = next(kind for kind in (np.uint64, np.uint32, np.uint16, np.uint8) if b % np.dtype(kind).itemsize == 0)
    return np.ascontiguousarray(codes).view(wide), queries.planes.view(wide)


def _differing(words: NDArray[Any], planes: NDArray[Any]) -> NDArray[np.int32]:
    """The sum over planes p of 2^p times how many bits of a row differ from the plane's: [n, Q]."""
    sums_nq = np.empty((len(words), len(planes)), np.int32)
    differ, counts = np.empty_like(words), np.empty(words.shape, np.uint8)
    # At most 64 bits of a word times 255.
    weighed = np.empty(words.shape, np.uint16)
    for query, mine in enumerate(planes):
        weighed[:] = 0
        for plane in mine[::-1]:
            np.bitwise_xor(words, plane, out=differ)
            np.bitwise_count(differ, out=counts)
            np.left_shift(weighed, 1, out=weighed)
            np.add(weighed, counts, out=weighed)
        sums_nq[:, query] = weighed.sum(axis=1, dtype=np.int32)
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
