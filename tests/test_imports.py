"""Import rules: which package may import which; who may touch the disk, Ray, DeepSpeed and Hydra (docs/design.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
# A package may import from earlier ones and from itself.
PACKAGES = (
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
    "report",
    "engine",
    "steps",
    "sizing",
    "pipeline",
    "serve",
    "api",
    "cli",
    "__main__",
)
# Packages that may import fewer than the earlier ones: seams and pure arithmetic.
NARROWER = {
    "secrets": set[str](),
    "config": {"errors", "secrets"},
    "storage": {"errors", "secrets"},
    "influence": {"errors"},
}
RAY = ("cluster", "heartbeat", "node_share", "pool", "ray_executor", "worker_group", "metrics")
HYDRA = tuple(f"infscan/config/{module}.py" for module in ("arguments", "commands", "compose", "sweep"))
# package: the modules that may import it, by the start of their path
ONLY_IN = {
    "ray": tuple(f"infscan/engine/{module}.py" for module in RAY),
    "deepspeed": ("infscan/model/load.py",),
    "hydra": (*HYDRA, "infscan/cli.py"),
    "omegaconf": (*HYDRA, "infscan/cli.py"),
    "fsspec": ("infscan/storage/",),
    "s3fs": ("infscan/storage/",),
    "tempfile": ("infscan/storage/",),
    "shutil": ("infscan/storage/",),
    "pickle": (),
}
TORCHLESS = ("infscan/corpus/", "infscan/queries.py", "infscan/storage/", "infscan/config/", "infscan/errors.py")
# The command opens /dev/null where the reader of its output has gone.
MAY_TOUCH_THE_DISK = ("infscan/storage/", "infscan/cli.py")
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

MODULES = sorted(
    path.relative_to(ROOT).as_posix() for package in ("infscan", "jobs") for path in (ROOT / package).rglob("*.py")
)
PACKAGE = [module for module in MODULES if module.startswith("infscan/")]


@cache
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


def package_of(module: str) -> str:
    return module.split("/")[1].removesuffix(".py")


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after some code."""
    code += "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_rules_cover_every_module() -> None:
    assert "infscan.errors.ModelError" in set(imports("infscan/model/load.py"))
    assert {package_of(module) for module in PACKAGE} - {"__init__", "demo"} <= set(PACKAGES)


def test_imports_run_from_later_packages_to_earlier_ones() -> None:
    wrong = []
    for module in PACKAGE:
        package = package_of(module)
        if package == "__init__":
            continue  # the package's front door names what is behind it
        known = [
            name for name in imports(module) if name.split(".")[0] in ("infscan", "infscan_studies", "jobs", "tests")
        ]
        earlier = set(PACKAGES[: PACKAGES.index(package)]) if package in PACKAGES else set[str]()
        allowed = NARROWER.get(package, earlier) | {package}
        wrong += [
            f"{module} imports {name}"
            for name in known
            if not name.startswith("infscan.") or name.split(".")[1] not in allowed
        ]
    assert not wrong


def test_a_package_is_known_in_its_place_alone() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in MODULES
        for name in imports(module)
        if not module.startswith(ONLY_IN.get(name.split(".")[0], ("",)))
    ]
    assert not wrong


def test_the_corpus_and_the_seams_know_no_torch() -> None:
    torchless = [module for module in MODULES if module.startswith(TORCHLESS)]
    known = {module: {name.split(".")[0] for name in imports(module)} for module in torchless}
    assert not [module for module, names in known.items() if names & {"torch", "deepspeed"}]


def test_only_storage_opens_files() -> None:
    wrong = []
    for module in MODULES:
        if not module.startswith(MAY_TOUCH_THE_DISK):
            calls = [node.func for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)]
            wrong += [f"{module}: {name}" for name in map(ast.unparse, calls) if name in DISK_FUNCTIONS]
            wrong += [f"{module}: {c.attr}" for c in calls if isinstance(c, ast.Attribute) and c.attr in DISK_METHODS]
    assert not wrong


def test_the_mathematics_and_the_steps_import_neither_ray_nor_deepspeed() -> None:
    names = [module.removesuffix(".py").replace("/", ".") for module in PACKAGE]
    chosen = [name for name in names if name.split(".")[1] in ("influence", "model", "corpus", "steps")]
    chosen += [f"infscan.engine.{name}" for name in ("executor", "in_process", "schedule", "recovery", "lease")]
    loaded = modules_after("; ".join(f"import {name.removesuffix('.__init__')}" for name in chosen))
    assert not loaded & {"ray", "deepspeed", "hydra", "omegaconf"}


def test_reading_a_run_brings_neither_torch_nor_ray() -> None:
    assert not modules_after("import infscan; infscan.read_top") & {"torch", "ray", "transformers"}


def test_a_command_brings_what_it_needs_and_no_more() -> None:
    """By what is imported, since that is what a start takes: planning needs the model's code, and no cluster."""

    def loaded(*words: str) -> set[str]:
        quiet = "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):"
        run = f"main(None, {list(words)})"
        return modules_after(f"import contextlib, io; from infscan.cli import main\n{quiet}\n    {run}")

    cluster = {"ray", "deepspeed", "s3fs", "botocore", "aiobotocore"}
    planned = loaded("plan", "model=demo", "plan.sequences=100", "plan.queries=2")
    assert "transformers" in planned
    assert not planned & {*cluster, "matplotlib", "duckdb", "polars"}
    for words in (["--help"], ["scan", "--help"], ["status", "no-such-run"]):
        assert not loaded(*words) & {*cluster, "torch", "transformers"}, words


def test_jobs_are_thin() -> None:
    for module in MODULES:
        if module.startswith("jobs/"):
            assert len((ROOT / module).read_text().splitlines()) < 20, module
