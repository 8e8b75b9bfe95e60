"""The word-order study: ratios to the forward documents' mean, forward documents on top, and what is printed of it."""

from __future__ import annotations

import pytest

from infscan.report.word_order import show_question, show_table
from infscan.studies.facts import Partition
from infscan.studies.word_order import METHODS, compare, to_table

PARTITIONS = {
    "f1": Partition.FORWARD,
    "f2": Partition.FORWARD,
    "b1": Partition.FLIPPED,
    "b2": Partition.FLIPPED,
    "c1": Partition.COMPLETION_REMOVED,
    "r1": Partition.RELATION_REMOVED,
}
SCORES = {"f1": 4.0, "f2": 8.0, "b1": 0.6, "b2": -0.6, "c1": -3.0, "r1": 1.5, "other": 5.0, "another": -9.0}


def test_ratios_are_of_means_and_forward_is_one() -> None:
    found = compare("fact", "first token", "EK-FAC", SCORES, PARTITIONS)
    assert (found.fact, found.measure, found.method, found.forward) == ("fact", "first token", "EK-FAC", 2)
    assert found.ratios == pytest.approx(
        {
            Partition.FORWARD: 1.0,
            Partition.FLIPPED: 0.0,
            Partition.COMPLETION_REMOVED: -0.5,
            Partition.RELATION_REMOVED: 0.25,
        }
    )


@pytest.mark.parametrize(("others", "on_top"), [((), 2), ((5.0,), 1), ((9.0, 9.5), 0), ((-50.0,), 2)])
def test_forward_documents_compete_with_the_whole_corpus(others: tuple[float, ...], on_top: int) -> None:
    scores = {name: score for name, score in SCORES.items() if name in PARTITIONS}
    scores |= {f"x{n}": score for n, score in enumerate(others)}
    assert compare("fact", "completion", "TF-IDF", scores, PARTITIONS).forward_on_top == on_top


def test_ratios_do_not_depend_on_the_scale_of_scores() -> None:
    larger = {name: 1000 * score for name, score in SCORES.items()}
    ours = compare("fact", "completion", "EK-FAC", larger, PARTITIONS)
    theirs = compare("fact", "completion", "EK-FAC", SCORES, PARTITIONS)
    assert ours.ratios == pytest.approx(theirs.ratios)
    assert ours.forward_on_top == theirs.forward_on_top


def test_the_table_has_a_row_per_partition() -> None:
    found = [compare(fact, "completion", method, SCORES, PARTITIONS) for fact in ("a", "b") for method in METHODS]
    rows = to_table(found).to_pylist()
    assert len(rows) == 2 * len(METHODS) * len(Partition)
    assert {(row["fact"], row["method"], row["partition"]) for row in rows} == {
        (fact, method, partition.value) for fact in ("a", "b") for method in METHODS for partition in Partition
    }


def test_what_is_printed_has_every_fact_and_the_mean(capsys: pytest.CaptureFixture[str]) -> None:
    doubled = SCORES | {"b1": 6.6, "b2": 5.4}
    show_table([
        compare("fact-a", "completion", "EK-FAC", SCORES, PARTITIONS),
        compare("fact-b", "completion", "EK-FAC", doubled, PARTITIONS),
    ])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    [first] = [line for line in lines if "fact-a" in line]
    [second] = [line for line in lines if "fact-b" in line]
    [mean] = [line for line in lines if " all " in line]
    assert "1/2" in first
    assert "+0.000" in first
    assert "+1.000" in second
    assert "+0.500" in mean


def test_the_question_shows_ranks_and_obeys_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    texts = dict.fromkeys(SCORES, "[bold]x[/bold]\n\x1b[31mred")
    show_question("Who? → \x1b[1mMe", SCORES, texts, PARTITIONS)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = [line.split() for line in out.splitlines() if "[bold]x[/bold]" in line]
    assert [(line[0], line[2]) for line in lines[:2]] == [("1", "f2"), ("2", "other")]
    # Those that state it backwards, with their ranks in the whole corpus.
    assert [(line[0], line[2]) for line in lines[-2:]] == [("5", "b1"), ("6", "b2")]
