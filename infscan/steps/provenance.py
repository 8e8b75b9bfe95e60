"""What made a run: versions, the kind of processor, and the number of the arithmetic. plan.json pins it."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from infscan.errors import RunError
from infscan.steps.run import Run
from infscan.storage.host import processor

# Raised whenever scores, or what is written between start and end of a run, become others: 1 in infscan 0.1, 2 in 0.2.
ARITHMETIC = 3
_PACKAGES = ("infscan", "torch", "transformers", "tokenizers", "numpy")
# Of these a resume may have others, where it is told so (resume.allow_other_versions).
VERSIONS = (*_PACKAGES, "python", "commit")


def made_by() -> dict[str, Any]:
    """Versions, and the processor of the driver's machine. commit: of infscan's code, null where it is no checkout."""
    versions: dict[str, Any] = {name: _version(name) for name in _PACKAGES}
    return versions | {"python": platform.python_version(), "commit": _commit(), "cpu": processor()}


def computed_by(run: Run) -> dict[str, Any]:
    """`made_by`, and how this run's model is computed with."""
    inputs = run.inputs
    device = "cpu" if inputs.device == "cpu" else torch.cuda.get_device_name() if torch.cuda.is_available() else "cuda"
    return {"arithmetic": ARITHMETIC, **made_by()} | {
        "device": device,
        "dtype": inputs.dtype,
        "refine_dtype": inputs.refine_dtype,
        "model_revision": inputs.model_identity.revision,
        # Of the stages after this one, in order.
        **({"later_revisions": [one.inputs.model_identity.revision for one in run.later]} if run.later else {}),
    }


@cache
def _version(name: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(name)
    return None


@lru_cache(maxsize=1)
def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    with suppress(OSError, subprocess.SubprocessError):
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    return None


def check_resumed(uri: str, before: Mapping[str, Any], now: Mapping[str, Any], *, others_allowed: bool) -> list[str]:
    """Hold what made a run's plan to what is to go on with it. Returns what differs and is allowed, as sentences.

    before: of a plan that infscan 0.1 made, empty.

    Raises:
        RunError: for another arithmetic, dtype or device, or (without `others_allowed`) other versions, by name.
    """
    was = before.get("arithmetic", 1)
    if was != now["arithmetic"]:
        raise RunError(
            f"{uri} was begun with arithmetic {was} (infscan {before.get('infscan') or '0.1'}), and this infscan "
            f"computes with arithmetic {now['arithmetic']}: scores of both would stand side by side. Finish it with "
            "the infscan that began it, or give another output=..."
        )
    _refuse(uri, _differing(before, now, ("dtype", "refine_dtype", "device")))
    versions = _differing(before, now, VERSIONS)
    if versions and not others_allowed:
        raise RunError(
            f"{uri} was begun with other versions ({'; '.join(versions)}); finish it with those, or let both stand in "
            "one run with resume.allow_other_versions=true."
        )
    return [
        f"the run was begun with another {said}, and went on with this one; scores may differ in their last bits"
        for said in versions + _differing(before, now, ("cpu",))
    ]


def _refuse(uri: str, differing: list[str]) -> None:
    if differing:
        raise RunError(
            f"{uri} was begun with another way of computing ({'; '.join(differing)}): put that back (model.dtype, the "
            "same kind of device), or give another output=..."
        )


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    return [f"{key}: {before.get(key)!r} -> {now[key]!r}" for key in keys if before.get(key) != now[key]]
