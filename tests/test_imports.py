"""The house's law: who may know whom, and who may touch the disk, Ray, DeepSpeed and Hydra (docs/design.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A room may import from earlier ones and from itself.
ROOMS = (
    "errors",
    "secrets",
    "config",
    "storage",
    "telemetry",
    "corpus",
    "queries",
    "influence",
    "model",
    "results",
    "passes",
    "sizing",
    "runtime",
    "report",
    "__main__",
)
# Rooms that may know fewer than the earlier ones: seams and pure arithmetic.
NARROWER = {
    "secrets": set[str](),
    "config": {"errors", "secrets"},
    "storage": {"errors", "secrets"},
    "influence": {"errors"},
}
# package: the modules that may import it, by the start of their path
ONLY_IN = {
    "ray": ("infscan/runtime/",),
    "deepspeed": ("infscan/model/load.py",),
    "hydra": ("infscan/config/", "jobs/"),
    "omegaconf": ("infscan/config/", "jobs/"),
    "fsspec": ("infscan/storage/",),
    "s3fs": ("infscan/storage/",),
    "tempfile": ("infscan/storage/", "jobs/"),
    "shutil": ("infscan/storage/", "jobs/"),
    "pickle": (),
}
TORCHLESS = ("infscan/corpus/", "infscan/queries.py", "infscan/storage/", "infscan/config/", "infscan/errors.py")
DISK_METHODS = {
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "mkdir",
    "unlink",
    "rmdir",
    "touch",
    "iterdir",
    "rglob",
    "hardlink_to",
    "symlink_to",
}
DISK_FUNCTIONS = {
    "open",
    "io.open",
    "gzip.open",
    "os.open",
    "os.remove",
    "os.replace",
    "os.makedirs",
    "os.listdir",
    "os.walk",
}
MAY_TOUCH_THE_DISK = ("infscan/storage/", "jobs/")

MODULES = sorted(
    path.relative_to(ROOT).as_posix() for room in ("infscan", "jobs") for path in (ROOT / room).rglob("*.py")
)


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(), module)


def imports(module: str) -> Iterator[str]:
    """Dotted names of everything a module imports, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively; write the whole path"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str:
    return module.split("/")[1].removesuffix(".py")


def test_the_scan_finds_the_modules() -> None:
    assert "infscan/model/load.py" in MODULES
    assert "infscan.errors.ModelError" in set(imports("infscan/model/load.py"))
    assert {room_of(module) for module in MODULES if module.startswith("infscan/")} - {"__init__", "demo"} <= set(ROOMS)


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("infscan/")])
def test_imports_run_from_later_rooms_to_earlier_ones(module: str) -> None:
    known = [name for name in imports(module) if name.split(".")[0] in ("infscan", "infscan_studies", "jobs", "tests")]
    assert not [name for name in known if not name.startswith("infscan.")]
    room = room_of(module)
    if room == "__init__":
        return  # the package's front door names what is behind it
    if room == "demo":
        assert not known
        return
    allowed = NARROWER.get(room, set(ROOMS[: ROOMS.index(room)])) | {room}
    assert {name.split(".")[1] for name in known} <= allowed


@pytest.mark.parametrize("package", list(ONLY_IN))
def test_a_package_is_known_in_its_place_alone(package: str) -> None:
    users = [module for module in MODULES if any(name.split(".")[0] == package for name in imports(module))]
    assert not [module for module in users if not module.startswith(ONLY_IN[package])]


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith(TORCHLESS)])
def test_the_corpus_and_the_seams_know_no_torch(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(module)} & {"torch", "deepspeed"}


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith(MAY_TOUCH_THE_DISK)])
def test_only_storage_opens_files(module: str) -> None:
    calls = [node.func for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)]
    assert not [name for name in map(ast.unparse, calls) if name in DISK_FUNCTIONS]
    assert not [call.attr for call in calls if isinstance(call, ast.Attribute) and call.attr in DISK_METHODS]


def test_reading_a_run_brings_neither_torch_nor_ray() -> None:
    code = "import sys, infscan; infscan.read_top; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_job_that_hydra_reads_is_started_where_secrets_are_refused() -> None:
    for module in MODULES:
        if module.startswith("jobs/") and "hydra" in set(imports(module)):
            assert (ROOT / module).read_text().endswith('if __name__ == "__main__":\n    command(main)\n'), module


def test_jobs_are_thin() -> None:
    for module in MODULES:
        if module.startswith("jobs/"):
            assert len((ROOT / module).read_text().splitlines()) < 100, module
