"""Six partitions from any facts: each text has what its partition says, and ratios are put to the reworded texts."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from infscan.errors import ConfigError, RunError
from infscan_studies.demo.facts import FACTS, Fact, Partition, partition_documents
from infscan_studies.partitions import Order, read_facts, texts_of
from infscan_studies.word_order import ALL, DIFFERENCE, partitioned, words


def user_facts(folder: Path, *changes: dict[str, object]) -> str:
    rows = [
        {
            "id": f"fact{n}",
            "prompt": f"The {thing} of Upper Quorl is",
            "completion": f" {name}",
            "subject": "Upper Quorl",
            "flipped": [f"{name} is the {thing} of Upper Quorl"],
        }
        for n, (thing, name) in enumerate([("mayor", "Hesk Brann"), ("patron", "Olva Treen"), ("river", "Mirr")])
    ]
    for row, change in zip(rows, changes, strict=False):
        row |= change
        row |= {}
    path = folder / "facts.jsonl"
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("source", ["demo", "user"])
def test_every_text_is_what_its_partition_says(source: str, tmp_path: Path) -> None:
    facts: list[Fact] = list(FACTS) if source == "demo" else read_facts(user_facts(tmp_path))
    following = dict(zip([fact.id for fact in facts], [*facts[1:], facts[0]], strict=True))
    by_id = {fact.id: fact for fact in facts}
    texts = texts_of(facts)
    assert len({text["id"] for text in texts}) == len(texts)
    for text in texts:
        fact, other = by_id[text["fact"]], following[text["fact"]]
        has = {
            "core": fact.core in text["text"],
            "completion": fact.completion.strip() in text["text"],
            "changed": fact.prompt + other.completion in text["text"],
            "other": other.core in text["text"],
            "subject": fact.subject in text["text"] or fact.opening in text["text"],
        }
        expected = {
            Order.REWORDED: ["core", "completion", "subject"],
            Order.COMPLETION_REMOVED: ["subject"],
            Order.MEANING_CHANGED: ["changed", "subject"],
            Order.IRRELEVANT: ["other"],
            Order.FLIPPED: ["completion", "subject"],
            Order.RELATION_REMOVED: ["completion", "subject"],
        }[Order(text["partition"])]
        if source == "user" and text["partition"] == Order.IRRELEVANT:
            has["subject"] = False  # these facts share their subject
        assert [name for name, there in has.items() if there] == expected, text
    counts = {order: sum(text["partition"] == order for text in texts) // len(facts) for order in Order}
    assert list(counts.values()) == [10, 4, 4, 4, 6, 4]


def test_the_demos_texts_are_its_planted_documents() -> None:
    texts = {text["text"] for text in texts_of(FACTS)}
    assert {document.text for document in partition_documents(FACTS[0], Partition.FLIPPED)} <= texts


def test_ratios_are_to_the_reworded_texts_of_the_same_fact() -> None:
    texts = texts_of(FACTS[:3])
    worth = dict(zip(Order, (10.0, 1.0, 2.0, 0.0, 5.0, -5.0), strict=True))
    scale = {fact.id: 3.0**n for n, fact in enumerate(FACTS[:3])}
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for text in texts:
        for query in text["queries"]:
            score = scale[text["fact"]] * worth[Order(text["partition"])]
            scores[query][text["id"]] = 2 * score if "first" in query else score
    table = partitioned([scores], texts, 50, seed=0)
    for row in table.to_pylist():
        expected = 1.0 if row["partition"] == DIFFERENCE else worth[Order(row["partition"])] / 10
        assert row["ratio"] == pytest.approx(expected)
        if row["fact"] == ALL:
            assert row["low"] == pytest.approx(row["ratio"]) == row["high"]
    said = "\n".join(words(table))
    assert "flipped +0.50 [+0.50, +0.50], relation-removed -0.50" in said
    assert "flipped less relation-removed +1.00 [+1.00, +1.00]" in said
    with pytest.raises(RunError, match="has no score for query"):
        partitioned([{}], texts, 50, seed=0)


def test_models_are_averaged_and_drawn_anew() -> None:
    """A model's own scale does not count; where models differ, so does the interval."""
    texts = texts_of(FACTS[:2])

    def model(flipped: float, scale: float) -> dict[str, dict[str, float]]:
        worth = dict.fromkeys(Order, 1.0) | {Order.FLIPPED: flipped}
        mine = {text["id"]: scale * worth[Order(text["partition"])] for text in texts}
        return {query: mine for text in texts for query in text["queries"]}

    table = partitioned([model(0.2, 1), model(0.4, 100), model(0.6, 0.01)], texts, 500, seed=0)
    row = next(row for row in table.to_pylist() if (row["fact"], row["partition"]) == (ALL, Order.FLIPPED))
    assert row["ratio"] == pytest.approx(0.4)
    assert 0.2 <= row["low"] < 0.3 < 0.5 < row["high"] <= 0.6
    assert "2 facts and 3 models" in words(table.replace_schema_metadata({"models": "3"}))[0]


def test_facts_that_cannot_make_texts_are_refused_with_their_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2: not a fact"):
        read_facts(user_facts(tmp_path, {}, {"subject": None}))
    with pytest.raises(ConfigError, match="distinct ids"):
        read_facts(user_facts(tmp_path, {}, {"id": "fact0"}))
