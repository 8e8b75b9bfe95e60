"""Sums of squared gradients in the eigenbases, by layer: Lambda's, and those that a damping is found from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from infscan.influence.blocks import BlockDiagonal
from infscan.influence.eigenbasis import add_squared_gradients
from infscan.influence.layers import Layer
from infscan.influence.precision import Multiply, multiplying
from infscan.influence.routed import Routed
from infscan.model.worker import LayerConsumer, ModelWorker
from infscan.results.tensor_files import read_tensor, write_tensors
from infscan.steps.eigenbases import eigenbases_digest
from infscan.steps.factor_files import block_keys, partial_path
from infscan.steps.labels import FitTask, Targets

# (Q_S, Q_A) by layer.
Bases = Mapping[str, tuple[BlockDiagonal, BlockDiagonal]]


@multiplying("exact")
def lambda_task(worker: ModelWorker, task: FitTask) -> int:
    """Sum (Q_S^T g Q_A)^2 over the slice's sequences; the partial carries the digest of its eigenbases."""
    return sum_squares(worker, task, "lambda")


def sum_squares(worker: ModelWorker, task: FitTask, kind: str) -> int:
    """The sums of `lambda_task`, into partials of a kind. Returns the tokens read."""
    sequences = task.sequences(worker)
    layers = task.plan.group(task.group)
    bases, digest = worker.cached(
        "eigenbases", (task.factors, task.plan.fingerprint, task.group), lambda: _bases(worker, task)
    )
    Lambda = lambda_sums(layers, worker.wide, worker.device)
    targets = Targets(task, worker, sequences)
    for batch in worker.batches(sequences, task.plan.tokens_per_batch):
        consume = lambda_consumer(Lambda, bases, task.plan.matmul)
        worker.backward(batch, layers, targets.loss(batch), consume, ones=False)
    sums = {name: worker.reduce(total) for name, total in Lambda.items()}
    if worker.leads:
        path = partial_path(kind, task.group, task.slice)
        write_tensors(task.factors, path, sums, {"eigenbases": digest})
    return sum(len(sequence) for sequence in sequences)


def lambda_sums(layers: tuple[Layer, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Zeros [O, I] for every layer."""
    return {layer.name: torch.zeros(layer.outputs, layer.inputs, dtype=dtype, device=device) for layer in layers}


def lambda_consumer(Lambda: Mapping[str, Tensor], bases: Bases, matmul: Multiply = "exact") -> LayerConsumer:
    """Adds every sequence's squared gradient in the eigenbases."""

    def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
        with multiplying(matmul):
            for mine in (slice(None),) if routed is None else (part for _, part in routed.segments()):
                of_one = (s, a) if routed is None else (s[None, mine], a[None, mine])
                add_squared_gradients(Lambda[layer.name], *of_one, *bases[layer.name])

    return consume


def _bases(worker: ModelWorker, task: FitTask) -> tuple[Bases, str]:
    def read(path: str, key: str) -> BlockDiagonal:
        blocks = [read_tensor(task.factors, path, name) for name in block_keys(key, task.plan.blocks)]
        return BlockDiagonal(tuple(blocks)).to(worker.device, worker.wide)

    bases = {}
    for layer in task.plan.group(task.group):
        Q_S = read(f"S/{layer.name}.safetensors", "Q_S")
        bases[layer.name] = (Q_S, read(f"A/{layer.input_of}.safetensors", "Q_A"))
    return bases, eigenbases_digest(task.factors, task.plan.group(task.group))
