"""The Fisher matrix of all tracked layers together, dense: for models of a few thousand tracked parameters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from infscan.corpus import sequences as corpus
from infscan.errors import ConfigError
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.model.losses import Loss
from infscan.model.measure import next_tokens, uniforms
from infscan.model.worker import ModelWorker

# Pseudo-gradients multiplied at once: enough to keep a matrix product busy.
_ROWS = 2048


def check_size(parameters: int, max_bytes: int) -> None:
    """Raises ConfigError where the matrix, and a factor of it in float64, would need more than `max_bytes`."""
    need = 16 * parameters**2
    if need > max_bytes:
        raise ConfigError(
            f"The dense Fisher matrix of {parameters:,} tracked parameters and its factor need {need / 2**30:.1f} GiB, "
            f"more than {max_bytes / 2**30:.1f}; use truth.coordinates=ekfac, or track fewer layers "
            "(model.tracked=<regex>)."
        )


def sampled_fisher(
    rank: ModelWorker, sequences: Sequence[corpus.Sequence], *, draws: int, seed: int, tokens_per_batch: int
) -> Tensor:
    """(1 / (N draws)) sum of g g^T over sequences and draws, g [P] a summed pseudo-gradient: [P, P], float64.

    Labels are drawn from the model at every position that predicts a token; they depend on (seed, draw, sequence,
    position) alone. Its expectation is G (`gauss_newton`, but for the last position); parameters are in the order of
    `gauss_newton.join`.
    """
    size = sum(layer.size for layer in rank.layers)
    # Summed in the model's own width: what this matrix is for needs no more, and its products are most of the time.
    total_pp = torch.zeros(size, size, dtype=rank.wide, device=rank.device)
    waiting: list[Tensor] = []

    def flush() -> None:
        g_np = torch.cat(waiting)
        total_pp.addmm_(g_np.T, g_np)
        waiting.clear()

    for batch in rank.batches(sequences, tokens_per_batch):
        labels_bt, weights_bt = next_tokens(batch.ids_bt, batch.mask_bt)
        ids = np.asarray([sequences[row].sequence_id for row in batch.rows], np.int64)
        for draw in range(draws):
            numbers_bt = rank.to_device(uniforms(seed + draw, ids, batch.ids_bt.shape[1]))
            none_b = torch.zeros(len(batch.ids_bt), 1, dtype=rank.model.dtype, device=rank.device)
            by_layer = {layer.name: none_b.expand(-1, layer.size) for layer in rank.layers if layer.stack}

            def consume(
                layer: Layer, s: Tensor, a: Tensor, routed: Routed | None, into: dict[str, Tensor] = by_layer
            ) -> None:
                g_boi = s.transpose(1, 2) @ a if routed is None else routed.gradients(s, a)
                into[layer.name] = g_boi.flatten(1)

            rank.backward(batch, rank.layers, Loss(labels_bt, weights_bt, numbers_bt), consume)
            waiting.append(torch.cat([by_layer[layer.name] for layer in rank.layers], dim=1).to(rank.wide))
            if sum(map(len, waiting)) >= _ROWS:
                flush()
    if waiting:
        flush()
    return total_pp.to(torch.float64) / (draws * len(sequences))
