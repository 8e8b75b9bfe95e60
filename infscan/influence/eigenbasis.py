"""Eigenbases of A and S, and the corrected eigenvalues Lambda in them (docs/method.md#ek-fac, steps 3 and 4)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from infscan.errors import FactorsError
from infscan.influence.blocks import BlockDiagonal

# Entries of rotated gradients held at once in the Lambda pass: on a GPU, which wants few and large kernels (float32:
# 256 MiB), and on a CPU, whose cache is to keep them (4 MiB).
_CHUNK_ENTRIES, _CACHED_ENTRIES = 1 << 26, 1 << 20


def eigenbasis(moment: BlockDiagonal, name: str) -> tuple[Tensor, BlockDiagonal]:
    """Eigenvalues [n] (ascending in each block) and eigenvectors [n, n] (columns) of a second moment, block by block.

    Symmetrised, decomposed in float64, returned in the dtype given: one block at a time is held in float64.

    Raises:
        FactorsError: where an entry is NaN or infinite; `name` says which factor of which layer.
    """
    check_finite(moment.blocks, name)
    values, vectors = zip(*map(_eigh, moment.blocks), strict=True)
    return torch.cat(values), BlockDiagonal(vectors)


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


def _eigh(block_kk: Tensor) -> tuple[Tensor, Tensor]:
    wide = block_kk.to(torch.float64)
    values, vectors = torch.linalg.eigh((wide + wide.T) / 2)
    return values.to(block_kk.dtype), vectors.to(block_kk.dtype)


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
