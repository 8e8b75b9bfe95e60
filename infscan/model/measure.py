"""Losses of training sequences, pseudo-labels of the Fisher, and measurements of queries (docs/method.md#losses)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy


def next_tokens(ids_bt: Tensor, mask_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and weights of a training sequence's loss L(z) = sum over t >= 1 of -log p(x_t | x_<t).

    ids_bt, mask_bt: [B, T]. Returns targets int64 [B, T] (by the input position that predicts them) and weights [B, T]
    bool; the last token and padding predict nothing.
    """
    targets_bt = torch.zeros_like(ids_bt)
    targets_bt[:, :-1] = ids_bt[:, 1:]
    weights_bt = torch.zeros_like(mask_bt)
    weights_bt[:, :-1] = mask_bt[:, 1:]
    return targets_bt, weights_bt


def predicting(loss_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """The positions that predict a token with a loss, and a sequence's last one where its own token has: bool [B, T].

    loss_bt, mask_bt: [B, T] bool, on tokens. Where every token has a loss these are all positions that are not padding.
    """
    ahead_bt, follows_bt = torch.zeros_like(loss_bt), torch.zeros_like(mask_bt)
    ahead_bt[:, :-1] = loss_bt[:, 1:]
    follows_bt[:, :-1] = mask_bt[:, 1:]
    return torch.where(follows_bt, ahead_bt, loss_bt)


def summed_losses(logits_btv: Tensor, targets_bt: Tensor, weights_bt: Tensor) -> Tensor:
    """Each sequence's weighted sum of -log p(target), nats, float32 or wider: [B].

    logits_btv: [B, T, V]; weights_bt: [B, T] bool or signed float.
    """
    wide = torch.promote_types(logits_btv.dtype, torch.float32)
    losses = cross_entropy(logits_btv.flatten(0, 1).to(wide), targets_bt.flatten(), reduction="none")
    return (losses.view_as(targets_bt) * weights_bt.to(wide)).sum(dim=1)


def uniforms(seed: int, sequence_ids: NDArray[np.int64], T: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) keyed by (seed, sequence id, position): [B, T], whatever the batch, the worker or the order.

    A counter-based generator: three rounds of splitmix64's finaliser over the key.
    """
    positions = np.arange(T, dtype=np.uint64)[None, :]
    key = _mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + np.zeros((1, 1), np.uint64))
    key = _mix(key ^ sequence_ids.astype(np.uint64)[:, None])
    key = _mix(key ^ positions)
    return (key >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def sample_labels(p_mv: Tensor, uniforms_m: Tensor) -> Tensor:
    """Labels drawn from the model's distributions by inverting their sums: int64 [M].

    p_mv: probabilities [M, V], float32 or wider, summed in float64; uniforms_m: float64 [M] in [0, 1). So A, S
    and Lambda are of the Fisher and not of the empirical one (docs/method.md#ek-fac, step 1).
    """
    cumulative_mv = p_mv.cumsum(dim=-1, dtype=torch.float64)
    wanted_m1 = uniforms_m[:, None] * cumulative_mv[:, -1:]
    return torch.searchsorted(cumulative_mv, wanted_m1, right=True).squeeze(-1).clamp_max_(p_mv.shape[-1] - 1)
