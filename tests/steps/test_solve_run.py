"""factors.solver=cg through the whole job: stored with the run, found again, the same for any number of workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from infscan.config import Config
from infscan.errors import ConfigError
from infscan.results.manifest import SUCCESS
from infscan.results.read import read_summary, read_top
from infscan.results.tensor_files import read_tensors
from infscan.steps.solve import FOLDER
from infscan.storage import Store
from tests.steps.runs import answer_here, small_run

CG = ("factors=cg", "factors.iteration.steps=6", "scan.check_sequences=20")


def solutions(config: Config) -> dict[str, bytes]:
    """Every solution's entries, by file."""
    store = Store(config.output)
    files = {entry.name for entry in store.list(FOLDER)}
    return {
        name: b"".join(tensor.numpy().tobytes() for _, tensor in sorted(read_tensors(store, name).items()))
        for name in files
    }


def test_solutions_are_kept_and_the_scan_follows_them(tmp_path: Path) -> None:
    config = small_run(tmp_path, *CG)
    answer_here(config)
    summary = read_summary(config.output)
    residuals = summary["iteration"]["queries"]
    assert set(residuals) == {"q0", "q1", "q2"}
    assert all(row["residual"] < row["ekfac_residual"] and row["products"] == 6 for row in residuals.values())
    assert any("factors.iteration.steps" in warning for warning in summary["warnings"])
    # The compression is judged against the solutions at full rank.
    assert summary["approximation"]["pearson"]["min"] > 0.9

    found, top = solutions(config), read_top(config.output)
    store = Store(config.output)
    one = min(found)
    store.remove(one)
    store.remove(SUCCESS)
    kept = {entry.name: entry.etag for entry in store.list(FOLDER)}
    answer_here(config)
    assert {entry.name: entry.etag for entry in store.list(FOLDER) if entry.name in kept} == kept
    assert solutions(config) == found
    assert read_top(config.output) == top

    two = small_run(tmp_path, *CG, "cluster.num_workers=2", f"output={tmp_path / 'two'}")
    answer_here(two)
    assert solutions(two) == found
    assert read_top(two.output) == top


def test_checkpointed_activations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"factors\.solver=cg .* factors\.solver=ekfac"):
        small_run(tmp_path, "factors=cg", "model.gradient_checkpointing=true")
