"""The influence of a sequence's own tokens, as outputs and as inputs (docs/method.md#margins).

With P = (G + lambda)^-1 grad(-f), theta' = theta - eps P, and a sequence's loss L = sum over its tokens of
l_t = -log p(x_t | x_<t), Grosse et al. 2023 (appendix B.1) have two influences of single tokens:

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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from infscan.corpus.batches import pad_positions
from infscan.corpus.sequences import Sequence
from infscan.influence.covariance import with_ones
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.influence.score import score_tokens
from infscan.model.attention_blocks import TwiceDifferentiable
from infscan.model.capture import capturing
from infscan.model.worker import Batch, ModelWorker

Floats = NDArray[np.float64]


def own_tokens(
    worker: ModelWorker, sequence: Sequence, layers: Sequences[Layer], P: Mapping[str, Tensor], queries: Sequences[int]
) -> list[tuple[Floats, Floats]]:
    """(output_t, input_t) of one sequence for each of the queries. P: [Q, O, I] by layer, full rank."""
    ids_1t = worker.to_device(sequence.token_ids[None, :])
    mask_1t = torch.ones_like(ids_1t, dtype=torch.bool)
    loss_1t = None if sequence.loss is None else worker.to_device(sequence.loss[None, :])
    loss = Batch(np.arange(1), ids_1t, mask_1t, loss_bt=loss_1t).loss()
    targets_1t, counted_1t = loss.labels_bt, loss.weights_bt
    positions = pad_positions([sequence.starts], len(sequence))
    positions_1t = None if positions is None else worker.to_device(positions)
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    embedded: list[Tensor] = []

    def consume(layer: Layer, a: Tensor, s: Tensor, routed: Routed | None) -> None:
        mask = mask_1t if routed is None else routed.of(mask_1t)
        kept[layer.name] = s, with_ones(a, mask, bias=layer.bias)

    def on_embedding(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
        embedded.append(out)

    # The backward of attention's fused kernels has no derivative.
    with TwiceDifferentiable(), capturing(worker.model.module, layers, consume, detached=False):
        handle = worker.model.module.get_input_embeddings().register_forward_hook(on_embedding)
        try:
            logits_1tv = worker.model.logits(ids_1t, positions_1t)
        finally:
            handle.remove()
        losses_t = cross_entropy(logits_1tv[0].to(worker.wide), targets_1t[0], reduction="none")
        # By the position that predicts: u_t weighs the loss of token t + 1.
        u_t = counted_1t[0].to(worker.wide).requires_grad_(True)
        torch.autograd.grad((u_t * losses_t).sum(), embedded, create_graph=True)
    # A copy: the backward of h runs through the same outputs, whose hooks then give other gradients.
    recorded = [(layer.name, *kept[layer.name]) for layer in layers if layer.name in kept]
    if not recorded:
        # Experts alone, and no token goes to any of them.
        return [(np.zeros(len(sequence)), np.zeros(len(sequence))) for _ in queries]
    found = []
    for query in queries:
        h = torch.stack([score_tokens(s_1to, a_1ti, P[name][query]).sum() for name, s_1to, a_1ti in recorded]).sum()
        by_u_t, by_e_1te = torch.autograd.grad(h, [u_t, embedded[0]], retain_graph=True)
        output_t = np.zeros(len(sequence))
        output_t[1:] = torch.where(counted_1t[0], by_u_t, 0)[:-1].to(torch.float64).cpu().numpy()
        input_t = (by_e_1te[0].to(torch.float64) * embedded[0][0].detach()).sum(dim=-1)
        found.append((output_t, input_t.cpu().numpy()))
    return found
