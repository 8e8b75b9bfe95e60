"""Eigenbases of A and S, and the corrected eigenvalues Lambda in them (docs/method.md#ek-fac, steps 3 and 4)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from infscan.errors import FactorsError
from infscan.influence.blocks import BlockDiagonal

# Entries of rotated gradients held at once in the Lambda pass: on a GPU, which wants few and large kernels (float32:
# 256 MiB), and on a CPU, whose cache is to keep them (4 MiB).
_CHUNK_ENTRIES, _CACHED_ENTRIES = 1 << 26, 1 << 20


# torch's LAPACK counts in 32 bits: the workspace of a wider matrix, 1 + 6 n + 2 n^2 numbers, is more than they say.
_WIDEST_32 = 32766
# Bytes that decomposing an n x n matrix holds at most, in n^2: measured (float32 in, float64 inside).
BYTES_PER_ENTRY = 41
# From this width on, one thread takes minutes. As many on every machine: a layer's bits are not to depend on it.
_WIDE, _THREADS = 8192, 8


def eigenbasis(moment: BlockDiagonal, name: str, device: str = "cpu") -> tuple[Tensor, BlockDiagonal]:
    """Eigenvalues [n] (ascending in each block) and eigenvectors [n, n] (columns) of a second moment, block by block.

    Symmetrised, decomposed in float64, returned in the dtype given, on the CPU: one block at a time is held in float64.
    device: where it is decomposed; a GPU whose memory a block does not fit, or whose solver finds no answer, leaves it
    to the CPU.

    Raises:
        FactorsError: where an entry is NaN or infinite; `name` says which factor of which layer.
    """
    check_finite(moment.blocks, name)
    values, vectors = zip(*(_eigh(block, device) for block in moment.blocks), strict=True)
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


def _eigh(block_kk: Tensor, device: str) -> tuple[Tensor, Tensor]:
    if device != "cpu":
        try:
            return _decomposed(_on_device(block_kk, device))
        except (torch.OutOfMemoryError, torch.linalg.LinAlgError):
            torch.cuda.empty_cache()
        except RuntimeError as error:
            # Without room for a handle or a workspace of its own, the library says so in words of its own.
            if "cusolver" not in str(error).lower():
                raise
    return _decomposed(block_kk.cpu())


def _on_device(block_kk: Tensor, device: str) -> Tensor:
    return block_kk.to(device)


def _decomposed(block_kk: Tensor) -> tuple[Tensor, Tensor]:
    wide = block_kk.to(torch.float64)
    symmetric = (wide + wide.T) / 2
    if symmetric.is_cpu and len(symmetric) > _WIDEST_32:
        del wide
        values, vectors = map(torch.from_numpy, np.linalg.eigh(symmetric.numpy()))
    else:
        values, vectors = torch.linalg.eigh(symmetric)
    return values.to("cpu", block_kk.dtype), vectors.to("cpu", block_kk.dtype)


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
    s_bto, a_bti = s_bto.to(Lambda_oi.dtype), a_bti.to(Lambda_oi.dtype)
    B, T, O = s_bto.shape
    I = Lambda_oi.shape[1]
    tokens_first = rotate_tokens_first(T, O, I)
    # A 1 on padding, where s is zero, adds nothing.
    ones = a_bti.shape[-1] == I
    if tokens_first:
        s_bto, a_bti = s_bto @ Q_S, a_bti @ Q_A if ones else Q_A.rotate_with_one(a_bti)
    elif not ones:
        a_bti = pad(a_bti, (0, 1), value=1.0)
    entries = _CACHED_ENTRIES if Lambda_oi.is_cpu else _CHUNK_ENTRIES
    chunk = min(B, max(1, entries // Lambda_oi.numel()))
    g_coi = Lambda_oi.new_empty(chunk, O, I)
    for start in range(0, B, chunk):
        s_cto, a_cti = s_bto[start : start + chunk], a_bti[start : start + chunk]
        g_boi = torch.bmm(s_cto.transpose(1, 2), a_cti, out=g_coi[: len(s_cto)])
        if not tokens_first:
            g_boi = Q_S.T @ g_boi @ Q_A
        # One alone is squared and added in one pass over the cache: 3 to 6 % of the whole, measured at 2048 x 513.
        if len(g_boi) == 1:
            Lambda_oi.addcmul_(g_boi[0], g_boi[0])
        else:
            Lambda_oi += g_boi.square_().sum(dim=0)
