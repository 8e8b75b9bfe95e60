"""No pass waits for the GPU inside its loop over batches: while one batch is computed, the next is being queued."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infscan.config import Labels
from infscan.model.worker import ModelWorker
from infscan.steps.factors import covariance_task, lambda_task
from infscan.steps.scan import scan_task
from tests.gpu.kit.agreement import REFERENCE, reference
from tests.gpu.kit.device import host_waits
from tests.gpu.kit.shapes import SMALL, Bench
from tests.gpu.kit.study import Study

GPU = "cuda:0"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study.make(tmp_path_factory.mktemp("study"))
    reference(study)
    return study


@pytest.fixture
def rank(study: Study, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelWorker]:
    """A rank on the GPU that refuses to synchronise from its first batch to the end of its loop."""
    rank = study.rank(GPU)
    batches = rank.batches

    def strict(*arguments: object) -> Iterator[object]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield from batches(*arguments)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(rank, "batches", strict)
    yield rank
    # A loop that broke off has left its iterator open.
    torch.cuda.set_sync_debug_mode("default")


def test_the_guard_sees_a_hidden_wait(study: Study, rank: ModelWorker) -> None:
    sequences = rank.read(study.corpus, study.scan_task(rank, None).sequence_ids)
    with pytest.raises(RuntimeError, match="synchroniz"):
        _ = [batch.mask_bt.sum().item() for batch in rank.batches(sequences, 512)]
    assert host_waits(lambda: torch.ones(1, device=GPU).item(), GPU) == 1


def test_a_micro_batch_of_the_kit_does_not_wait(tmp_path: Path) -> None:
    bench = Bench(SMALL, GPU, tmp_path)
    results = [*bench.floor(None), *bench.scan(10, 32)]
    assert [one["host_waits"] for one in results] == [0, 0]


@pytest.mark.parametrize("compressed", [None, 16], ids=["full rank", "rank 16"])
def test_the_scan_does_not_wait(study: Study, rank: ModelWorker, compressed: int | None) -> None:
    batch = study.query_batch(rank, REFERENCE, compressed)
    assert scan_task(rank, study.scan_task(rank, compressed), batch) is not None


def test_refining_does_not_wait(study: Study, rank: ModelWorker) -> None:
    assert study.refined(rank, REFERENCE).shape == (3, study.sequences)


@pytest.mark.parametrize("labels", list(Labels))
def test_the_covariance_pass_does_not_wait(study: Study, rank: ModelWorker, labels: Labels) -> None:
    task = study.fit_task(f"covariance-{labels.value}", labels, draw_labels=labels is Labels.sampled)
    assert covariance_task(rank, task) > 0


def test_the_lambda_pass_does_not_wait(study: Study, rank: ModelWorker) -> None:
    assert lambda_task(rank, study.fit_task(REFERENCE, Labels.empirical)) > 0
