"""report.html says what the tables say, and nothing that a document says becomes markup or code."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections import Counter
from functools import cached_property
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.config import Config
from infscan.corpus.tokenizer import load_tokenizer
from infscan.errors import RunError
from infscan.report.assemble import Archive, island
from infscan.report.contents import quantised
from infscan.report.histogram import BINS, LOWEST, PER_DECADE, count
from infscan.report.write import write_report
from infscan.results.read import read_layers, read_sequences, read_tokens, read_top
from tests.report.finished import HOSTILE, finish, write_hostile


class Page(HTMLParser):
    """A page as a parser of HTML sees it."""

    def __init__(self, data: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.scripts: dict[str, str] = {}
        self.policy = ""
        self._in: str | None = None
        self.feed(data.decode())
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        given = dict(attrs)
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        if tag in ("script", "style"):
            self._in = given.get("id") or given.get("type") or tag
            self.scripts[self._in] = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._in = None

    def handle_data(self, data: str) -> None:
        if self._in:
            self.scripts[self._in] += data

    @cached_property
    def index(self) -> dict[str, Any]:
        return json.loads(self.scripts["index"])

    def chunk(self, number: int) -> Any:
        return json.loads(zlib.decompress(base64.b64decode(self.scripts[f"chunk-{number}"])))

    def rows(self, query: dict[str, Any], side: str) -> list[dict[str, Any]]:
        return [row for each in query[side]["chunks"] for row in self.chunk(each["chunk"])]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("hostile")
    write_hostile(folder)
    return finish(folder)


@pytest.fixture(scope="module")
def page(hostile: Config) -> Page:
    written, unfinished = write_report([hostile.output])
    assert written == f"{hostile.output}/report.html"
    assert unfinished == []
    return Page(Path(written).read_bytes())


def test_no_document_becomes_markup(page: Page, tmp_path: Path) -> None:
    """The tags are the template's and one script for every chunk, whatever the documents, ids and questions say."""
    write_hostile(tmp_path, [(f"plain {n}", "the very same words stand here") for n in range(len(HOSTILE))])
    harmless = Page(Path(write_report([finish(tmp_path).output])[0]).read_bytes())
    chunks = [name for name in page.scripts if name.startswith("chunk-")]
    expected = Counter(harmless.tags)
    expected["script"] += len(chunks) - sum(name.startswith("chunk-") for name in harmless.scripts)
    assert page.tags == expected
    assert page.tags["script"] == len(chunks) + 2
    assert {tag for tag, _, _ in page.attributes} == {tag for tag, _, _ in harmless.attributes}
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_the_policy_lets_one_script_and_one_style_run_and_nothing_load(page: Page) -> None:
    policy = dict(part.split(" ", 1) for part in page.policy.split("; "))
    for name in ("script", "style"):
        digest = base64.b64encode(sha256(page.scripts[name].encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["trusted-types"] == "'none'"
    assert "connect-src" not in policy
    links = {value for _, name, value in page.attributes if name in ("src", "href", "action", "srcset")}
    assert links == {"data:,", "#rows-title"}
    assert "innerHTML" not in page.scripts["script"]
    assert not re.search(r"\b(eval|fetch|XMLHttpRequest|importScripts|document\.write)\b", page.scripts["script"])


def test_every_published_row_is_there_with_its_numbers(page: Page, hostile: Config) -> None:
    top = read_top(hostile.output).to_pylist()
    texts = {row["sequence_id"]: row["text"] for row in read_sequences(hostile.output).to_pylist()}
    by_token = {(row["query_id"], row["sequence_id"]): row["scores"] for row in read_tokens(hostile.output).to_pylist()}
    by_layer: dict[tuple[str, int], list[float]] = {}
    for row in read_layers(hostile.output).to_pylist():
        by_layer.setdefault((row["query_id"], row["sequence_id"]), []).append(row["score"])
    (run,) = page.index["runs"]
    seen = 0
    for query in run["queries"]:
        for side in ("proponent", "opponent"):
            wanted = [row for row in top if (row["query_id"], row["side"]) == (query["id"], side)]
            found = page.rows(query, side)
            assert [row["rank"] for row in found] == [row["rank"] for row in wanted]
            assert query[side]["published"] == query[side]["shown"] == len(wanted)
            for mine, row in zip(found, wanted, strict=True):
                key = (query["id"], row["sequence_id"])
                assert mine["sequence"]["id"] == row["sequence_id"]
                assert mine["score"] == pytest.approx(row["score"], rel=1e-5)
                assert mine["scan"] == pytest.approx(row["scan_score"], rel=1e-5)
                assert "".join(mine["sequence"]["texts"]) == texts[row["sequence_id"]]
                for packed, values in ((mine["tokens"], by_token[key]), (mine["layers"], by_layer[key])):
                    exact = np.asarray(values)
                    shown = np.asarray(packed["values"]) * packed["unit"]
                    np.testing.assert_allclose(shown, exact, atol=0.501 * packed["unit"])
                seen += 1
    assert seen == len(top) > 50
    assert sum(page.index["runs"][0]["queries"][0][side]["published"] for side in ("proponent", "opponent")) > 20


def test_copies_are_told_and_hostile_texts_are_whole(page: Page) -> None:
    rows = [
        row
        for query in page.index["runs"][0]["queries"]
        for side in ("proponent", "opponent")
        for row in page.rows(query, side)
    ]
    said = {"".join(row["sequence"]["texts"]) for row in rows}
    for name, text in HOSTILE.items():
        assert any(text in each for each in said), name
    copies = [row for row in rows if "alike" in row]
    assert copies
    for row in copies:
        assert row["alike"][1] in ("exact", "near")
    leads = [row for row in rows if "copies" in row]
    assert {rank for row in leads for rank, _ in row["copies"]} >= {row["rank"] for row in copies[:1]}


def test_the_histogram_counts_every_scan_score(page: Page) -> None:
    run = page.index["runs"][0]
    for query in run["queries"]:
        spread = page.chunk(query["head"])["histogram"]
        total = sum(spread["positive"]) + sum(spread["negative"]) + spread["zero"]
        assert total == len(HOSTILE) + 20
        assert spread["parts"] == spread["of"]


def test_the_same_run_gives_the_same_bytes(hostile: Config, tmp_path: Path) -> None:
    pages = [Path(write_report([hostile.output], str(tmp_path / name))[0]).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_fewer_rows_and_less_room_are_said(hostile: Config, tmp_path: Path) -> None:
    few = Page(Path(write_report([hostile.output], str(tmp_path / "few.html"), rows=3)[0]).read_bytes())
    tight = Page(Path(write_report([hostile.output], str(tmp_path / "tight.html"), megabytes=0.01)[0]).read_bytes())
    for query in few.index["runs"][0]["queries"]:
        for side in ("proponent", "opponent"):
            assert query[side]["shown"] == min(3, query[side]["published"])
    shown = [query["proponent"]["shown"] for query in tight.index["runs"][0]["queries"]]
    assert max(shown) < max(query["proponent"]["published"] for query in tight.index["runs"][0]["queries"])
    # Of all queries alike: none is cut to keep another's rows.
    assert max(shown) - min(shown) <= 10


@pytest.mark.slow
def test_a_sweep_is_one_page_and_says_what_is_missing(hostile: Config, tmp_path: Path) -> None:
    write_hostile(tmp_path / "one")
    sweep = tmp_path / "sweep"
    for name in ("first", "second"):
        folder = tmp_path / "one"
        finish(folder, f"output={sweep / name}", f"seed={len(name)}")
    (sweep / "second" / "_SUCCESS").unlink()
    written, unfinished = write_report([str(sweep)])
    assert unfinished == [f"{sweep}/second"]
    assert [run["name"] for run in Page(Path(written).read_bytes()).index["runs"]] == ["first"]
    both = Page(Path(write_report([str(sweep / "first"), hostile.output], str(tmp_path / "both.html"))[0]).read_bytes())
    assert [run["name"] for run in both.index["runs"]] == ["first", "run"]


def test_what_is_no_finished_run_is_refused(hostile: Config, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"empty has no _SUCCESS.*check the path"):
        write_report([str(tmp_path / "empty")])
    with pytest.raises(RunError, match="2 runs are given and no output"):
        write_report([hostile.output, hostile.output])
    with pytest.raises(RunError, match="rows=0"):
        write_report([hostile.output], rows=0)
    with pytest.raises(RunError, match=r"nowhere: the page needs the tokenizer.*tokenizer="):
        write_report([hostile.output], tokenizer=str(tmp_path / "nowhere"))


@settings(max_examples=60, deadline=None)
@given(st.text(), st.text())
def test_an_island_is_ascii_without_a_character_that_html_knows(key: str, value: str) -> None:
    text = island({key: [value, 1.5, None]})
    assert text.isascii()
    assert not set("<>&'") & set(text)
    assert json.loads(text) == {key: [value, 1.5, None]}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), max_size=40))
