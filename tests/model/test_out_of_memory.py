"""Memory that runs out: recognised in whatever form it comes, and answered by halving what the rank is dealt."""

from __future__ import annotations

import pickle
from typing import NoReturn

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infscan.model.out_of_memory import RankMemoryError, foreign_bytes, is_out_of_memory
from infscan.model.worker import ModelWorker
from tests.model.test_worker import content, sequences
from tests.steps.builders import as_rank


def cpu_allocation() -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    return caught.value


def numpy_allocation() -> MemoryError:
    with pytest.raises(MemoryError) as caught:
        np.zeros(1 << 59)
    return caught.value


OUT = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    cpu_allocation(),
    numpy_allocation(),
]


@pytest.mark.parametrize("error", OUT, ids=lambda error: str(error)[:40] or type(error).__name__)
def test_every_form_of_it_is_recognised(error: Exception) -> None:
    assert is_out_of_memory(error)
    wrapped = RuntimeError("in backward")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped)


@pytest.mark.parametrize("error", [RuntimeError("a size mismatch"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    tokens=st.integers(1, 60),
    oom_retries=st.integers(0, 8),
    world=st.integers(1, 3),
)
def test_k_oom_retries_deal_as_a_2_to_the_k_th_of_the_tokens_does(
    rank: ModelWorker, lengths: list[int], tokens: int, oom_retries: int, world: int
) -> None:
    """By the sequences and k alone, on every rank of the group alike; in the end every sequence is alone."""
    taken = sequences(lengths)

    def dealt(k: int, budget: int) -> list[list[object]]:
        ranks = [as_rank(rank, number, world) for number in range(world)]
        return [each.attempt(lambda rank: [content(b) for b in rank.batches(taken, budget)], k) for each in ranks]

    assert dealt(oom_retries, tokens) == dealt(0, max(1, tokens >> oom_retries))
    assert all(len(rows) <= 1 for batches in dealt(7, tokens) for rows, _, _ in batches)


NOT_ALWAYS_MEMORY = [
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cusolver error: CUSOLVER_STATUS_NOT_INITIALIZED, when calling `cusolverDnCreate(handle)`",
    "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
]


@pytest.mark.parametrize("said", NOT_ALWAYS_MEMORY, ids=lambda said: said[:20])
def test_what_libraries_say_without_room_is_memory_on_a_full_device(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another, or where it does not answer, it is what it may be."""
    error = RuntimeError(said)
    assert not is_out_of_memory(error, "cpu")
    for free, full in ((100 << 20, True), (20 << 30, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 << 30))
        assert is_out_of_memory(error, "cuda:0") == full

    def dead(device: str) -> NoReturn:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", dead)
    assert not is_out_of_memory(error, "cuda:0")
    assert foreign_bytes("cuda:0") == 0


def test_what_others_hold_of_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 << 30)
    for free, foreign in ((58 << 30, 0), (10 << 30, 50 << 30)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 << 30))
        assert foreign_bytes("cuda:0") == foreign
    error = RankMemoryError("CUDA out of memory", 1, 512, 50 << 30)
    assert str(error).endswith("CUDA out of memory; other processes hold 50.0 GiB of the GPU")
    assert pickle.loads(pickle.dumps(error)).foreign == 50 << 30


def test_what_did_not_fit_is_said(rank: ModelWorker) -> None:
    def run_out(rank: ModelWorker) -> NoReturn:
        for batch in rank.batches(sequences([3, 4, 5, 5]), 10):
            if len(batch.ids_bt) == 2 and batch.ids_bt.shape[1] == 5:
                raise torch.OutOfMemoryError("CUDA out of memory.\nmore about it")
        raise AssertionError

    with pytest.raises(RankMemoryError, match="at 2 sequences, 10 tokens: CUDA out of memory") as caught:
        rank.attempt(run_out, 0)
    assert (caught.value.rows, caught.value.tokens) == (2, 10)
    back = pickle.loads(pickle.dumps(caught.value))
    assert (back.rows, back.tokens, str(back)) == (2, 10, str(caught.value))


def test_memory_that_runs_out_elsewhere_is_no_batchs_fault(rank: ModelWorker) -> None:
    def run_out(rank: ModelWorker) -> NoReturn:
        list(rank.batches(sequences([3, 4]), 10))
        raise MemoryError

    with pytest.raises(RankMemoryError, match="outside of micro-batches") as caught:
        rank.attempt(run_out, 0)
    assert caught.value.rows is None


def test_the_batch_is_let_go_before_the_error_travels(rank: ModelWorker) -> None:
    kept: list[object] = []

    class Batch:
        def __del__(self) -> None:
            kept.append("let go")

    def run_out(rank: ModelWorker) -> NoReturn:
        batch = Batch()
        kept.clear()
        raise MemoryError(f"no room for {batch}")

    with pytest.raises(RankMemoryError):
        rank.attempt(run_out, 0)
    assert kept == ["let go"]


def test_other_errors_pass_as_they_are(rank: ModelWorker) -> None:
    def fail(rank: ModelWorker) -> NoReturn:
        raise KeyError("x")

    with pytest.raises(KeyError):
        rank.attempt(fail, 0)
