"""The kit for a GPU's first minutes goes its whole way on a CPU, without what such a machine lacks."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from infscan.errors import ConfigError
from infscan.sizing.devices import Rates, calibration
from tests.gpu.kit import sharded
from tests.gpu.kit.forecast import targets
from tests.gpu.kit.record import Case, Check, Record
from tests.gpu.kit.shapes import SMALL

ROOT = Path(__file__).parent.parent
# Beside torch, transformers, safetensors, pyarrow, fsspec and numpy, and what these bring, a GPU's image may have none.
LACKING = (
    *("ray", "deepspeed", "hydra", "omegaconf", "botocore", "boto3", "s3fs", "aiobotocore", "aiohttp", "zstandard"),
    *("pytest", "hypothesis", "rich", "psutil", "duckdb", "polars", "pandas", "scipy"),
)
# They are not found, as where they were never installed.
NOT_FOUND = f"""
import runpy, sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
lacking = {set(LACKING)!r}
PathFinder.find_spec = classmethod(lambda cls, name, path=None, target=None: (
    None if name.partition(".")[0] in lacking else found(name, path, target)))
"""
WITHOUT = f"""{NOT_FOUND}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# What computes and what the steps are: all of it, not what the kit happens to go through.
PACKAGES = ("influence", "model", "corpus", "results", "storage", "sizing", "steps", "config", "queries")
# These take what a person types, with Hydra, or print for one.
FOR_PEOPLE = {f"infscan.config.{name}" for name in ("arguments", "commands", "compose", "sweep")}
FOR_PEOPLE |= {"infscan.sizing.show"}


def verify(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, str(ROOT / "tests/gpu/verify.py"), "--device", "cpu", "--small"]
    return subprocess.run([*command, "--out", str(out), *arguments], capture_output=True, text=True, cwd=out.parent)


def test_the_kit_runs_on_a_cpu_without_what_a_gpu_image_lacks(tmp_path: Path) -> None:
    done = verify(tmp_path / "out")
    found = json.loads((tmp_path / "out/verify.json").read_text())
    assert done.returncode == 0, found.get("errors") or done.stderr[-2000:]
    assert not found["errors"]
    assert not found["skipped"]
    assert {"checks", "ceilings", "floors", "scan", "fit", "eigh", "logra", "calibration", "targets"} <= found.keys()
    fsdp2, zero3, losses = found["sharding"]
    assert (fsdp2["sharding"], fsdp2["ranks"], losses["ok"]) == ("fsdp2", 2, True)
    assert zero3["needs"] == "deepspeed, which is not installed"
    assert all(check["ok"] for check in found["checks"])
    assert len(found["checks"]) > 25
    assert [one["queries"] for one in found["scan"]] == [10, 256, 1000]
    assert {one["host_waits"] for kind in ("floors", "scan", "fit") for one in found[kind]} == {0}
    # Of the targets, what a tiny shape says anything of.
    assert found["targets"] == {"host waits in a micro-batch": {"target": 0, "measured": 0, "met": True}}
    # What it measured is what a plan reads.
    read = calibration(str(tmp_path / "out"))
    assert read.rates == calibration(str(tmp_path / "out/verify.json")).rates
    assert read.rates.model["float32"] == found["floors"][0]["flops"]
    assert found["logra"][0]["hours"] > 0
    unknown = {name for name, hours in found["logra"][0]["parts"].items() if hours is None}
    assert unknown == {"workers", "publish"}


def test_what_takes_two_cards_says_so_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (said,) = sharded.compared(SMALL, "cuda:0", tmp_path)
    assert said == {"model": "small", "needs": "two cards, and there is 1"}


