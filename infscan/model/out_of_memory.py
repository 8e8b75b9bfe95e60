"""Memory that runs out on a rank: how it is recognised, and what the driver is told to halve micro-batches by."""

from __future__ import annotations

from typing import Any

import torch

# CUDA's libraries and PyTorch's allocators say it in plain RuntimeErrors.
_SAID = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "std::bad_alloc")


class RankMemoryError(Exception):
    """A unit of work needs more memory than the rank has.

    rows: sequences in the micro-batch that did not fit; None where memory ran out outside of micro-batches.
    tokens: padded tokens in it.
    """

    def __init__(self, reason: str, rows: int | None, tokens: int) -> None:
        # All of them are arguments, so that the exception travels between processes.
        super().__init__(reason, rows, tokens)
        self.reason, self.rows, self.tokens = reason, rows, tokens

    def __str__(self) -> str:
        where = "outside of micro-batches" if self.rows is None else f"at {self.rows} sequences, {self.tokens} tokens"
        return f"out of memory {where}: {self.reason}"


def is_out_of_memory(error: BaseException) -> bool:
    """Python's MemoryError, CUDA's and the CPU allocator's errors, and those that were raised because of one."""
    seen: Any = error
    while seen is not None:
        if isinstance(seen, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(seen, RuntimeError) and any(said in str(seen).lower() for said in _SAID):
            return True
        seen = seen.__cause__
    return False
