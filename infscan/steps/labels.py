"""The labels that a fit's losses are of: true next tokens, or pseudo-labels drawn from the model once and stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from infscan.config import Labels
from infscan.corpus.addressable import CorpusAddress
from infscan.corpus.read_ahead import Reads
from infscan.corpus.sequences import Sequence
from infscan.model.losses import Loss
from infscan.model.measure import uniforms
from infscan.model.worker import Batch, ModelWorker
from infscan.results.tensor_files import read_tensors, tensor_bytes
from infscan.steps.factor_files import FactorsPlan, labels_path
from infscan.storage import Store


@dataclass(frozen=True)
class FitTask:
    """One slice of the factors' corpus for one layer group."""

    factors: Store
    corpus: CorpusAddress
    plan: FactorsPlan
    group: int
    slice: int
    labels: Labels
    seed: int
    # Whether this task draws the slice's pseudo-labels and stores them; else stored ones are read.
    draw_labels: bool = False
    # What squared gradients are summed for: the kind of their partials.
    squares: str = "lambda"

    @property
    def reads(self) -> Reads:
        return Reads(self.corpus, self.plan.selection.ids(*self.plan.slices[self.slice]))

    def sequences(self, worker: ModelWorker) -> list[Sequence]:
        return worker.read(self.reads.corpus, self.reads.sequence_ids)


class Targets:
    """The loss of a pass: true next tokens (empirical), labels drawn now, or labels read back."""

    def __init__(self, task: FitTask, worker: ModelWorker, sequences: list[Sequence]) -> None:
        self.task, self.worker, self.sequences = task, worker, sequences
        self.labels_nt: Tensor | None = None
        if task.labels is Labels.sampled:
            longest = max(len(sequence) for sequence in sequences)
            if task.draw_labels:
                self.labels_nt = torch.zeros(len(sequences), longest, dtype=torch.int64, device=worker.device)
            else:
                stored = read_tensors(task.factors, labels_path(task.slice))["labels"]
                self.labels_nt = worker.to_device(stored.to(torch.int64).numpy())

    def loss(self, batch: Batch) -> Loss:
        """Summed over every position with a label; a dummy batch gives zero."""
        if self.labels_nt is None or not batch.scored:
            return batch.loss()
        T = batch.ids_bt.shape[1]
        labels_bt = self.labels_nt[self.worker.to_device(batch.rows), :T]
        if not self.task.draw_labels:
            return Loss(labels_bt, batch.positions())
        ids = np.asarray([self.sequences[row].sequence_id for row in batch.rows], np.int64)
        return Loss(labels_bt, batch.positions(), self.worker.to_device(uniforms(self.task.seed, ids, T)))

    def keep(self, batch: Batch, loss: Loss) -> None:
        """Labels that the loss has drawn, for the passes to come; 0 where there is none."""
        if self.labels_nt is not None and loss.uniforms_bt is not None:
            rows, T = self.worker.to_device(batch.rows), batch.ids_bt.shape[1]
            self.labels_nt[rows, :T] = loss.labels_bt * loss.weights_bt

    def stored(self) -> Callable[[], None]:
        """What puts drawn labels in storage, if none are there; labels that differ from those there void this attempt.

        A label drawn twice can differ where rounding moved a boundary. The sums must belong to the labels in storage.
        """
        if not (self.task.draw_labels and self.labels_nt is not None):
            return lambda: None
        labels_nt = self.worker.reduce(self.labels_nt)
        if not self.worker.leads:
            return lambda: None
        path, factors = labels_path(self.task.slice), self.task.factors
        data = tensor_bytes({"labels": labels_nt.to(torch.int32)}, name=path)

        def store() -> None:
            if not factors.create(path, data) and factors.read(path) != data:
                raise RuntimeError(
                    f"{path} was drawn by another attempt with other labels; this attempt does not count"
                )

        return store
