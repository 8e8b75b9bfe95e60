"""scan.query_dtype: a float32 model's tokens are multiplied with queries in bfloat16; what is published is exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from infscan.config import ClusterConfig, Config
from infscan.errors import RunError
from infscan.results.read import read_layers, read_summary, read_tokens, read_top
from infscan.runtime.pool import connect
from jobs.scan import answer
from tests.runtime.builders import small_run

# Every sequence is a candidate, so that both runs refine the same pairs.
EVERY = ("factors=identity", "scan.compression=plain", "scan.candidates=40")


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.shutdown()
    connect(ClusterConfig())
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("narrow")


def test_the_scan_rounds_and_what_is_published_does_not(folder: Path) -> None:
    rounded = small_run(folder, *EVERY, "scan.query_dtype=bfloat16", f"output={folder / 'rounded'}")
    plain = small_run(folder, *EVERY, f"output={folder / 'plain'}")
    answer(rounded)
    answer(plain)
    tops = [read_top(config.output) for config in (rounded, plain)]
    assert tops[0].drop_columns("scan_score").equals(tops[1].drop_columns("scan_score"))
    for read in (read_layers, read_tokens):
        assert read(rounded.output).equals(read(plain.output))
    scanned, exact = (top["scan_score"].to_numpy() for top in tops)
    assert np.corrcoef(scanned, exact)[0, 1] > 0.999
    assert (scanned != exact).any()
    assert read_summary(rounded.output)["approximation"]["pearson"]["mean"] > 0.99


def test_a_run_does_not_go_on_in_another_dtype(folder: Path) -> None:
    config: Config = small_run(folder, *EVERY, f"output={folder / 'plain'}", "scan.query_dtype=bfloat16")
    with pytest.raises(RunError, match=r"scan\.query_dtype"):
        answer(config)
