"""Memory that runs out on a rank: how it is recognised, and what the driver is told to halve micro-batches by."""

from __future__ import annotations

from typing import Any

import torch

# CUDA's libraries and PyTorch's allocators say it in plain RuntimeErrors.
_SAID = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "std::bad_alloc")
# What cuBLAS, cuSOLVER and NCCL say where their own buffers find no room, and for other reasons too: it is memory where
# the device is full. They allocate beside PyTorch's cache, some hundred MiB each.
_SAID_WHEN_FULL = ("cublas_status_not_initialized", "cusolver_status_not_initialized", "unhandled cuda error")
_FULL_BYTES = 1 << 30
# What other processes hold of a device that is not only a rank's own context and the libraries' buffers.
_FOREIGN_BYTES = 4 << 30


class RankMemoryError(Exception):
    """A unit of work needs more memory than the rank has.

    rows: sequences in the micro-batch that did not fit; None where memory ran out outside of micro-batches.
    tokens: padded tokens in it.
    foreign: bytes of the rank's GPU that other processes hold, where these are many.
    """

    def __init__(self, reason: str, rows: int | None, tokens: int, foreign: int = 0) -> None:
        # All of them are arguments, so that the exception travels between processes.
        super().__init__(reason, rows, tokens, foreign)
        self.reason, self.rows, self.tokens, self.foreign = reason, rows, tokens, foreign

    def __str__(self) -> str:
        where = "outside of micro-batches" if self.rows is None else f"at {self.rows} sequences, {self.tokens} tokens"
        others = f"; other processes hold {self.foreign / 2**30:.1f} GiB of the GPU" if self.foreign else ""
        return f"out of memory {where}: {self.reason}{others}"


def is_out_of_memory(error: BaseException, device: str = "cpu") -> bool:
    """Python's MemoryError, CUDA's and the CPU allocator's errors, and those that were raised because of one.

    device: where it was raised; what CUDA's libraries say for several reasons is memory where that has none left.
    """
    seen: Any = error
    while seen is not None:
        if isinstance(seen, MemoryError | torch.OutOfMemoryError):
            return True
        said = str(seen).lower() if isinstance(seen, RuntimeError) else ""
        if any(words in said for words in _SAID):
            return True
        if any(words in said for words in _SAID_WHEN_FULL) and _is_full(device):
            return True
        seen = seen.__cause__
    return False


def _is_full(device: str) -> bool:
    """Whether a GPU has no memory left beside what PyTorch holds; not where it does not answer any more."""
    try:
        return device.startswith("cuda") and torch.cuda.mem_get_info(device)[0] < _FULL_BYTES
    except RuntimeError:
        return False


def free_bytes(device: str) -> int | None:
    """What is free of a GPU; None on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else None


def foreign_bytes(device: str) -> int:
    """What other processes hold of a GPU; 0 where it is about what this one's context takes, on a CPU, and where the
    GPU does not answer."""
    if not device.startswith("cuda"):
        return 0
    try:
        free, total = torch.cuda.mem_get_info(device)
        others = total - free - torch.cuda.memory_reserved(device)
    except RuntimeError:
        return 0
    return others if others > _FOREIGN_BYTES else 0


def has_died(device: str) -> bool:
    """Whether a GPU's context is gone after an error: then this process can do nothing more on it."""
    try:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
