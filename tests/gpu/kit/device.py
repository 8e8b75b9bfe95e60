"""What a device says of itself: seconds, bytes, and how often the host waits for it."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from tests.gpu.kit.waits import counted


def is_cuda(device: str) -> bool:
    return device.startswith("cuda")


def wait(device: str) -> None:
    if is_cuda(device):
        torch.cuda.synchronize()


def once(run: Callable[[], object], device: str) -> dict[str, float]:
    """One run alone, of what takes long enough to say something by that."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return {"median_s": time.perf_counter() - start, "runs": 1}


def seconds(run: Callable[[], object], device: str, *, limit: float = 4.0, most: int = 10) -> dict[str, float]:
    """Median, least and most of some runs, after one that does not count; at least two, and no more than `limit` s."""
    run()
    wait(device)
    began, taken = time.monotonic(), list[float]()
    while len(taken) < 2 or (len(taken) < most and time.monotonic() - began < limit):
        start = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - start)
    return {"median_s": statistics.median(taken), "min_s": min(taken), "max_s": max(taken), "runs": len(taken)}


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """The most that was allocated while it ran, what was there before included; None on a CPU."""
    if not is_cuda(device):
        run()
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    wait(device)
    return torch.cuda.max_memory_allocated()


def host_waits(run: Callable[[], object], device: str) -> int:
    """How often the host waited for the device while it ran; on a CPU, how often it would wait for a GPU."""
    if not is_cuda(device):
        with counted() as found:
            run()
        return len(found)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


def release(device: str) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if is_cuda(device):
        torch.cuda.empty_cache()


def environment(device: str) -> dict[str, Any]:
    """Versions and the card."""
    import transformers

    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "device": "cpu"}
    if is_cuda(device):
        facts = torch.cuda.get_device_properties(device)
        found |= {"device": facts.name, "memory": facts.total_memory, "cuda": torch.version.cuda}
        found["free"] = torch.cuda.mem_get_info(device)[0]
    return found


def name_in_table(device: str) -> str | None:
    """The card's row in infscan/sizing/devices.py."""
    name = environment(device)["device"].lower()
    known = (("h200", "h200"), ("h100", "h100"), ("l40s", "l40s"), ("a10g", "a10g"))
    found = next((row for said, row in known if said in name), None)
    if found is None and "a100" in name:
        found = "a100-80" if environment(device)["memory"] > 50e9 else "a100-40"
    return found
