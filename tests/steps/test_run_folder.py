"""A run's folder is tried before anything is computed, and takes no results where they would be lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from infscan.errors import ConfigError
from infscan.steps.run_folder import open_folder
from tests.steps.runs import small_run


@pytest.mark.parametrize("key", ["output", "factors.path"])
def test_the_copy_that_ray_makes_of_a_submitted_folder_takes_no_results(key: str, tmp_path: Path) -> None:
    """`ray job submit --working-dir . -- ... output=runs/mine`: Ray would remove the answer with the copy."""
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    config = small_run(tmp_path, f"{key}={copy / 'runs' / 'mine'}")
    with pytest.raises(ConfigError, match=f"{key}=.*which Ray removes; give an address on object storage"):
        open_folder(config)
    assert not copy.exists()
