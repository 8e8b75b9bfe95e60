"""Eigenbases of A and S, and the corrected eigenvalues Lambda in them (docs/method.md#ek-fac, steps 3 and 4)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from infscan.errors import FactorsError
from infscan.influence.blocks import BlockDiagonal

log = logging.getLogger("infscan")

# Entries of rotated gradients held at once in the Lambda pass: on a GPU, which wants few and large kernels (float32:
# 256 MiB), and on a CPU, whose cache is to keep them (4 MiB).
_CHUNK_ENTRIES, _CACHED_ENTRIES = 1 << 26, 1 << 20


# torch's LAPACK counts in 32 bits: the workspace of a wider matrix, 1 + 6 n + 2 n^2 numbers, is more than they say.
_WIDEST_32 = 32766
# Bytes that decomposing an n x n matrix holds at most, in n^2: measured (float32 in, float64 inside).
BYTES_PER_ENTRY = 41
# |A Q - Q values| over |A|, and Q's norm: what float64 may leave of a matrix of some ten thousands.
_RESIDUAL = 1e-9
# From this width on, one thread takes minutes. As many on every machine: a layer's bits are not to depend on it.
_WIDE, _THREADS = 8192, 8


def eigenbasis(moment: BlockDiagonal, name: str, device: str = "cpu") -> tuple[Tensor, BlockDiagonal]:
    """Eigenvalues [n] (ascending in each block) and eigenvectors [n, n] (columns) of a second moment, block by block.

    Symmetrised, decomposed in float64, returned in the dtype given, on the CPU: one block at a time is held in float64.
    device: where it is decomposed; a block that a GPU has no room for, or decomposes wrongly, is left to the CPU.

    Raises:
        FactorsError: where an entry is NaN or infinite; `name` says which factor of which layer.
    """
    check_finite(moment.blocks, name)
    values, vectors = zip(*(_eigh(block, device, name) for block in moment.blocks), strict=True)
    return torch.cat(values), BlockDiagonal(vectors)


def check_width(n: int, name: str) -> None:
    """Refuse a matrix that no LAPACK here can decompose, before anything is summed for it.

    Raises:
        FactorsError: for more rows than 32-bit integers allow, where numpy's LAPACK has no others.
    """
    if n > _WIDEST_32 and not _counts_in_64_bits():
        raise FactorsError(
            f"{name} is {n} x {n}, and the LAPACK of torch and numpy here decomposes at most {_WIDEST_32}; give "
            f"factors.blocks={-(-n // _WIDEST_32)}, or install numpy's own wheel, whose LAPACK counts in 64 bits."
        )


def threads_for(n: int) -> int:
    """Threads that decompose an n x n matrix."""
    return _THREADS if n >= _WIDE else 1


def check_finite(tensors: Iterable[Tensor], name: str) -> None:
    """Refuse sums over the factors' corpus that are not finite.

    Raises:
        FactorsError: with the number of such entries; `name` says which factor of which layer.
    """
    bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors)
    if bad:
        raise FactorsError(
            f"{name} has {bad} entries that are NaN or infinite: the model's activations or gradients overflow on the "
            "factors' corpus; use model.dtype=float32, or look at the sequences of factors.corpus."
        )


def _eigh(block_kk: Tensor, device: str, name: str) -> tuple[Tensor, Tensor]:
    dtype = block_kk.dtype
    if device != "cpu":
        try:
            found = decomposed_on(device, block_kk)
        except (torch.OutOfMemoryError, torch.linalg.LinAlgError) as error:
            log.warning("%s is decomposed on the CPU: %s", name, str(error).partition("\n")[0])
        else:
            return found[0].to("cpu", dtype), found[1].to("cpu", dtype)
        # Out of the handler: the traceback, whose frames held the matrix, is gone.
        torch.cuda.empty_cache()
    values, vectors = _decomposed(_symmetric(block_kk.cpu()))
    return values.to(dtype), vectors.to(dtype)


def decomposed_on(device: str, block_kk: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors in float64, on the device, and held against the matrix there: 2 n^3 more.

    Raises:
        torch.OutOfMemoryError: where the device has no room.
        torch.linalg.LinAlgError: where its solver finds none, has no room of its own, or finds something else.
    """
    A_kk = _symmetric(_to(block_kk, device))
    try:
        values_k, Q_kk = _decomposed(A_kk)
    except RuntimeError as error:
        if "cusolver" not in str(error).lower():
            raise
        raise torch.linalg.LinAlgError(str(error)) from None
    wrong = float((A_kk @ Q_kk).sub_(Q_kk * values_k).norm() / A_kk.norm().clamp_min(torch.finfo(A_kk.dtype).tiny))
    stretched = abs(float(Q_kk.norm()) / math.sqrt(len(Q_kk)) - 1)
    # What is not a number is within no limit.
    if not max(wrong, stretched) <= _RESIDUAL:
        raise torch.linalg.LinAlgError(f"the device's eigenvectors miss the matrix by {max(wrong, stretched):.1e}")
    return values_k, Q_kk


