"""What the corpus says is shown, and never obeyed: no markup, no escape, no line of its own."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.report.terminal import asked, excerpt, folded, one_line, show, window
from infscan.results.answers import NOT_FOUND
from infscan.results.manifest import SUCCESS
from infscan.results.read import read_top
from infscan.results.schema import ANSWERS, QUERIES, read_parquet, to_parquet
from infscan.storage import Store
from tests.results.builders import ROWS, margins_of, published, publisher, ranked

COUNTS = {"counts": {"scanned": {"sequences": 1644, "tokens": 91000}}}
NASTY = {
    "markup": "[bold red]loud[/bold red] [link=http://x]here[/link] [/]",
    "ANSI escapes": "\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x07 \x9b2J",
    "newlines": "first\nsecond\r\nthird\x0bfourth\u2028fifth\u0085sixth\ttab",
    "bidirectional marks": "abc\u202edef\u2066ghi\u200f",
    "other controls": "a\x00b\x08c\x7fd\ue000e",
}


def question(query_id: str, **changes: Any) -> dict[str, Any]:
    row = {"id": query_id, "measure": "completion", "prompt": "The capital is", "completion": " Paris", "parts": []}
    return row | changes


def a_run(
    folder: Path, text: str | None, document: str = "doc", questions: list[dict[str, Any]] | None = None
) -> Store:
    """The published run of tests/results, with this text and document id in every row."""
    store = Store(str(folder))
    published(store)
    made = publisher(store, None if text is None else lambda _: text)
    wanted = [("shard-000000", np.asarray([1, 2, 3])), ("shard-000001", np.asarray([11, 12]))]
    documents = made.documents(wanted)
    documents.ids = pa.array([document] * len(documents.ids), pa.string())
    made.write_rows(ranked(ROWS), margins_of(ROWS), documents, 5)
    made.write_sequences(wanted, documents)
    made.remove_stale()
    asked_for = questions or [question("alpha"), question("beta#0"), question("beta#1")]
    store.write("queries/queries.jsonl", "".join(json.dumps(q, ensure_ascii=False) + "\n" for q in asked_for).encode())
    store.write_json("summary.json", COUNTS)
    store.write(SUCCESS, b"")
    return store


def instead(store: Store, **columns: pa.Array) -> None:
    """Put other columns into the run's table top."""
    [name] = store.names("top")
    table = read_parquet(store, name)
    for column, values in columns.items():
        table = table.set_column(table.column_names.index(column), column, values)
    store.write(name, to_parquet(table.replace_schema_metadata(None), {}))


def shown(store: Store, capsys: pytest.CaptureFixture[str], **options: int) -> list[str]:
    capsys.readouterr()
    show(store.uri, **options)
    out = capsys.readouterr().out
    assert all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp", "Co") for c in out)
    return out.split("\n")


def test_the_strongest_of_each_side_by_query(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(a_run(tmp_path, "some words"), capsys)
    start = lines.index("alpha: The capital is → Paris")
    assert [line.split()[:2] for line in lines[start + 1 : start + 6]] == [
        ["+1", "+5"],
        ["+2", "+3"],
        ["+3", "+2"],
        ["-1", "-4"],
        ["-2", "-1"],
    ]
    assert all(line.endswith("some words") for line in lines[start + 1 : start + 6])
    assert lines[lines.index("beta#0: The capital is → Paris") + 1] == "  no sequence moved it"
    assert "1,644 sequences, 91,000 tokens scanned." in lines
    assert any(line.strip().startswith("top/") for line in lines)
    fewer = shown(a_run(tmp_path, "some words"), capsys, rows=1)
    assert sum(line.endswith("some words") for line in fewer) == 3


@pytest.mark.parametrize("kind", NASTY)
@pytest.mark.parametrize("where", ["text", "document id", "prompt", "completion"])
def test_nothing_of_the_corpus_is_obeyed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, where: str
) -> None:
    """The same number of lines as for harmless text, and every printable character as it is."""
    text, nasty = "harmless", NASTY[kind]
    plain = shown(a_run(tmp_path / "plain", text), capsys)
    questions = [question("alpha", **({where: nasty} if where in ("prompt", "completion") else {})), question("beta#1")]
    run = a_run(
        tmp_path / "nasty",
        nasty if where == "text" else text,
        nasty if where == "document id" else "doc",
        [*questions[:1], question("beta#0"), *questions[1:]],
    )
    lines = shown(run, capsys)
    assert len(lines) == len(plain)
    wanted = one_line(nasty)[:32]
    assert any(wanted in line for line in lines)
    assert all(word in "\n".join(lines) for word in one_line(nasty)[:32].split())


def test_token_ids_stand_where_there_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(a_run(tmp_path, None), capsys)
    assert lines[lines.index("alpha: The capital is → Paris") + 1].endswith("1 2 3 4 5")


