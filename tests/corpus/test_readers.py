"""Text and Arrow beside JSONL and Parquet: the same documents, offsets that lead back, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from infscan.config import Packing, TextRecords
from infscan.corpus.documents import document_files, read_documents
from infscan.corpus.rows import Document
from infscan.corpus.tally import Tally
from infscan.errors import BadDocumentError, BadFileError
from infscan.storage import Store
from tests.corpus.builders import corpus_config, prepare, settings, token_rows

# Plain text with NUL is none (UTF-16, for one), and is refused.
written = st.characters(exclude_categories=("Cs",), exclude_characters="\0")
texts = st.lists(st.text(written, max_size=30), max_size=8)


def arrow(rows: list[dict[str, Any]], *, file: bool, per_batch: int = 3) -> bytes:
    empty = pa.schema([("id", pa.string()), ("source", pa.string()), ("text", pa.string())])
    table = pa.Table.from_pylist(rows) if rows else empty.empty_table()
    sink = io.BytesIO()
    with (pa.ipc.new_file if file else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=per_batch)
    return sink.getvalue()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.ipc.open_stream(arrow(rows, file=False)).read_all(), sink)
    return sink.getvalue()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def laid_down(data: bytes, suffix: str) -> Store:
    store = Store(f"memory://readers/{uuid.uuid4().hex}")
    store.write(f"x{suffix}", data)
    return store


def read(store: Store, tally: Tally | None = None, **config: Any) -> list[Document]:
    asked = corpus_config(store.uri, **config)
    return [document for file in document_files(asked) for document in read_documents(file, asked, tally)]


@examples(max_examples=25)
@given(texts)
def test_the_same_documents_come_out_of_every_format(found: list[str]) -> None:
    # Dolma's layout is JSONL with fields that are not read.
    rows = [{"id": f"d{n}", "source": "s", "text": text} for n, text in enumerate(found)]
    dolma = [{**row, "added": "2024", "metadata": {"url": "u"}} for row in rows]
    written = {
        ".jsonl": jsonl(rows),
        ".json.gz": gzip.compress(jsonl(dolma)),
        ".jsonl.zst": zstandard.compress(jsonl(rows)),
        ".parquet": parquet(rows),
        ".arrow": arrow(rows, file=True),
        ".ipc": arrow(rows, file=False),
    }
    for suffix, data in written.items():
        documents = read(laid_down(data, suffix))
        assert [(d.id, d.source, d.text) for d in documents] == [(row["id"], "s", row["text"]) for row in rows], suffix
        if suffix in (".parquet", ".arrow", ".ipc"):
            assert [d.offset for d in documents] == list(range(len(rows)))


@examples(max_examples=25)
@given(st.text(written, max_size=60))
def test_a_text_file_is_one_document(text: str) -> None:
    text = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    for suffix, data in ((".txt", text.encode()), (".txt.gz", gzip.compress(text.encode()))):
        (document,) = read(laid_down(data, suffix))
        assert (document.id, document.text, document.offset) == (f"x{suffix}", text, 0)


@examples(max_examples=25)
@given(texts, st.sampled_from(["\n", "\r\n"]))
def test_a_line_is_a_document_where_asked_and_its_offset_leads_back(found: list[str], end: str) -> None:
    lines = [" ".join(text.split()) for text in found]
    data = "".join(line + end for line in lines).encode()
    tally = Tally()
    documents = read(laid_down(data, ".txt"), tally, text_records=TextRecords.line)
    assert [document.text for document in documents] == [line for line in lines if line.strip()]
    assert tally.records == tally.blank + len(documents) == len(lines)
    for document in documents:
        assert data[document.offset :].startswith(str(document.text).encode())
        assert lines[int(document.id.rpartition("#")[2]) - 1] == document.text


def test_a_saved_dataset_is_read_without_what_lies_beside_its_tables(tmp_path: Path) -> None:
    rows = [{"id": f"d{n}", "text": f"t{n}"} for n in range(10)]
    for number, some in enumerate((rows[:6], rows[6:])):
        (tmp_path / f"data-0000{number}-of-00002.arrow").write_bytes(arrow(some, file=False))
    (tmp_path / "cache-1a2b.arrow").write_bytes(arrow(rows, file=False))
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert [d.id for d in read(Store(str(tmp_path)))] == [row["id"] for row in rows]


def test_token_ids_in_arrow_make_the_same_corpus_as_in_jsonl(tmp_path: Path) -> None:
    rows, pack = token_rows(30), settings(Packing.concat, 8)
    (tmp_path / "x.jsonl").write_bytes(jsonl(rows))
    (tmp_path / "x.arrow").write_bytes(arrow(rows, file=True))
    one, _ = prepare(tmp_path / "x.jsonl", tmp_path / "a", pack)
    two, _ = prepare(tmp_path / "x.arrow", tmp_path / "b", pack)
    assert one.fingerprint == two.fingerprint


def test_what_is_no_arrow_and_no_text_is_named() -> None:
    whole = arrow([{"id": "a", "text": "t" * 500}] * 9, file=True)
    with pytest.raises(BadFileError, match=r"x\.arrow, after row 0: not Arrow"):
        read(laid_down(whole[:200], ".arrow"))
    with pytest.raises(BadFileError, match=r"x\.arrow, after row 0: not Arrow"):
        read(laid_down(b"no table", ".arrow"))
    with pytest.raises(BadDocumentError, match=r"x\.txt: byte 1 is not UTF-8"):
        read(laid_down(b"a\xff", ".txt"))
    store = laid_down(b"short\n" + b"a" * 40, ".txt")
    asked = corpus_config(store.uri, text_records=TextRecords.line)
    (file,) = document_files(asked)
    tally = Tally(allowed=1)
    assert [d.text for d in read_documents(file, asked, tally, max_line_bytes=10)] == ["short"]
    assert (tally.records, tally.bad) == (2, 1)
    with pytest.raises(BadDocumentError, match=r"longer than 10 bytes.*text_records=line"):
        list(read_documents(file, corpus_config(store.uri), max_line_bytes=10))
