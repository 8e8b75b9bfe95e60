"""What a whole job's two processes are forecast to hold is what they hold, on three models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("setting", range(3))
def test_driver_and_rank_hold_what_was_forecast_within_15_percent(setting: int, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/job_memory.py", "--only", str(setting), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = json.loads(out.read_text())
    for process in ("driver", "rank"):
        assert 0.85 <= found[process]["forecast"] / found[process]["peak"] <= 1.15, found
