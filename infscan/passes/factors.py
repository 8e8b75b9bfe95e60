"""Sum what EK-FAC factors are made of, in a rank's tasks: covariances and Lambda (METHOD: EK-FAC; DESIGN: guarantee 4).

covariance_task, lambda_task: a rank's work on (layer group, slice). What follows, layer by layer and without a model,
is `infscan.passes.decompose`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from infscan.config import Attention, Labels
from infscan.corpus.sequences import Sequence
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.covariance import add_second_moment, mirror
from infscan.influence.eigenbasis import add_squared_gradients
from infscan.influence.layers import Layer
from infscan.model.losses import Loss
from infscan.model.measure import uniforms
from infscan.passes.decompose import eigenbases_digest
from infscan.passes.factor_store import (
    FactorsPlan,
    block_keys,
    labels_path,
    named_blocks,
    partial_path,
    read_tensor,
    read_tensors,
    tensor_bytes,
    write_tensors,
)
from infscan.passes.rank import Batch, Rank
from infscan.storage import Store


@dataclass(frozen=True)
class FitTask:
    """One slice of the factors' corpus for one layer group.

    draw_labels: this task draws the slice's pseudo-labels and stores them; else stored ones are read.
    """

    factors: Store
    corpus: Store
    plan: FactorsPlan
    group: int
    slice: int
    labels: Labels
    seed: int
    draw_labels: bool = False
    attention: Attention = Attention.across

    def sequences(self, rank: Rank) -> list[Sequence]:
        start, stop = self.plan.slices[self.slice]
        return rank.read(self.corpus, self.plan.selection.ids(start, stop), self.attention)


class _Targets:
    """The loss of a pass: true next tokens (empirical), labels drawn now, or labels read back."""

    def __init__(self, task: FitTask, rank: Rank, sequences: list[Sequence]) -> None:
        self.task, self.rank, self.sequences = task, rank, sequences
        self.labels_nt: Tensor | None = None
        if task.labels is Labels.sampled:
            longest = max(len(sequence) for sequence in sequences)
            if task.draw_labels:
                self.labels_nt = torch.zeros(len(sequences), longest, dtype=torch.int64, device=rank.device)
            else:
                stored = read_tensors(task.factors, labels_path(task.slice))["labels"]
                self.labels_nt = rank.to_device(stored.to(torch.int64).numpy())

    def loss(self, batch: Batch) -> Loss:
        """Summed over every position with a label; a dummy batch gives zero."""
        if self.labels_nt is None or not batch.scored:
            return batch.loss()
        T = batch.ids_bt.shape[1]
        labels_bt = self.labels_nt[self.rank.to_device(batch.rows), :T]
        if not self.task.draw_labels:
            return Loss(labels_bt, batch.positions())
        ids = np.asarray([self.sequences[row].sequence_id for row in batch.rows], np.int64)
        return Loss(labels_bt, batch.positions(), self.rank.to_device(uniforms(self.task.seed, ids, T)))

    def keep(self, batch: Batch, loss: Loss) -> None:
        """Labels that the loss has drawn, for the passes to come; 0 where there is none."""
        if self.labels_nt is not None and loss.uniforms_bt is not None:
            rows, T = self.rank.to_device(batch.rows), batch.ids_bt.shape[1]
            self.labels_nt[rows, :T] = loss.labels_bt * loss.weights_bt

    def store(self) -> None:
        """Put drawn labels in storage if none are there; labels that differ from those there void this attempt.

        A label drawn twice can differ where rounding moved a boundary. The sums must belong to the labels in storage.
        """
        if not (self.task.draw_labels and self.labels_nt is not None):
            return
        labels_nt = self.rank.reduce(self.labels_nt)
        if self.rank.leads:
            data = tensor_bytes({"labels": labels_nt.to(torch.int32)})
            path = labels_path(self.task.slice)
            if not self.task.factors.create(path, data) and self.task.factors.read(path) != data:
                raise RuntimeError(
                    f"{path} was drawn by another attempt with other labels; this attempt does not count"
                )


def covariance_task(rank: Rank, task: FitTask) -> int:
    """Sum a a^T and s s^T over the slice's tokens for the group's layers; rank 0 writes the partial file.

    Every position that is not padding counts, the last one included; of sequences with a loss mask those alone that
    predict a token with a loss (`Batch.positions`). Returns the tokens read.
    """
    sequences = task.sequences(rank)
    layers = task.plan.group(task.group)

    def zeros(n: int) -> BlockDiagonal:
        return BlockDiagonal.zeros(n, task.plan.blocks, dtype=rank.wide, device=rank.device)

    A = {layer.name: zeros(layer.inputs) for layer in layers if layer.input_of == layer.name}
    S = {layer.name: zeros(layer.outputs) for layer in layers}

    counted = torch.zeros(1, dtype=torch.int64, device=rank.device)
    targets = _Targets(task, rank, sequences)
    for batch in rank.batches(sequences, task.plan.tokens_per_batch):
        positions_bt = batch.positions()
        masked_bt1 = None if batch.loss_bt is None else ~positions_bt[..., None]

        def consume(
            layer: Layer,
            s_bto: Tensor,
            a_bti: Tensor,
            positions_bt: Tensor = positions_bt,
            masked_bt1: Tensor | None = masked_bt1,
        ) -> None:
            if masked_bt1 is not None:
                s_bto, a_bti = s_bto.masked_fill(masked_bt1, 0), a_bti.masked_fill(masked_bt1, 0)
            add_second_moment(S[layer.name], s_bto)
            if layer.name in A:
                add_second_moment(A[layer.name], a_bti, positions_bt if layer.bias else None)

        loss = targets.loss(batch)
        rank.backward(batch, layers, loss, consume, ones=False)
        targets.keep(batch, loss)
        counted += positions_bt.sum()
    sums = {
        f"{key}|{name}": rank.reduce(block)
        for kind, totals in (("A", A), ("S", S))
        for name, total in totals.items()
        for key, block in named_blocks(kind, mirror(total)).items()
    }
    targets.store()
    counted = rank.reduce(counted)
    if rank.leads:
        path = partial_path("covariance", task.group, task.slice)
        write_tensors(task.factors, path, sums | {"tokens": counted})
    return sum(len(sequence) for sequence in sequences)


def lambda_task(rank: Rank, task: FitTask) -> int:
    """Sum (Q_S^T g Q_A)^2 over the slice's sequences; the partial carries the digest of its eigenbases."""
    sequences = task.sequences(rank)
    layers = task.plan.group(task.group)
    bases, digest = rank.cached(
        "eigenbases", (task.factors, task.plan.fingerprint, task.group), lambda: _bases(rank, task)
    )
    Lambda = {
        layer.name: torch.zeros(layer.outputs, layer.inputs, dtype=rank.wide, device=rank.device) for layer in layers
    }

    def consume(layer: Layer, s_bto: Tensor, a_bti: Tensor) -> None:
        Q_S, Q_A = bases[layer.name]
        add_squared_gradients(Lambda[layer.name], s_bto, a_bti, Q_S, Q_A)

    targets = _Targets(task, rank, sequences)
    for batch in rank.batches(sequences, task.plan.tokens_per_batch):
        rank.backward(batch, layers, targets.loss(batch), consume, ones=False)
    sums = {name: rank.reduce(total) for name, total in Lambda.items()}
    if rank.leads:
        path = partial_path("lambda", task.group, task.slice)
        write_tensors(task.factors, path, sums, {"eigenbases": digest})
    return sum(len(sequence) for sequence in sequences)


def _bases(rank: Rank, task: FitTask) -> tuple[dict[str, tuple[BlockDiagonal, BlockDiagonal]], str]:
    def read(path: str, key: str) -> BlockDiagonal:
        blocks = [read_tensor(task.factors, path, name) for name in block_keys(key, task.plan.blocks)]
        return BlockDiagonal(tuple(blocks)).to(rank.device, rank.wide)

    bases = {}
    for layer in task.plan.group(task.group):
        Q_S = read(f"S/{layer.name}.safetensors", "Q_S")
        bases[layer.name] = (Q_S, read(f"A/{layer.input_of}.safetensors", "Q_A"))
    return bases, eigenbases_digest(task.factors, task.plan.group(task.group))


def slice_bounds(size: int, slices: int) -> tuple[tuple[int, int], ...]:
    """[0, size) cut into at most `slices` near-equal pieces, none empty."""
    edges = np.linspace(0, size, min(slices, size) + 1).round().astype(int).tolist()
    return tuple(pairwise(edges))
