"""Reading documents: one corpus in four formats, offsets that lead back, and errors that say where and what to fix."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from infscan.config import CorpusConfig
from infscan.corpus.documents import file_format, read_documents
from infscan.corpus.rows import Document
from infscan.errors import CorpusError
from infscan.storage import InputFile, Store, expand
from tests.corpus.builders import corpus_config, token_rows, write_rows

ROWS = [
    {"id": "a", "source": "one", "text": "plain"},
    {"id": "b", "source": "two", "text": "Señor \N{GRINNING FACE}\nline"},
    {"id": 7, "source": "two", "text": ""},
]
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst")


def read(path: Path | str, config: CorpusConfig | None = None, **options: Any) -> list[Document]:
    (file,) = expand(str(path))
    return list(read_documents(file, config or corpus_config(path), **options))


def decompressed(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return (
        zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
        if path.suffix == ".zst"
        else data
    )


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".parquet"])
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "id": str(row["id"])} for row in ROWS]
    found = read(write_rows(tmp_path / f"x{suffix}", rows))
    assert [(d.id, d.source, d.text) for d in found] == [(row["id"], row["source"], row["text"]) for row in rows]
    assert all(d.token_ids is None for d in found)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_byte_offset_leads_back_to_its_document(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"x{suffix}", ROWS)
    stream = decompressed(path)
    for document, row in zip(read(path), ROWS, strict=True):
        assert json.loads(stream[document.offset :].split(b"\n", 1)[0]) == row


@given(
    rows=st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=20), max_size=6),
    endings=st.lists(st.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]), min_size=6, max_size=6),
)
def test_any_text_any_line_ending_and_blank_lines_are_read_back(rows: list[str], endings: list[str]) -> None:
    lines = "".join(json.dumps({"text": text}) + end for text, end in zip(rows, endings, strict=False)).encode()
    Store("memory://documents").write("x.jsonl", lines)
    found = read("memory://documents/x.jsonl")
    assert [document.text for document in found] == rows
    for document in found:
        assert json.loads(lines[document.offset :].split(b"\n", 1)[0])["text"] == document.text


def test_a_parquet_offset_is_the_row_number(tmp_path: Path) -> None:
    found = read(write_rows(tmp_path / "x.parquet", token_rows(30)))
    assert [document.offset for document in found] == list(range(30))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_token_ids_take_the_place_of_text(tmp_path: Path, suffix: str) -> None:
    rows = token_rows(20)
    for document, row in zip(read(write_rows(tmp_path / f"x{suffix}", rows)), rows, strict=True):
        assert document.text is None
        assert document.token_ids is not None
        assert np.issubdtype(document.token_ids.dtype, np.integer)
        assert document.token_ids.tolist() == row["tokens"]


def test_a_row_without_token_ids_falls_back_to_its_text(tmp_path: Path) -> None:
    first, second = read(write_rows(tmp_path / "x.jsonl", [{"tokens": [1]}, {"tokens": None, "text": "words"}]))
    assert first.token_ids is not None
    assert (second.text, second.token_ids) == ("words", None)


@pytest.mark.parametrize(("suffix", "first"), [(".jsonl", 1), (".jsonl.gz", 1), (".parquet", 0)])
def test_missing_ids_and_sources_come_from_the_files_name(tmp_path: Path, suffix: str, first: int) -> None:
    name = f"x{suffix}"
    found = read(write_rows(tmp_path / name, [{"text": "a"}, {"text": "b"}]))
    assert [(d.id, d.source) for d in found] == [(f"{name}#{first}", name), (f"{name}#{first + 1}", name)]


def test_field_names_follow_the_configuration(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"body": "t", "key": "k", "site": "s"}])
    (found,) = read(path, corpus_config(path, text_field="body", id_field="key", source_field="site"))
    assert (found.id, found.source, found.text) == ("k", "s", "t")


def test_an_explicit_format_overrides_the_suffix(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.dat", [{"text": "a"}])
    assert read(path, corpus_config(path, format="jsonl"))[0].text == "a"
    with pytest.raises(CorpusError, match=r"x\.dat: the suffix says nothing.*corpus\.format"):
        read(path)
    with pytest.raises(CorpusError, match="'csv' is unknown"):
        file_format("x.csv", "csv")


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "byte 10 of the line is not UTF-8"),
        (b'{"text": "cut', "is not JSON"),
        (b'{"text": "a"} {"text": "b"}', "is not JSON"),
        (b"[1, 2]", "is a list, not an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b', "text": ""}', "is not JSON"),
        (b'{"body": "a"}', r"has no field 'text' nor 'tokens'; it has 'body'\. .*corpus\.text_field"),
        (b'{"text": null}', "'text' is null, not a text"),
        (b'{"text": 3}', "'text' is a number, not a text"),
        (b'{"text": "half \\ud83d"}', "half a surrogate pair"),
        (b'{"tokens": 5}', "'tokens' is a number, not a list of token ids"),
        (b'{"tokens": [1, 2.5]}', "'tokens' holds 2.5 at position 1"),
        (b'{"tokens": [true]}', "'tokens' holds True at position 0"),
        (b'{"tokens": [99999999999999999999]}', "beyond 64 bits"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD * 2 + line + b"\n" + GOOD)
    with pytest.raises(CorpusError, match=rf"bad\.jsonl, line 3.*{reason}"):
        read(path)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ({"text": pa.array(["a", None])}, "row 1: 'text' is null, not a text"),
        ({"text": pa.array([1, 2])}, "row 0: 'text' is a number"),
        ({"body": pa.array(["a"])}, "has the columns 'body', and no 'text'.*corpus.text_field"),
        ({"tokens": pa.array([[1], [2, None]])}, "row 1: 'tokens' holds empty values"),
        ({"tokens": pa.array([[0.5]])}, "row 0: 'tokens' holds values of type double"),
        ({"tokens": pa.array([5])}, "row 0: 'tokens' is a number, not a list"),
        (
            {"text": pa.array([b"ok", b"\xff"]).view(pa.string())},
            "row 1: 'text' is not UTF-8 at byte 0",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_number(tmp_path: Path, rows: dict[str, pa.Array], reason: str) -> None:
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table(rows), path)
    with pytest.raises(CorpusError, match=rf"bad\.parquet.*{reason}"):
        read(path)


def test_a_line_beyond_the_limit_is_refused_before_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD + b'{"text": "' + b"a" * 5000))
    with pytest.raises(CorpusError, match=r"long\.jsonl\.gz, line 2 is longer than 1000 bytes"):
        read(path, max_line_bytes=1000)


RANDOM = [{"text": np.random.default_rng(n).bytes(60).hex()} for n in range(50)]
PACKED_NAMES = ["x.jsonl.gz", "x.jsonl.zst", "x.parquet"]


@pytest.mark.parametrize("name", PACKED_NAMES)
@pytest.mark.parametrize("kept", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_a_truncated_file_never_ends_quietly(tmp_path: Path, name: str, kept: float) -> None:
    path = write_rows(tmp_path / name, RANDOM)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * (len(data) - 1))])
    with pytest.raises(CorpusError, match=rf"{name}.*copy the file again"):
        read(path)


@pytest.mark.parametrize("name", PACKED_NAMES)
def test_a_damaged_file_is_refused_or_the_damage_is_where_no_document_lies(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, RANDOM)
    data = path.read_bytes()
    refused = 0
    for at in range(0, len(data) - 8, 97):
        path.write_bytes(data[:at] + bytes(byte ^ 0xFF for byte in data[at : at + 8]) + data[at + 8 :])
        try:
            assert [document.text for document in read(path)] == [row["text"] for row in RANDOM]
        except CorpusError:
            refused += 1
    assert refused > len(data) / 97 / 2


def test_every_cut_of_a_zstd_file_is_noticed_unless_it_lies_between_frames(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl.zst", ROWS)
    data = path.read_bytes()
    between = len(
        zstandard.ZstdCompressor(write_checksum=True).compress(json.dumps(ROWS[0], ensure_ascii=False).encode() + b"\n")
    )
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        if cut == between:
            assert len(read(path)) == 1
        else:
            with pytest.raises(CorpusError, match="copy the file again"):
                read(path)


def test_a_file_that_changed_since_it_was_listed_stops_the_run(tmp_path: Path) -> None:
    (file,) = expand(str(write_rows(tmp_path / "x.jsonl", ROWS)))
    listed = InputFile(file.uri, file.size - 1, file.etag)
    with pytest.raises(CorpusError, match=r"x\.jsonl has \d+ bytes now and had \d+ when"):
        list(read_documents(listed, corpus_config(file.uri)))


def test_documents_stream_so_that_what_comes_before_a_bad_line_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b"broken\n")
    (file,) = expand(str(path))
    stream = read_documents(file, corpus_config(path))
    assert next(stream).text == "fine"
    with pytest.raises(CorpusError, match="line 2"):
        next(stream)
