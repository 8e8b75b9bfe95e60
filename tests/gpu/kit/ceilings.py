"""What the device does at most: products by dtype, copies, and decompositions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from infscan.influence.blocks import BlockDiagonal
from infscan.influence.eigenbasis import decomposed_on
from infscan.influence.precision import Multiply, add_product, multiplying, operand
from tests.gpu.kit.device import is_cuda, once, seconds


def products(device: str, n: int) -> Iterator[dict[str, Any]]:
    """FLOP per second of one [n, n] product, as each pass multiplies."""
    wide = torch.randn(n, n, device=device)
    low, total = wide.bfloat16(), torch.zeros(n, n, device=device)
    ways: tuple[tuple[str, Any, Multiply], ...] = (
        ("bfloat16", lambda: low @ low, "exact"),
        ("moments", lambda: add_product(total, operand(low, total).T, operand(low, total)), "exact"),
        ("tf32", lambda: wide @ wide, "tf32"),
        ("float32", lambda: wide @ wide, "exact"),
    )
    for name, run, matmul in ways:
        with multiplying(matmul):
            found = seconds(run, device, limit=1.0)
        yield {"ceiling": name, "n": n, **found, "flops": 2 * n**3 / found["median_s"]}


def copies(device: str, size: int) -> Iterator[dict[str, Any]]:
    """Bytes per second within the device, and from the host, pinned and pageable."""
    on, host = torch.empty(size, dtype=torch.uint8, device=device), torch.empty(size, dtype=torch.uint8)
    pairs = [("device", on.clone())] + ([("pageable", host), ("pinned", host.pin_memory())] if is_cuda(device) else [])
    for name, source in pairs:
        found = seconds(lambda source=source: on.copy_(source, non_blocking=True), device, limit=1.0)  # type: ignore[misc]
        yield {"ceiling": f"copy, {name}", "bytes": size, **found, "bytes_per_s": size / found["median_s"]}


def decomposition(device: str, n: int) -> Iterator[dict[str, Any]]:
    """A random second moment of so many rows, once, on the device: seconds, and the memory that it took."""
    x_mn = torch.randn(n + 64, n, device=device)
    moment = BlockDiagonal((x_mn.T @ x_mn / len(x_mn),))
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats()
    found = once(lambda: decomposed_on(device, moment.blocks[0]), device)
    peak = torch.cuda.max_memory_allocated() if is_cuda(device) else None
    yield {"n": n, "dtype": "float64", **found, "flops": 9 * n**3 / found["median_s"], "peak": peak}
