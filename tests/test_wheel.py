"""What `pip install` gives: outside the checkout, the wheel has the command, the API, presets, jobs and the demo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A small part of the demo, in one process: what is tested here is what was shipped.
DEMO = (
    *("model=demo", "corpus=demo", "queries=demo", "cluster.backend=in_process", "corpus.max_sequences=24"),
    *("factors=identity", "scan.check_sequences=0", "scan.top_k=2"),
)
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    # A copy: a build leaves files beside its sources, and would ship those of an earlier one.
    for name in ("infscan", "infscan_studies", "conf", "jobs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a command of an environment that has the wheel, and this one's libraries; in an empty folder."""
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # Libraries alone: a .pth file within a folder that is added by one is not read, so the checkout stays out.
    (packages / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    here = folder / "here"
    here.mkdir()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        program = folder / "venv" / "bin" / command[0]
        done = subprocess.run([program, *command[1:]], cwd=here, env=env, capture_output=True, text=True)
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    return run


def test_it_is_the_wheel_that_runs(installed: Run) -> None:
    code = "import infscan, infscan.config.commands as c; print(infscan.__file__); print(c.CONF)"
    package, conf = installed("python", "-c", code).stdout.split()
    assert str(ROOT) not in package + conf
    assert Path(conf).parent == Path(package).parent


def test_the_demo_by_the_command_and_by_python(installed: Run) -> None:
    shown = installed("infscan", "scan", *DEMO, "output=runs/shell").stdout
    assert "Zorlad Pfaff" in shown
    code = (
        "import infscan, json\n"
        f"found = infscan.scan(*{DEMO!r}, output='runs/python')\n"
        "shell = infscan.read_run('runs/shell')\n"
        "print(json.dumps([found.top().num_rows, found.top() == shell.top(), found.uri]))"
    )
    rows, equal, uri = json.loads(installed("python", "-c", code).stdout.splitlines()[-1])
    assert rows > 0
    assert equal
    assert uri.endswith("runs/python")
    assert "finished" in installed("infscan", "status", "runs/shell").stdout


def test_a_sweep(installed: Run) -> None:
    installed("infscan", "scan", "-m", *DEMO, "scan.rank=4,8", "output=runs/sweep")
    shown = json.loads(installed("infscan", "status", "runs/sweep", "--json").stdout)
    assert sorted(name.split(",")[0] for name in shown) == ["scan.rank=4", "scan.rank=8"]
    assert {cell["phase"] for cell in shown.values()} == {"finished"}


def test_help_and_slips(installed: Run) -> None:
    assert "Published rows per query and side." in installed("infscan", "scan", "--help").stdout
    for words, answer in (
        (("scan", "scan.topk=3"), "did you mean scan.top_k?"),
        (("scan", "model=model"), "say model.path=model"),
        (("scan", "model.dtype=float16"), "give one of auto, float32"),
        (("scn",), "did you mean infscan scan?"),
        (("scan", "model=demo"), "corpus.path, queries.path: no value given"),
    ):
        assert answer in installed("infscan", *words, status=2).stderr


@pytest.mark.slow
def test_an_empty_environment_takes_the_wheel_with_all_that_it_needs(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *constraints, str(wheel)], check=True, timeout=1500)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [tmp_path / "venv" / "bin" / "infscan", "scan", "model=demo", "corpus=demo", "queries=demo"]
    done = subprocess.run(
        [*words, "cluster=laptop", "output=runs/demo"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "runs" / "demo" / "_SUCCESS").exists()
