"""What follows from what was measured: the plan's calibration, LoGra's job by it, and which targets are met."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from infscan.config import Matmul
from infscan.config.jobs import PlanConfig, PlanJob
from infscan.sizing.plan import estimate
from tests.gpu.kit.device import name_in_table
from tests.gpu.kit.shapes import SHAPES, Shape

# EK-FAC for 256 queries over a billion tokens with an 8B model, as LoGra's paper prices it (Choe et al. 2024).
LOGRA = {"queries": 256, "tokens": 10**9, "a100_hours": 11_300}
# name: the number, and whether at least it is wanted; else at most.
TARGETS: dict[str, tuple[float, bool]] = {
    "scan of 10 queries, floors, 8b": (1.10, False),
    "MFU, 8b": (0.45, True),
    "covariance, floors, 8b": (2.0, False),
    "lambda in tf32, floors, 8b": (3.5, False),
    "n = 14,336 decomposed, s": (90.0, False),
    "host waits in a micro-batch": (0, False),
    "predicted memory over measured, least": (0.85, True),
    "predicted memory over measured, most": (1.15, False),
    "LoGra's job, hours": (45.0, False),
}


def calibration(found: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Rates as `plan.calibration` reads them, of the largest shape that each was measured on."""
    floors, fits, scans = (found.get(kind, []) for kind in ("floors", "fit", "scan"))
    model = {one["dtype"]: one["flops"] for one in reversed(floors)}
    products = {one["products"]: one["own_flops"] for one in reversed(fits) if one["own_flops"]}
    # The scan's own products are in the model's dtype; many queries say it best.
    many = [one for one in scans if one["queries"] > 10 and one["own_flops"] and one["model"] == floors[0]["model"]]
    if many:
        products[floors[0]["dtype"]] = many[0]["own_flops"]
    eigh = [one["flops"] for one in found.get("eigh", [])]
    env = found["env"]
    return {
        "device": env["device"], "memory": env.get("memory"), "model": model, "products": products,
        "eigh": eigh[-1] if eigh else None, "table": name_in_table(device),
    }  # fmt: skip


def logra(results: Path, folder: Path, device: str, shape: Shape) -> Iterator[dict[str, Any]]:
    """The plan of LoGra's job on one such device, its parts in hours, by the calibration in `results`."""
    job = PlanJob(plan=PlanConfig(device=name_in_table(device), calibration=str(results)))
    job.model.path, job.output = str(shape.write(folder / "logra")), str(folder / "run")
    job.corpus.sequence_length = shape.T
    job.factors.corpus = job.corpus
    job.factors.matmul = Matmul.tf32
    job.factors.path = str(folder / "factors")
    job.plan.sequences, job.plan.queries = LOGRA["tokens"] // shape.T, LOGRA["queries"]
    found = estimate(job)
    parts = {work.name: None if work.seconds is None else work.seconds / 3600 for work in found.work}
    hours = found.rank_hours
    said = "not every rate was measured" if hours is None else f"{hours:,.1f} hours of this device"
    job_said = f"EK-FAC for {LOGRA['queries']} queries over {LOGRA['tokens']:,} tokens with the shape {shape.name}"
    yield {
        "model": shape.name,
        "sentence": f"{job_said}: {said}, where LoGra's paper says {LOGRA['a100_hours']:,} A100-hours for 8B "
        "(extrapolated, not run)",
        "hours": hours, "parts": parts, "rates": json.loads(results.read_text())["calibration"],
    }  # fmt: skip


def targets(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of every target whose number was measured: it, and whether it is met."""
    measured = dict(_measured(found))
    return {
        name: {"target": target, "measured": measured[name], "met": _met(measured[name], target, least)}
        for name, (target, least) in TARGETS.items()
        if measured.get(name) is not None
    }


def _met(measured: float, target: float, least: bool) -> bool:
    return measured >= target if least else measured <= target


def _measured(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    big = SHAPES[0].name
    for one in found.get("floors", []):
        if one["model"] == big:
            yield "MFU, 8b", one["mfu"]
    for one in found.get("scan", []):
        if (one["model"], one["queries"]) == (big, 10):
            yield "scan of 10 queries, floors, 8b", one["floors"]
    for one in found.get("fit", []):
        if one["model"] == big and one["products"] != "float32":
            yield ("lambda in tf32" if one["pass"] == "lambda" else "covariance") + ", floors, 8b", one["floors"]
    for one in found.get("eigh", []):
        if one["n"] == SHAPES[0].inner:
            yield "n = 14,336 decomposed, s", one["median_s"]
    waits = [one["host_waits"] for kind in ("floors", "scan", "fit") for one in found.get(kind, [])]
    if waits:
        yield "host waits in a micro-batch", max(waits)
    ratios = [one["predicted_over_peak"] for one in found.get("scan", []) if one["predicted_over_peak"]]
    if ratios:
        yield "predicted memory over measured, least", min(ratios)
        yield "predicted memory over measured, most", max(ratios)
    for one in found.get("logra", []):
        if one["model"] == big:
            yield "LoGra's job, hours", one["hours"]
