"""infscan study: every study of the group runs through the job, writes its table and its figures, and speaks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest

from infscan.errors import RunError
from infscan.storage import Store
from infscan_studies import layers, sparsity
from infscan_studies.config import LayersConfig, SparsityConfig
from infscan_studies.report.figures import draw_layers, draw_sparsity, write_figure
from tests.infscan_studies.builders import top_rows, write_run
from tests.infscan_studies.test_layers import rows

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    draws = np.random.default_rng(0)
    return write_run(
        tmp_path_factory.mktemp("study") / "run",
        top=[*top_rows("a", "proponent", [0, 1]), *top_rows("b", "proponent", [0]), *top_rows("b", "opponent", [2])],
        layers=[
            *rows("a", 0, [1, 1, 0, 0, 0, 2]),
            *rows("a", 1, [-1, 3, 0, 0, 0, 0]),
            *rows("b", 0, [0, 0, 5, 5, 0, 0]),
            *rows("b", 2, [0, 0, -5, 5, 0, -3]),
        ],
        scores={"a": draws.standard_t(2, 200), "b": draws.standard_t(3, 200)},
    )


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "infscan", "study", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_job_writes_a_table_and_two_figures_and_says_what_it_cannot_say(run: str) -> None:
    done = job("study=layers", f"run={run}")
    assert done.returncode == 0, done.stderr
    assert "It cannot say" in done.stdout
    table = pq.read_table(f"{run}/studies/layers.parquet")
    assert table.to_pylist() == layers.study(run, LayersConfig(), 0).to_pylist()
    assert Path(run, "studies/layers.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(Path(run, "studies/layers.svg")).getroot().tag.endswith("svg")


def test_a_run_without_dense_scores_is_refused_by_name(tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", top=top_rows("a", "proponent", [0]))
    with pytest.raises(RunError, match=r"scan\.scores=all"):
        sparsity.study(other, SparsityConfig(), 0)


def test_a_figure_is_the_same_for_the_same_table(run: str, tmp_path: Path) -> None:
    table = layers.study(run, LayersConfig(), 0)
    first, again = (Store(str(tmp_path / folder)) for folder in ("first", "again"))
    for store in (first, again):
        assert write_figure(store, "layers", draw_layers, table) == ["layers.png", "layers.svg"]
    for kind in ("png", "svg"):
        assert first.read(f"layers.{kind}") == again.read(f"layers.{kind}")
    # A query's name is text in the drawing.
    assert b">a</text>" in first.read("layers.svg")


def test_the_tails_are_drawn_with_their_laws(run: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_figure(store, "sparsity", draw_sparsity, sparsity.study(run, SparsityConfig(tail=0.3, resamples=20), 0))
    assert store.read("sparsity.svg").count(b"exponent ") == 2
