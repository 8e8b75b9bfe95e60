"""What `make demo` shows, held to account: the planted documents through the whole job, and the baselines beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from infscan.config import ClusterConfig
from infscan.engine.cluster import connect
from infscan.pipeline import answer
from infscan.results.read import read_top
from infscan_studies.config import PLANTED, WordOrderConfig
from infscan_studies.demo.facts import Partition
from infscan_studies.word_order import ALL, planted_partitions, study
from tests.steps.runs import compose

Row = dict[str, Any]
DEMO = ("model=demo", "corpus=demo", "queries=demo", "cluster=laptop", "scan.scores=all", "scan.top_k=10")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The two runs of `make demo`: EK-FAC, and the gradient dot product over the same prepared corpus."""
    folder = tmp_path_factory.mktemp("demo")
    ray.shutdown()
    connect(ClusterConfig(num_workers=2))
    answer(compose("scan", *DEMO, f"output={folder / 'ekfac'}"))
    baseline = (f"corpus.path={folder / 'ekfac' / 'corpus'}", "factors=identity", "scan.compression=plain")
    answer(compose("scan", *DEMO, *baseline, f"output={folder / 'dot-product'}"))
    yield folder
    ray.shutdown()


@pytest.fixture(scope="module")
def found(demo: Path) -> list[Row]:
    return study(str(demo / "ekfac"), WordOrderConfig(dot_product=str(demo / "dot-product")), 0).to_pylist()


def of(found: list[Row], measure: str, method: str, partition: Partition = Partition.FORWARD) -> list[Row]:
    """A row per fact."""
    mine = [row for row in found if (row["measure"], row["method"], row["partition"]) == (measure, method, partition)]
    return [row for row in mine if row["fact"] != ALL]


@pytest.mark.parametrize("measure", ["completion", "first token"])
def test_forward_documents_fill_the_top(found: list[Row], measure: str) -> None:
    assert [row["forward_on_top"] for row in of(found, measure, "EK-FAC")] == [10] * 6


def test_published_rows_are_the_forward_documents(demo: Path) -> None:
    rows = [row for row in read_top(str(demo / "ekfac")).to_pylist() if row["side"] == "proponent"]
    for fact, partitions in planted_partitions(PLANTED).items():
        for query in (fact, f"{fact}-first"):
            documents = {row["document_id"] for row in rows if row["query_id"] == query}
            assert {partitions.get(document) for document in documents} == {Partition.FORWARD}
            assert len(documents) == 10


@pytest.mark.parametrize("partition", [Partition.FLIPPED, Partition.RELATION_REMOVED])
def test_word_order_matters_for_the_first_token_alone(found: list[Row], partition: Partition) -> None:
    first = [row["ratio"] for row in of(found, "first token", "EK-FAC", partition)]
    whole = [row["ratio"] for row in of(found, "completion", "EK-FAC", partition)]
    assert abs(np.mean(first)) < 0.07
    assert max(map(abs, first)) < 0.2
    assert min(whole) > 0.25


def test_the_baselines_do_worse(found: list[Row]) -> None:
    def on_top(method: str) -> int:
        return sum(row["forward_on_top"] for row in of(found, "completion", method))

    assert on_top("EK-FAC") > on_top("TF-IDF")
    assert on_top("EK-FAC") > on_top("dot product")
