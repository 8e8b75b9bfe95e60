"""scan.refine_dtype and scan.query_dtype: what finds candidates is in bfloat16, what is published of them float32's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infscan.config import Backend, Config
from infscan.config.jobs import ExplainJob
from infscan.errors import RunError
from infscan.results.read import read_layers, read_summary, read_tokens, read_top
from infscan.steps.explain import explain
from infscan.steps.finished import reopen
from tests.steps.runs import answer_here, small_run

# Every sequence is a candidate; without factors nothing but the model tells the two runs apart.
EVERY = ("factors=identity", "scan.compression=plain", "scan.candidates=40")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dtypes")


@pytest.fixture(scope="module")
def mixed(folder: Path) -> Config:
    config = small_run(
        folder, *EVERY, "model.dtype=bfloat16", "scan.refine_dtype=float32", f"output={folder / 'mixed'}"
    )
    answer_here(config)
    return config


@pytest.fixture(scope="module")
def wide(folder: Path) -> Config:
    config = small_run(folder, *EVERY, "scan.refine_dtype=float32", f"output={folder / 'wide'}")
    answer_here(config)
    return config


# What the scan's own scores, or log-probabilities in its dtype, say of a row.
OF_THE_SCAN = ["scan_score", "z", "share", "stands_out", "score_per_nat"]


def published(config: Config) -> list[list[dict[str, Any]]]:
    """Rows, margins by layer and by token, without what the scan itself gave."""
    top = [
        {key: value for key, value in row.items() if key not in OF_THE_SCAN}
        for row in read_top(config.output).to_pylist()
    ]
    return [top, read_layers(config.output).to_pylist(), read_tokens(config.output).to_pylist()]


def test_the_rows_and_margins_are_those_of_a_float32_run(mixed: Config, wide: Config) -> None:
    assert published(mixed) == published(wide)
    scanned, exact = (read_top(config.output)["scan_score"].to_numpy() for config in (mixed, wide))
    assert scanned == pytest.approx(exact, rel=0.1)
    assert (scanned != exact).any()


def test_workers_start_again_for_another_dtype_and_stay_for_the_same(mixed: Config, wide: Config) -> None:
    for config, generations in ((mixed, 2), (wide, 1)):
        ranks = read_summary(config.output)["workers"]["ranks"]
        assert len(ranks) == generations
        assert all(rank["peak_bytes"] > 0 for worker in ranks for rank in worker)


def test_a_row_is_explained_as_it_was_scored(mixed: Config) -> None:
    job = ExplainJob(run=mixed.output, rows=2, own_tokens=False)
    with reopen(job.run, replace(job.cluster, backend=Backend.in_process)) as run:
        found = explain(run, job)
    scores = {(row["query_id"], row["sequence_id"]): row["score"] for row in read_top(mixed.output).to_pylist()}
    rows = found["rows"].to_pylist()
    assert rows
    for row in rows:
        assert row["score"] == pytest.approx(scores[row["query_id"], int(row["sequence_id"])], rel=1e-5)


def test_products_with_queries_round_and_what_is_published_does_not(folder: Path, wide: Config) -> None:
    """The model is float32's, the queries are laid out in bfloat16."""
    rounded = small_run(
        folder,
        *EVERY,
        "scan.refine_dtype=float32",
        "scan.query_dtype=bfloat16",
        f"output={folder / 'rounded'}",
    )
    answer_here(rounded)
    tops = [read_top(config.output) for config in (rounded, wide)]
    assert tops[0].drop_columns(OF_THE_SCAN).equals(tops[1].drop_columns(OF_THE_SCAN))
    for read in (read_layers, read_tokens):
        assert read(rounded.output).equals(read(wide.output))
    scanned, exact = (top["scan_score"].to_numpy() for top in tops)
    assert np.corrcoef(scanned, exact)[0, 1] > 0.999
    assert (scanned != exact).any()
    assert read_summary(rounded.output)["approximation"]["pearson"]["mean"] > 0.99


def test_a_run_does_not_go_on_with_queries_in_another_dtype(folder: Path, wide: Config) -> None:
    config = small_run(
        folder, *EVERY, "scan.refine_dtype=float32", "scan.query_dtype=bfloat16", f"output={wide.output}"
    )
    with pytest.raises(RunError, match=r"scan\.query_dtype"):
        answer_here(config)
