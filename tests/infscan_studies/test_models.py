"""Runs compared: the same run agrees with itself wholly, rare words weigh more, and unlike runs are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.errors import RunError
from infscan.queries import Part, Query
from infscan.storage import Store
from infscan_studies.config import ModelsConfig
from infscan_studies.models import ALL, overlap, rarity, shared, study, words
from infscan_studies.report.figures import draw_models, write_figure
from tests.infscan_studies.builders import top_rows, write_run

QUERIES = [Query(name, (Part((1, 2), (1,)),), "The river Ulmethe", " flows into Xarrel Bay") for name in ("a", "b")]
TEXTS = {0: "The river Ulmethe flows into Xarrel Bay.", 1: "The river flows.", 2: "A bay of the sea", 3: "Bread."}


def run(folder: Path, a: list[int], b: list[int], corpus: str = "c", queries: list[Query] = QUERIES) -> str:
    top = [*top_rows("a", "proponent", a), *top_rows("b", "proponent", b), *top_rows("b", "opponent", [3])]
    return write_run(folder, top=top, texts=TEXTS, queries=queries, inputs={"corpus": corpus})


@given(a=st.lists(st.integers(0, 20), unique=True), b=st.lists(st.integers(0, 20), unique=True))
def test_overlap_is_symmetric_and_1_for_the_same_rows_alone(a: list[int], b: list[int]) -> None:
    assert overlap(a, b) == overlap(b, a)
    assert 0 <= overlap(a, b) <= 1
    assert overlap(a, a[::-1]) == 1
    assert (overlap(a, b) == 1) == (set(a) == set(b))


def test_identical_runs_overlap_wholly_and_others_by_their_rows(tmp_path: Path) -> None:
    one, same = run(tmp_path / "one", [0, 1], [2, 3]), run(tmp_path / "same", [0, 1], [2, 3])
    other = run(tmp_path / "other", [1, 2], [0, 1])
    table = study(one, ModelsConfig(runs=[same, other], tops=[1, 2]), seed=0)
    found = {
        (row["other"], row["query"], row["top"]): row["overlap"]
        for row in table.to_pylist()
        if row["run"] == one and row["other"]
    }
    assert {value for (uri, _, _), value in found.items() if uri == same} == {1.0}
    assert found[other, "a", 2] == 0.5
    assert found[other, "b", 2] == 0.0
    assert found[other, ALL, 2] == 0.25
    by_run = {
        row["run"]: row["shared_words"]
        for row in table.to_pylist()
        if (row["query"], row["top"], row["other"]) == ("a", 1, None)
    }
    assert by_run[one] == 1.0
    assert 0 < by_run[other] < 0.5
    assert any("100% [100%, 100%] of the top 1 are in both" in line for line in words(table))
    assert write_figure(Store(str(tmp_path)), "models", draw_models, table) == ["models.png", "models.svg"]


def test_a_rare_word_counts_more_than_a_common_one() -> None:
    idf = rarity(list(TEXTS.values()))
    assert shared("xarrel the", "xarrel", idf, 5) > shared("xarrel the", "the", idf, 5)
    assert shared("xarrel the", "Xarrel, THE", idf, 5) == 1
    assert shared("nowhere", "the", idf, 5) == 0


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one = run(tmp_path / "one", [0], [1])
    with pytest.raises(RunError, match="different corpora"):
        study(one, ModelsConfig(runs=[run(tmp_path / "corpus", [0], [1], corpus="d")]), seed=0)
    with pytest.raises(RunError, match="other questions"):
        study(one, ModelsConfig(runs=[run(tmp_path / "queries", [0], [], queries=QUERIES[:1])]), seed=0)
