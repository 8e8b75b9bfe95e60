"""No pass waits for the GPU inside its loop over batches: while one batch is computed, the next is being queued."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from infscan.config import Labels
from infscan.model.worker import Batch, ModelWorker
from infscan.steps.factors import covariance_task, lambda_task
from infscan.steps.refine import refine_task
from infscan.steps.scan import scan_task
from tests.gpu.study import Study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study.make(tmp_path_factory.mktemp("study"))
    study.fit(study.rank("cpu"), "cpu")
    return study


@pytest.fixture
def rank(study: Study, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelWorker]:
    """A rank on the GPU that refuses to synchronise from its first batch to the end of its loop.

    The model's own forward is let through: with neither mask nor cache, transformers looks at the position ids once
    per forward to see whether sequences are packed.
    """
    rank = study.rank("cuda:0")
    batches, logits = rank.batches, rank.model.logits

    def strict(*arguments: Any) -> Iterator[Batch]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from batches(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def lenient(ids_bt: Tensor) -> Tensor:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return logits(ids_bt)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    monkeypatch.setattr(rank, "batches", strict)
    monkeypatch.setattr(rank.model, "logits", lenient)
    yield rank
    # A loop that broke off has left its iterator open.
    torch.cuda.set_sync_debug_mode("default")


def test_the_guard_sees_a_hidden_wait(study: Study, rank: ModelWorker) -> None:
    sequences = rank.read(study.corpus, study.scan_task(rank, None).sequence_ids)
    with pytest.raises(RuntimeError, match="synchroniz"):
        _ = [batch.mask_bt.sum().item() for batch in rank.batches(sequences, 512)]


@pytest.mark.parametrize("compressed", [None, 16], ids=["full rank", "rank 16"])
def test_the_scan_does_not_wait(study: Study, rank: ModelWorker, compressed: int | None) -> None:
    batch = study.query_batch(rank, "cpu", compressed)
    assert scan_task(rank, study.scan_task(rank, compressed), batch) is not None


def test_refining_does_not_wait(study: Study, rank: ModelWorker) -> None:
    scan_task(rank, study.scan_task(rank, None), study.query_batch(rank, "cpu", None))
    assert refine_task(rank, study.refine_task(rank, "cpu")) > 0


@pytest.mark.parametrize("labels", list(Labels))
def test_the_covariance_pass_does_not_wait(study: Study, rank: ModelWorker, labels: Labels) -> None:
    task = study.fit_task(f"covariance-{labels.value}", labels, draw_labels=labels is Labels.sampled)
    assert covariance_task(rank, task) > 0


def test_the_lambda_pass_does_not_wait(study: Study, rank: ModelWorker) -> None:
    assert lambda_task(rank, study.fit_task("cpu", Labels.empirical)) > 0