@pytest.mark.slow
def test_both_ways_to_share_a_model_give_the_whole_models_losses(tmp_path: Path) -> None:
    *ways, first, second, told = sharded.compared(SMALL, "cpu", tmp_path)
    assert [one["sharding"] for one in ways if isinstance(one, dict)] == list(sharded.WAYS)
    assert isinstance(first, Check)
    assert isinstance(second, Check)
    assert first.ok
    assert second.ok
    assert isinstance(told, dict)
    assert told["fsdp2_wins"] == (told["fsdp2_over_zero3"] < sharded.KEPT_BELOW)


def test_the_mathematics_and_the_steps_import_without_what_a_gpu_image_lacks() -> None:
    paths = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "infscan").rglob("*.py")]
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths if path.parts[1] in PACKAGES}
    assert len(names) > 100
    code = f"{NOT_FOUND}import importlib\nfor name in {sorted(names - FOR_PEOPLE)!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_it_is_python_that_3_12_reads() -> None:
    for folder in ("infscan", "tests/gpu", "tests/steps"):
        for path in (ROOT / folder).rglob("*.py"):
            ast.parse(path.read_text(), str(path), feature_version=(3, 12))


def test_what_no_longer_fits_the_budget_is_skipped_and_said(tmp_path: Path) -> None:
    record = Record(tmp_path / "verify.json", budget=5.0)
    record.run(Case("short", "checks", lambda: [Check("a", "float32", 1e-6, 1e-5)], needs=1.0))
    record.run(Case("long", "checks", list, needs=6.0))
    found = json.loads(record.path.read_text())
    assert [check["name"] for check in found["checks"]] == ["a"]
    assert [one["case"] for one in found["skipped"]] == ["long"]
    assert found["ok"]


def test_a_case_that_breaks_off_keeps_what_it_had_found_and_the_next_runs(tmp_path: Path) -> None:
    def breaking() -> object:
        yield Check("before", "float32", 0.0, 1.0)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    record = Record(tmp_path / "verify.json", budget=5.0)
    record.run(Case("breaking", "checks", breaking, needs=0.0))  # type: ignore[arg-type]
    record.run(Case("next", "checks", lambda: [Check("after", "float32", float("nan"), 1.0)], needs=0.0))
    found = json.loads(record.path.read_text())
    assert [check["name"] for check in found["checks"]] == ["before", "after"]
    (error,) = found["errors"]
    assert error["case"] == "breaking"
    assert "illegal memory" in error["error"]
    # NaN is within no limit.
    assert (found["ok"], found["checks"][1]["ok"]) == (False, False)


@pytest.mark.parametrize(("content", "reason"), [(None, "no such file"), ("{}", "calibration"), ("[", "Expecting")])
def test_what_is_no_calibration_is_refused(tmp_path: Path, content: str | None, reason: str) -> None:
    if content is not None:
        (tmp_path / "verify.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"plan\.calibration=.*{reason}.*run it on a card"):
        calibration(str(tmp_path))


def test_measured_rates_take_the_place_of_the_tables_and_others_stay() -> None:
    table = Rates({"bfloat16": 5.0, "float32": 1.0}, {"tf32": 2.0}, eigh=3.0, link=4.0)
    assert table.known(Rates({"bfloat16": 6.0}, {"moments": 7.0}, eigh=8.0)) == Rates(
        {"bfloat16": 6.0, "float32": 1.0}, {"tf32": 2.0, "moments": 7.0}, eigh=8.0, link=4.0
    )


def test_targets_are_judged_by_what_was_measured_alone() -> None:
    scan = {"model": "8b", "queries": 10, "floors": 1.2, "host_waits": 0, "predicted_over_peak": 1.0}
    found = targets({"scan": [scan], "floors": [{"model": "8b", "mfu": 0.5, "host_waits": 0}]})
    met = {name: one["met"] for name, one in found.items()}
    assert met == {
        "MFU, 8b": True, "scan of 10 queries, floors, 8b": False, "host waits in a micro-batch": True,
        "predicted memory over measured, least": True, "predicted memory over measured, most": True,
    }  # fmt: skip