def test_a_run_folder_named_like_markup_is_shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = [question(f"q{n}") for n in range(15)]
    run = a_run(tmp_path / "[bold]run[red]", "words", questions=many)
    lines = shown(run, capsys)
    assert run.uri in lines
    assert f"... and 3 queries more in {run.uri}/top/" in lines


def test_a_window_is_about_the_strongest_token() -> None:
    texts = [f" w{n}" for n in range(60)]
    scores = [0.1] * 60
    for strongest in (0, 5, 40, 59):
        line = window(texts, [*scores[:strongest], -9.0, *scores[strongest + 1 :]], 40)
        assert f"w{strongest}" in line.split()
        assert len(line) <= 40
        assert line.startswith("…") == (strongest > 4)


def test_log_probabilities_verdict_and_given_ids_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = {"input_ids": [7, 8, 9], "positions": [1, 2], "sign": 1.0}
    given_ids = question("alpha", prompt=None, completion=None, parts=[ids])
    store = a_run(tmp_path, "words", questions=[given_ids, question("beta#0")])
    row = {"query_id": "alpha", "measure": "completion", "tokens": ["The", " a", " b"], "measured": [1, 2]}
    known = row | {"log_probability": -5.0, "contrast_log_probability": -30.0, "contrast_measured": [1]}
    store.write("queries/queries.parquet", to_parquet(pa.Table.from_pylist([known], schema=QUERIES), {}))
    answer = {"query_id": "alpha", "found": False, "verdict": NOT_FOUND}
    for name in store.names("answers"):
        store.remove(name)
    store.write("answers/part-00000.parquet", to_parquet(pa.Table.from_pylist([answer], schema=ANSWERS), {}))
    lines = shown(store, capsys)
    start = lines.index("alpha: The → a b")
    assert (
        lines[start + 1] == "  the model gives it -5.00 nats, -2.50 a token; the contrast -30.00 nats, -30.00 a token"
    )
    assert lines[start + 2] == f"  {NOT_FOUND}"
    assert sum(NOT_FOUND in line for line in lines) == 1


@given(st.text(max_size=300), st.integers(2, 100))
def test_an_excerpt_is_one_printable_line(text: str, length: int) -> None:
    line = excerpt(text, [], length)
    assert len(line) <= length
    assert line.isprintable()
    assert excerpt(line, [], length) in (line, " ".join(line.split()))


def test_a_question_says_what_was_measured() -> None:
    ids = {"input_ids": [1, 2, 3, 4], "positions": [2, 3], "sign": 1.0}
    assert asked(question("q")) == "The capital is → Paris"
    assert asked(question("q", measure="first")) == "The capital is → Paris (its first token)"
    assert asked(question("q#0", measure="tokens")) == "The capital is → Paris (one of its tokens)"
    assert asked(question("q", prompt=None, completion=None, parts=[ids])) == "4 tokens, measured on 2"


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=20), st.integers(1, 5))
def test_hubs_are_folded_and_what_is_behind_them_is_shown(rows: list[tuple[int, bool]], count: int) -> None:
    """Nothing up to the last row that is shown is left out: it is shown, or named in the fold."""
    given_ = [
        {"side": "opponent", "rank": rank, "hub": hub, "states_completion": states}
        for rank, (hub, states) in enumerate(rows, start=1)
    ]
    kept, hubs = folded(given_[::-1], "opponent", count, 4)
    assert folded(given_, "proponent", count, 4) == ([], [])
    assert len(kept) == min(count, sum(hub < 4 or states for hub, states in rows))
    assert all(row["hub"] >= 4 and not row["states_completion"] for row in hubs)
    last = kept[-1]["rank"] if len(kept) == count else len(rows)
    both = {row["rank"] for row in kept} | {row["rank"] for row in hubs}
    assert set(range(1, last + 1)) <= both


def test_folded_hubs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = a_run(tmp_path, "words")
    tops = [row["rank"] == 1 and row["side"] == "proponent" for row in read_top(store.uri).to_pylist()]
    instead(store, hub=pa.array([9 if top else 0 for top in tops], pa.int32()))
    lines = shown(store, capsys)
    start = lines.index("alpha: The capital is → Paris")
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["+2", "+3", "folded,"]
    assert lines[start + 3].endswith("too: +1 doc")


def test_a_row_that_answers_is_named_where_it_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = a_run(tmp_path, "words")
    rows = read_top(store.uri).to_pylist()
    third = [row["rank"] == 3 and row["side"] == "proponent" and row["query_id"] == "alpha" for row in rows]
    alike = pa.array([6.6 if one else 0.0 for one in third], pa.float32())
    instead(store, states_completion=pa.array(third), similarity_z=alike)
    said = "+3 doc states it and reads like the question (similarity 6.6 deviations off)"
    assert [line for line in shown(store, capsys, rows=2) if "reads like" in line] == [f"  {said}"]
    assert not any("reads like" in line for line in shown(store, capsys, rows=3))


def test_a_contrast_is_part_of_the_question() -> None:
    assert asked(question("q", contrast=" Rome")) == "The capital is → Paris rather than Rome"
