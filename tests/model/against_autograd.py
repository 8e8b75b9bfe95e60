"""A worker's scores <P, g> for random P, layer by layer, against plain autograd over each sequence alone, unpadded."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from infscan.corpus.batches import pad
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.influence.score import LayerQueries, score_layer
from infscan.model.experts import is_transposed
from infscan.model.worker import Batch, ModelWorker
from tests.influence.factors import normal

_RNG = np.random.default_rng(0)
SEQUENCES = [_RNG.integers(3, 40, length) for length in (9, 5, 12)]


def worst_error(worker: ModelWorker) -> float:
    """The largest difference of a layer's scores [3], as a share of that layer's largest."""
    P = {layer.name: normal(len(layer.name), layer.outputs, layer.inputs) for layer in worker.layers}
    ours, theirs = scores(worker, P), autograd_scores(worker, P)
    scale = {name: max(float(found.abs().max()), 1e-12) for name, found in theirs.items()}
    return max(float((ours[name] - theirs[name]).abs().max()) / scale[name] for name in theirs)


def scores(worker: ModelWorker, P: dict[str, Tensor]) -> dict[str, Tensor]:
    """By layer, from one padded micro-batch."""
    ids, mask = map(torch.from_numpy, pad(SEQUENCES))
    found = {name: torch.zeros(len(SEQUENCES), dtype=torch.float64) for name in P}

    def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
        queries = LayerQueries.dense(P[layer.name][None].to(s.dtype), bias=layer.bias)
        found[layer.name] += score_layer(s, a, queries, routed)[:, 0]

    batch = Batch(np.arange(len(SEQUENCES)), ids, mask)
    worker.backward(batch, worker.layers, batch.loss(), consume, ones=False)
    return found


def autograd_scores(worker: ModelWorker, P: dict[str, Tensor]) -> dict[str, Tensor]:
    """By layer, from the parameters' own gradients; a head that is tied to the embedding moves alone."""
    module = worker.model.module
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone())
    module.requires_grad_(True)
    found: dict[str, list[Tensor]] = {name: [] for name in P}
    for ids in SEQUENCES:
        module.zero_grad()
        ids_t = torch.from_numpy(ids)
        logits_tv = module(input_ids=ids_t[None], use_cache=False).logits[0]
        cross_entropy(logits_tv[:-1].to(worker.wide), ids_t[1:], reduction="sum").backward()
        for layer in worker.layers:
            found[layer.name].append((P[layer.name] * gradient(module, layer)).sum())
    module.zero_grad()
    module.requires_grad_(False)
    if tied:
        head.weight = embedding.weight
    return {name: torch.stack(parts) for name, parts in found.items()}


def gradient(module: nn.Module, layer: Layer) -> Tensor:
    """[O, I(+1)], from .grad; zero where the loss reaches no parameter."""
    if layer.stack:
        owner = module.get_submodule(layer.stack.rpartition(".")[0])
        name, expert = layer.stack.rpartition(".")[2], int(layer.name.rpartition(".")[2])
        parameters, transposed = [getattr(owner, name)], is_transposed(owner)
        parameters += [getattr(owner, f"{name}_bias")] if layer.bias else []
        parts = [parameter.grad[expert] for parameter in parameters]
    else:
        owner = module.get_submodule(layer.name)
        transposed = isinstance(owner, Conv1D)
        parameters = [owner.weight] + ([owner.bias] if layer.bias else [])
        parts = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    g_oi = parts[0].T if transposed else parts[0]
    return torch.cat([g_oi, parts[1][:, None]], dim=1) if layer.bias else g_oi