def _to(block_kk: Tensor, device: str) -> Tensor:
    return block_kk.to(device)


def _symmetric(block_kk: Tensor) -> Tensor:
    wide = block_kk.to(torch.float64)
    return (wide + wide.T).div_(2)


def _decomposed(A_kk: Tensor) -> tuple[Tensor, Tensor]:
    """Of a GPU's matrix by cusolver, which counts in 64 bits, as torch calls it."""
    if A_kk.is_cpu and len(A_kk) > _WIDEST_32:
        values, vectors = map(torch.from_numpy, np.linalg.eigh(A_kk.numpy()))
        return values, vectors
    found = torch.linalg.eigh(A_kk)
    return found[0], found[1]


@cache
def _counts_in_64_bits() -> bool:
    """Whether numpy's LAPACK takes 64-bit integers, as that of its own wheels does."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return bool(blas.get("has ilp64")) or "USE64BITINT" in blas.get("openblas configuration", "")


def rotate_tokens_first(T: int, O: int, I: int) -> bool:
    """Whether rotating T tokens costs less than rotating the O x I gradient: T < O I (O + I) / (O^2 + I^2).

    Blocks divide both costs by their number.
    """
    return T * (O * O + I * I) < O * I * (O + I)


def add_squared_gradients(
    Lambda_oi: Tensor, s_bto: Tensor, a_bti: Tensor, Q_S: BlockDiagonal, Q_A: BlockDiagonal
) -> None:
    """Lambda += sum over the batch's sequences of (Q_S^T g Q_A)^2, g = sum_t s_t a_t^T the sequence's summed gradient.

    s_bto: [B, T, O], a_bti: [B, T, I], zero on padding; or [B, T, I - 1], the 1 that a bias multiplies left out and
    taken as read. Q_S: [O, O], Q_A: [I, I]. Lambda_oi: [O, I], float32 or wider.
    As sums over sequences: divide by their number at the end (George et al. 2018; Grosse et al. 2023, equations
    20 and 26).
    """
    for _, g_boi in _rotated(Lambda_oi, s_bto, a_bti, Q_S, Q_A):
        # One alone is squared and added in one pass over the cache: 3 to 6 % of the whole, measured at 2048 x 513.
        if len(g_boi) == 1:
            Lambda_oi.addcmul_(g_boi[0], g_boi[0])
        else:
            Lambda_oi += g_boi.square_().sum(dim=0)


def weighted_squares(
    weights_oi: Tensor, s_bto: Tensor, a_bti: Tensor, Q_S: BlockDiagonal, Q_A: BlockDiagonal
) -> Tensor:
    """sum over o, i of weights (Q_S^T g Q_A)^2, of every sequence of the batch: [B]. Arguments as of
    `add_squared_gradients`."""
    found_b = weights_oi.new_zeros(len(s_bto))
    for rows, g_boi in _rotated(weights_oi, s_bto, a_bti, Q_S, Q_A):
        found_b[rows] = g_boi.square_().flatten(1) @ weights_oi.flatten()
    return found_b


def _rotated(
    like_oi: Tensor, s_bto: Tensor, a_bti: Tensor, Q_S: BlockDiagonal, Q_A: BlockDiagonal
) -> Iterator[tuple[slice, Tensor]]:
    """Q_S^T g Q_A of the batch's sequences, [c, O, I] in like_oi's dtype, some at a time, in memory that is used again.

    Arguments as of `add_squared_gradients`; the slice says which sequences they are.
    """
    s_bto, a_bti = s_bto.to(like_oi.dtype), a_bti.to(like_oi.dtype)
    B, T, O = s_bto.shape
    I = like_oi.shape[1]
    tokens_first = rotate_tokens_first(T, O, I)
    # A 1 on padding, where s is zero, adds nothing.
    ones = a_bti.shape[-1] == I
    if tokens_first:
        s_bto, a_bti = s_bto @ Q_S, a_bti @ Q_A if ones else Q_A.rotate_with_one(a_bti)
    elif not ones:
        a_bti = pad(a_bti, (0, 1), value=1.0)
    entries = _CACHED_ENTRIES if like_oi.is_cpu else _CHUNK_ENTRIES
    chunk = min(B, max(1, entries // like_oi.numel()))
    g_coi = like_oi.new_empty(chunk, O, I)
    for start in range(0, B, chunk):
        s_cto, a_cti = s_bto[start : start + chunk], a_bti[start : start + chunk]
        g_boi = torch.bmm(s_cto.transpose(1, 2), a_cti, out=g_coi[: len(s_cto)])
        if not tokens_first:
            g_boi = Q_S.T @ g_boi @ Q_A
        yield slice(start, start + len(s_cto)), g_boi
