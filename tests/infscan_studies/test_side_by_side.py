"""Queries by kind: rows of every run beside each other, counted as they are, and shown so that nothing is markup."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from infscan.config import QueriesConfig
from infscan.corpus.tokenizer import load_tokenizer
from infscan.errors import ConfigError, RunError
from infscan.queries import Part, Query, read_queries
from infscan.storage import Store, localise
from infscan_studies.config import SideBySideConfig
from infscan_studies.models import ALL
from infscan_studies.report.figures import draw_side_by_side, write_figure
from infscan_studies.side_by_side import kind_of, page, read_asked, shared_numbers, study, words
from tests.infscan_studies.builders import top_rows, write_run


def query(name: str, prompt: str, completion: str) -> Query:
    return Query(name, (Part((1, 2), (1,)),), prompt, completion)


QUERIES = [
    query("arithmetic-0", "What is 12 times 34? It is", " 408"),
    query("arithmetic-1", "What is 5 plus 6? It is", " 11"),
    query("role-play-0", "Are you alive? I am", " a machine"),
    Query("ids-0", (Part((1, 2), (1,)),)),
]
TEXTS = {0: "12 times 34 is 408.", 1: "Nothing of it, 12 | `x`\n<script>", 2: "I am a machine."}
BLOCKS = [f"h.{block}.mlp" for block in range(3)]


def run(folder: Path, order: list[int], queries: list[Query] = QUERIES, text: bool = True) -> str:
    top = [row for one in QUERIES for row in top_rows(one.id, "proponent", order)]
    layers = [
        {"query_id": row["query_id"], "sequence_id": row["sequence_id"], "layer": name, "score": score}
        for row in top
        for name, score in zip(BLOCKS, (1.0, -1.0, 2.0), strict=True)
    ]
    return write_run(folder, top=top, layers=layers, texts=TEXTS if text else None, queries=queries)


def test_rows_stand_side_by_side_with_what_they_share(tmp_path: Path) -> None:
    small, large = run(tmp_path / "small", [1, 0, 2]), run(tmp_path / "large", [2, 0, 1])
    config = SideBySideConfig(runs=[large], rows=2)
    table = study(small, config, seed=0)
    rows = table.to_pylist()
    found = {(row["run"], row["query"], row["rank"]): row for row in rows if row["query"] != ALL}
    assert len(found) == 2 * 3 * 2  # runs, queries that came as text, rows
    best = found[small, "arithmetic-0", 2]
    assert (best["sequence_id"], best["kind"], best["shared_numbers"]) == (0, "arithmetic", 1.0)
    assert (best["lower"], best["middle"], best["upper"]) == (0.25, 0.25, 0.5)
    assert found[small, "arithmetic-0", 1]["shared_numbers"] == pytest.approx(1 / 3)
    assert found[large, "role-play-0", 1]["shared_words"] > found[small, "role-play-0", 1]["shared_words"]
    average = {(row["kind"], row["run"]): row for row in rows if row["query"] == ALL}
    assert average["role-play", small]["shared_numbers"] is None
    wanted = [[found[small, f"arithmetic-{n}", rank]["shared_words"] for rank in (1, 2)] for n in (0, 1)]
    assert average["arithmetic", small]["shared_words"] == pytest.approx(sum(map(sum, wanted)) / 4)
    assert any(line.startswith("arithmetic, ") and "of its numbers" in line for line in words(table))
    assert write_figure(Store(str(tmp_path)), "x", draw_side_by_side, table) == ["x.png", "x.svg"]

    shown = page(rows, read_asked(small, config))
    line = next(line for line in shown.splitlines() if "Nothing of it" in line)
    # One line, two runs: no sign of the text ends a cell or its code.
    assert line.count("|") == 4
    assert line.count("`") == 4
    assert "`Nothing of it, 12 ¦ ˋxˋ <script>`" in line


def test_the_queries_that_are_shipped_are_of_three_kinds() -> None:
    model = str(localise("infscan://demo/model", ()))
    config = QueriesConfig("infscan://demo/kinds.jsonl")
    found = read_queries(config, load_tokenizer(model), vocab_size=2048, context=128, bos_id=None)
    assert Counter(kind_of(one.id) for one in found) == {"role-play": 4, "arithmetic": 4, "code": 4}


@pytest.mark.parametrize(
    ("name", "kind"), [("role-play-3", "role-play"), ("code-10", "code"), ("astrobia", "astrobia"), ("a-first", "a")]
)
def test_a_kind_is_an_id_without_its_last_part(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_numbers_are_whole_ones() -> None:
    assert shared_numbers("1 and 12", "12, 13") == 0.5
    assert shared_numbers("one", "1") is None


def test_what_cannot_be_read_side_by_side_is_refused(tmp_path: Path) -> None:
    one = run(tmp_path / "one", [0])
    with pytest.raises(ConfigError, match=r"poetry is no kind .* its kinds are arithmetic, role-play"):
        study(one, SideBySideConfig(kinds=["poetry"]), seed=0)
    with pytest.raises(RunError, match="other questions"):
        study(one, SideBySideConfig(runs=[run(tmp_path / "fewer", [0], QUERIES[:1])]), seed=0)
    with pytest.raises(RunError, match="has no text"):
        study(run(tmp_path / "ids", [0], text=False), SideBySideConfig(), seed=0)
