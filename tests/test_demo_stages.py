"""What `make demo-stages` shows: the fine-tuned model is asked, and what it was pretrained on is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from infscan.config import ClusterConfig
from infscan.engine.cluster import connect
from infscan.pipeline import answer
from infscan.results.read import read_summary
from infscan_studies.api import run_answers
from infscan_studies.config import AnswersJob
from infscan_studies.demo.answers import forward_among_ten
from tests.steps.runs import compose

pytestmark = pytest.mark.slow

ANSWERS = ("model=demo", "corpus=demo", "queries=answers", "cluster=laptop", "scan.scores=all", "scan.top_k=10")
RUNS = {
    "multi-stage": ("stages=demo",),
    "single-stage": ("model.path=infscan://demo/model-answers",),
    "dot-product": ("stages=demo", "factors=identity", "scan.compression=plain"),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The three runs of `make demo-stages`."""
    folder = tmp_path_factory.mktemp("demo-stages")
    ray.shutdown()
    connect(ClusterConfig(num_workers=2))
    for name, settings in RUNS.items():
        answer(compose("scan", *ANSWERS, *settings, f"output={folder / name}"))
    yield folder
    ray.shutdown()


def test_the_pretraining_documents_of_every_fact_are_found(demo: Path) -> None:
    """Of each whole answer's ten strongest documents at least five state the fact, and more than without curvature."""
    found = {name: forward_among_ten(str(demo / name), "") for name in RUNS}
    assert min(found["multi-stage"]) >= 5
    assert sum(found["multi-stage"]) >= 42
    assert sum(found["multi-stage"]) > sum(found["dot-product"])


def test_every_run_scans_the_pretraining_corpus_and_those_with_stages_go_through_the_second(demo: Path) -> None:
    summaries = {name: read_summary(str(demo / name)) for name in RUNS}
    assert {summary["phases"]["scan"]["sequences"] for summary in summaries.values()} == {1644}
    assert [name for name in RUNS if (demo / name / "stages" / "2" / "vectors").exists()] == [
        "multi-stage",
        "dot-product",
    ]


def test_what_is_printed_is_those_counts(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_answers(AnswersJob({name: str(demo / name) for name in RUNS})).show()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 + 2 * len(RUNS)
    for name in RUNS:
        counts = forward_among_ten(str(demo / name), "")
        assert f"{name:<14} whole answer  {sum(counts):>3} of 60   {counts}" in said