def test_packed_numbers_are_off_by_half_a_unit_at_most(values: list[float]) -> None:
    exact = np.asarray(values, np.float32)
    packed = quantised(exact)
    assert all(abs(value) <= 9999 for value in packed["values"])
    assert np.all(np.abs(np.asarray(packed["values"]) * packed["unit"] - exact) <= 0.501 * packed["unit"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), max_size=60))
def test_every_finite_score_is_in_one_bin_of_its_sign(values: list[float]) -> None:
    scores = np.asarray(values, np.float32)
    positive, negative, zero = count(scores)
    assert positive.sum() + negative.sum() + zero == np.isfinite(scores).sum()
    assert len(positive) == len(negative) == BINS
    for value in scores[np.isfinite(scores) & (np.abs(scores) > 1e-11) & (np.abs(scores) < 1e17)].tolist():
        alone = count(np.asarray([value]))
        (bin_,) = np.flatnonzero(alone[0] + alone[1])
        low = LOWEST + bin_ / PER_DECADE
        assert low - 1e-9 <= np.log10(abs(value)) <= low + 1 / PER_DECADE + 1e-9
        assert bool(alone[0].sum()) == (value > 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 400)), max_size=30), st.integers(200, 4000))
def test_an_archive_drops_the_deepest_levels_and_keeps_the_first(chunks: list[tuple[int, int]], room: int) -> None:
    archive = Archive(room)
    noise = np.random.default_rng(0)
    numbers = [(archive.add(level, noise.integers(0, 9, size).tolist()), level) for level, size in chunks]
    kept = {level for number, level in numbers if archive.kept(number)}
    lost = {level for number, level in numbers if not archive.kept(number)}
    assert not kept & lost
    assert 0 not in lost
    assert not lost or not kept or max(kept) < min(lost)
    assert archive.size == sum(len(text) for _, text in archive.chunks.values())
    assert archive.size <= room or kept == {0}


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_pieces_join_to_the_text_and_count_every_token(tokenizer_folder: str, text: str) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert tokenizer is not None
    ids = tokenizer.encode(text)
    pieces = tokenizer.pieces(ids)
    assert "".join(part for part, _ in pieces) == tokenizer.decode(ids)
    assert sum(span for _, span in pieces) == len(ids)


@pytest.fixture(scope="module")
def tokenizer_folder(hostile: Config) -> str:
    return hostile.model.path
