"""The word-order study of planted documents: ratios to the forward documents' mean, what is on top, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from infscan.errors import ConfigError, RunError
from infscan.storage import Store
from infscan_studies.config import WordOrderConfig
from infscan_studies.demo.facts import Partition
from infscan_studies.report.figures import draw_word_order, write_figure
from infscan_studies.report.word_order import show_question, show_table
from infscan_studies.word_order import ALL, DIFFERENCE, METHODS, forward_on_top, partitioned

PARTITIONS = {
    "f1": Partition.FORWARD,
    "f2": Partition.FORWARD,
    "b1": Partition.FLIPPED,
    "b2": Partition.FLIPPED,
    "c1": Partition.COMPLETION_REMOVED,
    "r1": Partition.RELATION_REMOVED,
}
SCORES = {"f1": 4.0, "f2": 8.0, "b1": 0.6, "b2": -0.6, "c1": -3.0, "r1": 1.5, "other": 5.0, "another": -9.0}


DOCUMENTS = [
    {"id": document, "fact": "fact", "partition": partition.value} for document, partition in PARTITIONS.items()
]
WHOLE = ("completion",)


def of_facts(method: str, **scores: dict[str, float]) -> pa.Table:
    """The study of facts that have the same planted documents, each by its own scores, as `planted` makes it."""
    documents = [row | {"fact": fact} for fact in scores for row in DOCUMENTS]
    table = partitioned([scores], documents, 50, 0, method=method, measures=WHOLE)
    on_top = forward_on_top(scores, documents, WHOLE)
    counts = [on_top["completion", fact] for fact in table["fact"].to_pylist()]
    return table.set_column(table.schema.get_field_index("forward_on_top"), "forward_on_top", pa.array(counts))


def ratios(table: pa.Table, fact: str) -> dict[str, float]:
    return {row["partition"]: row["ratio"] for row in table.to_pylist() if row["fact"] == fact}


def test_ratios_are_of_means_and_forward_is_one() -> None:
    rows = of_facts("EK-FAC", fact=SCORES).to_pylist()
    [forward] = [row for row in rows if row["fact"] == "fact" and row["partition"] == Partition.FORWARD]
    assert (forward["texts"], forward["score"], forward["forward_on_top"]) == (2, 6.0, 1)
    expected = {"forward": 1.0, "flipped": 0.0, "completion-removed": -0.5, "relation-removed": 0.25}
    assert ratios(of_facts("EK-FAC", fact=SCORES), "fact") == pytest.approx(expected)
    assert ratios(of_facts("EK-FAC", fact=SCORES), ALL) == pytest.approx(expected | {DIFFERENCE: -0.25})


@pytest.mark.parametrize(("others", "on_top"), [((), 2), ((5.0,), 1), ((9.0, 9.5), 0), ((-50.0,), 2)])
def test_forward_documents_compete_with_the_whole_corpus(others: tuple[float, ...], on_top: int) -> None:
    scores = {name: score for name, score in SCORES.items() if name in PARTITIONS}
    scores |= {f"x{n}": score for n, score in enumerate(others)}
    found = forward_on_top({"fact": scores}, DOCUMENTS, WHOLE)
    assert found == {("completion", "fact"): on_top, ("completion", ALL): on_top}


def test_ratios_do_not_depend_on_the_scale_of_scores() -> None:
    larger = {name: 1000 * score for name, score in SCORES.items()}
    ours, theirs = of_facts("EK-FAC", fact=larger), of_facts("EK-FAC", fact=SCORES)
    assert ratios(ours, "fact") == pytest.approx(ratios(theirs, "fact"))
    assert ours["forward_on_top"] == theirs["forward_on_top"]


def test_what_is_printed_has_every_fact_and_the_mean(capsys: pytest.CaptureFixture[str]) -> None:
    table = of_facts("EK-FAC", **{"fact-a": SCORES, "fact-b": SCORES | {"b1": 6.6, "b2": 5.4}})
    show_table(table)
    lines = capsys.readouterr().out.splitlines()
    [first] = [line for line in lines if "fact-a" in line]
    [second] = [line for line in lines if "fact-b" in line]
    [mean] = [line for line in lines if " all " in line]
    assert "1/2" in first
    assert "+0.000" in first
    assert "+1.000" in second
    assert "1/2" in second
    assert "+0.500" in mean
    assert "2/4" in mean


def test_methods_are_drawn_apart(tmp_path: Path) -> None:
    table = pa.concat_tables([of_facts(method, a=SCORES, b=SCORES) for method in METHODS])
    store = Store(str(tmp_path))
    write_figure(store, "word_order", draw_word_order, table)
    drawing = store.read("word_order.svg")
    for name in (*METHODS, "completion-removed"):
        assert f">{name}</text>".encode() in drawing


def test_a_run_without_the_facts_queries_is_refused() -> None:
    with pytest.raises(RunError, match=r"has no score for query 'fact'.*study\.planted.*study\.texts"):
        partitioned([{}], DOCUMENTS, 50, 0)
    nothing_forward: list[dict[str, Any]] = [row for row in DOCUMENTS if row["partition"] != "forward"]
    with pytest.raises(ConfigError, match="add some that state the facts"):
        partitioned([{"fact": SCORES}], nothing_forward, 50, 0, measures=WHOLE)


@pytest.mark.parametrize(
    "config", [WordOrderConfig(runs=["other"]), WordOrderConfig(texts="texts.jsonl", dot_product="runs/dot")]
)
def test_settings_of_the_other_kind_of_study_are_refused(config: WordOrderConfig) -> None:
    with pytest.raises(ConfigError, match=r"study\.texts"):
        config.check()


def test_the_question_shows_ranks_and_obeys_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    texts = dict.fromkeys(SCORES, "[bold]x[/bold]\n\x1b[31mred")
    show_question("Who? → \x1b[1mMe", SCORES, texts, PARTITIONS)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = [line.split() for line in out.splitlines() if "[bold]x[/bold]" in line]
    assert [(line[0], line[2]) for line in lines[:2]] == [("1", "f2"), ("2", "other")]
    # Those that state it backwards, with their ranks in the whole corpus.
    assert [(line[0], line[2]) for line in lines[-2:]] == [("5", "b1"), ("6", "b2")]
