"""What goes wrong on a card: memory runs out, an error that the context does not survive, a run that is cut off."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infscan.config import Labels
from infscan.engine.executor import Step
from infscan.engine.in_process import InProcessExecutor
from infscan.influence.layout import QueryBatch
from infscan.model.worker import ModelWorker
from infscan.results.tensor_files import read_tensors
from infscan.steps.factors import fit_factors
from infscan.steps.scan import ScanTask, scan_task
from tests.gpu.kit.agreement import EXACT, REFERENCE, relative
from tests.gpu.kit.device import is_cuda
from tests.gpu.kit.record import Check
from tests.gpu.kit.study import QUERIES, Study

_ROOT = Path(__file__).resolve().parents[3]
# The context of a process is dead after this; it must be another's. It says what it is told afterwards.
_STICKY = """
import torch
try:
    torch._assert_async(torch.zeros(1, device="cuda")); torch.cuda.synchronize()
except RuntimeError as error:
    from infscan.model.out_of_memory import is_out_of_memory
    print("memory" if is_out_of_memory(error) else type(error).__name__)
try:
    torch.ones(1, device="cuda").sum().item(); print("alive")
except RuntimeError:
    print("dead")
"""


def memory_halving(study: Study, device: str) -> Iterator[Check]:
    """A unit whose whole micro-batch has no room is done in halves, with the same scores, and its memory is free
    again."""
    rank = study.rank(device)
    whole = study.scores(rank, REFERENCE, None)
    executor = InProcessExecutor.on(rank)
    before = _held(device)
    halved = _scores(study, executor, study.query_batch(rank, REFERENCE, None))
    yield Check("halvings", "float32", executor.oom_retries, 1, least=True)
    yield Check("scores in halves", "float32", relative(halved, whole), EXACT)
    if is_cuda(device):
        yield Check("bytes kept afterwards, of those before", "", _held(device) / max(1, before), 1.5)


def _scores(study: Study, executor: InProcessExecutor, batch: QueryBatch) -> np.ndarray:
    found = np.zeros((QUERIES, study.sequences))

    def keep(unit: int, result: Any) -> None:
        hits, counts = result
        assert counts.halvings == executor.oom_retries
        found[hits.queries, hits.sequence_ids] = hits.scores

    task = study.scan_task(executor.worker, None, name="halved")
    executor.run(Step("scan", "shards", [0], _hungry_scan, lambda unit: task), keep, shared=[batch])
    return found


def _hungry_scan(worker: ModelWorker, task: ScanTask, batch: QueryBatch) -> Any:
    """The scan, after a look at whether a micro-batch's bytes are there: one and a half times what is free, for the
    largest that the task's tokens may make."""
    sequences = worker.read(task.corpus, task.sequence_ids)
    for one in worker.batches(sequences, task.tokens_per_batch):
        _take(worker.device, 1.5 * one.ids_bt.numel() / task.tokens_per_batch)
    return scan_task(worker, task, batch)


def _take(device: str, share: float) -> None:
    """Allocate this share of the free memory; a CPU, whose memory others share, is only asked."""
    if is_cuda(device):
        torch.empty(int(share * torch.cuda.mem_get_info(device)[0]), dtype=torch.uint8, device=device)
    elif share > 1:
        raise MemoryError("a micro-batch of more than the memory")


def _held(device: str) -> int:
    """Bytes in use; the allocator keeps what is freed."""
    return torch.cuda.memory_allocated(device) if is_cuda(device) else 0


def sticky_error() -> Iterator[dict[str, Any]]:
    """A device assert in another process: no memory error, and nothing runs there afterwards; this one goes on."""
    done = subprocess.run([sys.executable, "-c", _STICKY], capture_output=True, text=True, timeout=120, cwd=_ROOT)
    said = done.stdout.split()
    alive = float(torch.ones(3, device="cuda").sum()) == 3.0
    yield {"fault": "sticky", "said": said, "ok": said[1:] == ["dead"] and said[0] != "memory" and alive}


def resumed_fit(study: Study, device: str) -> Iterator[Check]:
    """A fit that is cut off after its first unit and started again ends with the files of one that was not: on a CPU
    with the same bytes; on a GPU, where attention's backward adds in no fixed order, with the same moments."""
    rank = study.rank(device)
    study.fit(rank, "whole")
    task = study.fit_task("resumed", Labels.empirical)
    cut = InProcessExecutor.on(rank)
    cut.records.check = _after(2)
    try:
        corpus = study.corpus.open()
        fit_factors(cut, task.factors, corpus, task.plan, task.labels, task.seed, gpus=int(is_cuda(device)))
    except InterruptedError:
        study.fit(rank, "resumed")
    whole, again = study.factors("whole"), study.factors("resumed")
    if is_cuda(device):
        names = [layer.name for layer in study.architecture.layers]
        pairs = [(read_tensors(store, f"S/{name}.safetensors")["S"] for store in (again, whole)) for name in names]
        yield Check("S after a resume", "float32", max(relative(*pair) for pair in pairs), EXACT)
        return
    names = sorted(entry.name for entry in whole.list(suffix=".safetensors"))
    differing = sum(whole.read(name) != again.read(name) for name in names)
    yield Check(f"files of {len(names)} that differ after a resume", "float32", differing, 0)


def _after(calls: int) -> Any:
    left = [calls]

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise InterruptedError

    return check
