"""A few scores taken apart: by layer and input position, and by the sequence's own tokens (METHOD: token influence).

With P = (G + lambda)^-1 grad(-f), theta' = theta - eps P, and a sequence's loss L = sum over its tokens of
l_t = -log p(x_t | x_<t), G23's appendix B (Grosse et al. 2023, arXiv 2308.03296) has two influences of single tokens:

    of x_t as an output:   d/d eps log p(x_t; theta') = <P, grad l_t>                      they sum to the score
    of x_t as an input:    d/d eps <e_t, grad_{e_t} log p(z; theta')> = <e_t, grad_{e_t} <P, grad L>>

e_t: the token's embedding, scaled by 1 + delta, so that <e_t, grad_{e_t} .> is the derivative with respect to delta.
The paper takes difference quotients over eps; here both are exact. With a weight u_t = 1 on every l_t,

    h(u, e) = <P, grad L> = sum over layers and positions of s^T P a,       output: dh/du_t,     input: <e_t, dh/de_t>

s and a of a backward that is itself recorded, so that one further backward of h gives both, for all tokens at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from infscan.corpus.batches import pad_positions
from infscan.corpus.sequences import Sequence
from infscan.influence.covariance import with_ones
from infscan.influence.layers import Layer
from infscan.influence.score import score_tokens
from infscan.model.capture import capturing
from infscan.passes.queries import Inverse, preconditioned
from infscan.passes.rank import Batch, Rank
from infscan.passes.refine import pairs_of, score_pairs
from infscan.queries import Query

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ExplainTask:
    """Some sequences against a group of queries, for a group of layers.

    wanted: by sequence, indices into `queries`. own_tokens: whether the influences of the sequence's own tokens are
    asked for; they take a whole model on one rank.
    """

    group: str
    queries: tuple[Query, ...]
    layers: tuple[Layer, ...]
    inverse: Inverse
    sequences: tuple[Sequence, ...]
    wanted: tuple[tuple[int, ...], ...]
    tokens_per_batch: int
    own_tokens: bool


@dataclass(frozen=True)
class Explained:
    """One (query, sequence), float64; groups of layers add up, their rows of `matrix_lt` one after another.

    matrix_lt: [layers, T], by layer and input position; all of it is the score. output_t: of token t as an output, 0
    for one without a loss; input_t: as an input. Both None where not asked for.
    """

    matrix_lt: Floats
    output_t: Floats | None
    input_t: Floats | None

    @property
    def score(self) -> float:
        return float(self.matrix_lt.sum())


def explain_task(rank: Rank, task: ExplainTask) -> list[Explained]:
    """Every wanted pair, in the order of `pairs_of(task.wanted)`; right on rank 0 of a group."""
    P = rank.cached("full-rank", task.group, lambda: preconditioned(rank, task.queries, task.layers, task.inverse))
    pairs = pairs_of(task.wanted)
    longest = max(len(sequence) for sequence in task.sequences)
    matrix_nlt = torch.zeros(len(pairs), len(task.layers), longest, dtype=torch.float64, device=rank.device)
    column = {layer.name: index for index, layer in enumerate(task.layers)}

    def keep(layer: Layer, pairs_n: Tensor, scores_nt: Tensor) -> None:
        matrix_nlt[pairs_n, column[layer.name], : scores_nt.shape[1]] = scores_nt.to(torch.float64)

    score_pairs(rank, task.sequences, task.wanted, task.layers, P, task.tokens_per_batch, keep)
    matrices = rank.reduce(matrix_nlt).cpu().numpy()
    own: list[tuple[Floats | None, Floats | None]] = [(None, None)] * len(pairs)
    if task.own_tokens:
        own = [
            both
            for sequence, queries in zip(task.sequences, task.wanted, strict=True)
            for both in own_tokens(rank, sequence, task.layers, P, queries)
        ]
    return [
        Explained(matrices[index, :, : len(task.sequences[row])], *own[index]) for index, (row, _) in enumerate(pairs)
    ]


def own_tokens(
    rank: Rank, sequence: Sequence, layers: Sequences[Layer], P: Mapping[str, Tensor], queries: Sequences[int]
) -> list[tuple[Floats, Floats]]:
    """(output_t, input_t) of one sequence for each of the queries. P: [Q, O, I] by layer, full rank."""
    ids_1t = rank.to_device(sequence.token_ids[None, :])
    mask_1t = torch.ones_like(ids_1t, dtype=torch.bool)
    loss_1t = None if sequence.loss is None else rank.to_device(sequence.loss[None, :])
    loss = Batch(np.arange(1), ids_1t, mask_1t, loss_bt=loss_1t).loss()
    targets_1t, counted_1t = loss.labels_bt, loss.weights_bt
    positions = pad_positions([sequence.starts], len(sequence))
    positions_1t = None if positions is None else rank.to_device(positions)
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    embedded: list[Tensor] = []

    def consume(layer: Layer, a_bti: Tensor, s_bto: Tensor) -> None:
        kept[layer.name] = s_bto, with_ones(a_bti, mask_1t, bias=layer.bias)

    def on_embedding(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
        embedded.append(out)

    # Attention in plain operations: the backward of its fused kernels has no derivative.
    with sdpa_kernel(SDPBackend.MATH), capturing(rank.model.module, layers, consume, detached=False):
        handle = rank.model.module.get_input_embeddings().register_forward_hook(on_embedding)
        try:
            logits_1tv = rank.model.logits(ids_1t, positions_1t)
        finally:
            handle.remove()
        losses_t = cross_entropy(logits_1tv[0].to(rank.wide), targets_1t[0], reduction="none")
        # By the position that predicts: u_t weighs the loss of token t + 1.
        u_t = counted_1t[0].to(rank.wide).requires_grad_(True)
        torch.autograd.grad((u_t * losses_t).sum(), embedded, create_graph=True)
    # A copy: the backward of h runs through the same outputs, whose hooks then give other gradients.
    recorded = [(layer.name, *kept[layer.name]) for layer in layers]
    found = []
    for query in queries:
        h = torch.stack([score_tokens(s_1to, a_1ti, P[name][query]).sum() for name, s_1to, a_1ti in recorded]).sum()
        by_u_t, by_e_1te = torch.autograd.grad(h, [u_t, embedded[0]], retain_graph=True)
        output_t = np.zeros(len(sequence))
        output_t[1:] = torch.where(counted_1t[0], by_u_t, 0)[:-1].to(torch.float64).cpu().numpy()
        input_t = (by_e_1te[0].to(torch.float64) * embedded[0][0].detach()).sum(dim=-1)
        found.append((output_t, input_t.cpu().numpy()))
    return found
