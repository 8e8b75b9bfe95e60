"""Queries and their translations: lists are compared within pairs and across them, documents by their rank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from infscan.errors import ConfigError, RunError
from infscan.storage import Store
from infscan_studies.config import CrossLingualConfig
from infscan_studies.cross_lingual import ALL, Pair, overlaps, read_pairs, study, words
from infscan_studies.report.figures import draw_cross_lingual, write_figure
from tests.infscan_studies.builders import top_rows, write_run

PAIRS = [
    {"query": "en-0", "translation": "es-0", "query_document": "d7", "translation_document": "d3"},
    {"query": "en-1", "translation": "es-1"},
]


def write_pairs(folder: Path, rows: list[dict[str, str]]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(folder: Path, dense: bool = True) -> str:
    lists = {"en-0": [0, 1, 2], "es-0": [2, 1, 5], "en-1": [3, 4], "es-1": [8, 9]}
    top = [row for query, numbers in lists.items() for row in top_rows(query, "proponent", numbers)]
    scores = {query: np.zeros(10) for query in lists}
    scores["en-0"][[3, 6, 8]] = 2, 5, 3  # d3 comes third
    scores["es-0"][:] = -1
    return write_run(folder / "run", top=top, scores=scores if dense else None)


def test_pairs_are_compared_with_each_other_and_with_what_is_unrelated(tmp_path: Path) -> None:
    table = study(run(tmp_path), CrossLingualConfig(pairs=write_pairs(tmp_path, PAIRS), tops=[2, 3]), seed=0)
    found = {(row["query"], row["top"]): row for row in table.to_pylist() if row["top"]}
    assert (found["en-0", 3]["overlap"], found["en-0", 2]["overlap"]) == (2 / 3, 0.5)
    assert (found["en-1", 3]["overlap"], found["en-1", 3]["unrelated"]) == (0, 0)
    assert found[ALL, 3]["overlap"] == pytest.approx(1 / 3)
    ranks = {row["query"]: (row["document"], row["rank"]) for row in table.to_pylist() if row["rank"]}
    # Ties count for the document: nothing is stronger than d7 among scores that are all the same.
    assert ranks == {"en-0": ("d3", 3), "es-0": ("d7", 1)}
    said = "\n".join(words(table))
    assert "Of the top 3, 33.3% [0.0%, 66.7%] are in both lists" in said
    assert "median rank 2 of 10 sequences, in the top 10 of 2 of 2 queries" in said
    assert write_figure(Store(str(tmp_path)), "x", draw_cross_lingual, table) == ["x.png", "x.svg"]


def test_every_query_overlaps_wholly_with_itself() -> None:
    pairs = [Pair("a", "a"), Pair("b", "b")]
    rows = overlaps({"a": [1, 2], "b": [3, 4]}, pairs, [1, 2], 50, 0)
    assert {row["overlap"] for row in rows} == {1.0}
    assert {row["unrelated"] for row in rows} == {0.0}


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    uri = run(tmp_path)
    french = write_pairs(tmp_path, [*PAIRS, {"query": "en-0", "translation": "fr-0"}])
    with pytest.raises(ConfigError, match=r"'fr-0' has no proponents"):
        study(uri, CrossLingualConfig(pairs=french), seed=0)
    nowhere = write_pairs(tmp_path, [PAIRS[0] | {"translation_document": "nowhere"}, PAIRS[1]])
    with pytest.raises(RunError, match=r"no scanned sequence begins with the document 'nowhere'"):
        study(uri, CrossLingualConfig(pairs=nowhere), seed=0)
    with pytest.raises(ConfigError, match=r"line 2: not a pair"):
        read_pairs(write_pairs(tmp_path, [PAIRS[0], {"query": "en-1"}]))
    with pytest.raises(ConfigError, match=r"1 pairs; give two or more"):
        read_pairs(write_pairs(tmp_path, PAIRS[:1]))
    (tmp_path / "bare").mkdir()
    with pytest.raises(RunError, match=r"scan\.scores=all"):
        study(run(tmp_path / "bare", dense=False), CrossLingualConfig(pairs=write_pairs(tmp_path, PAIRS)), seed=0)
