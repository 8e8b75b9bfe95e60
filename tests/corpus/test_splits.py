"""Large files cut into pieces and small ones joined: every record in exactly one piece, whatever the cuts."""

from __future__ import annotations

import gzip
import io
import json
import uuid
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from infscan.config import CorpusConfig, Packing, TextRecords
from infscan.corpus.addressable import open_corpus
from infscan.corpus.documents import document_files, document_splits, read_documents
from infscan.corpus.prepared import prepare_part, write_manifest
from infscan.corpus.splits import FileRange, InputSplit
from infscan.corpus.tally import Tally
from infscan.errors import BadFileError, CorpusError
from infscan.storage import InputFile, Store
from tests.corpus.builders import VOCAB, corpus_config, plain, prepare, settings, token_rows, write_rows

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
PACK = settings(Packing.concat, 8)


def laid_down(data: bytes, suffix: str) -> Store:
    store = Store(f"memory://pieces/{uuid.uuid4().hex}")
    store.write(f"x{suffix}", data)
    return store


def read(store: Store, config: CorpusConfig) -> tuple[list[tuple[str | None, int]], Tally, int]:
    """Texts and offsets in the order of the pieces, what was counted, and how many pieces there were."""
    pieces = document_splits(document_files(config), config)
    found: list[tuple[str | None, int]] = []
    total = Tally()
    for piece in pieces:
        for file in piece.files:
            tally = Tally(1 << 30)
            found += [(d.text, d.offset) for d in read_documents(file, config, tally, stretch=piece.stretch)]
            total.records, total.blank, total.bad = (
                getattr(total, key) + getattr(tally, key) for key in ("records", "blank", "bad")
            )
    return found, total, len(pieces)


@examples(max_examples=60)
@given(
    st.lists(st.one_of(st.text(st.characters(exclude_categories=("Cs",)), max_size=30), st.none()), max_size=12),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.sampled_from(sorted(COMPRESS)),
    st.integers(1, 200),
)
def test_a_cut_file_of_lines_gives_every_line_once_and_in_order(
    found: list[str | None], end: str, ended: bool, suffix: str, limit: int
) -> None:
    lines = ["" if text is None else json.dumps({"text": text}, ensure_ascii=False) for text in found]
    data = (end.join(lines) + (end if ended else "")).encode()
    store = laid_down(COMPRESS[suffix](data), f".jsonl{suffix}")
    whole, counted, _ = read(store, corpus_config(store.uri))
    cut, recounted, _ = read(store, corpus_config(store.uri, part_bytes=limit))
    assert cut == whole
    assert (recounted.records, recounted.blank, recounted.bad) == (counted.records, counted.blank, counted.bad)
    for text, offset in cut:
        assert json.loads(data[offset:].splitlines()[0].decode())["text"] == text


@examples(max_examples=40)
@given(st.integers(0, 40), st.integers(1, 15), st.integers(50, 2000), st.integers(1, 200))
def test_a_cut_table_gives_every_row_once_and_in_order(rows: int, per_group: int, limit: int, size: int) -> None:
    sink = io.BytesIO()
    table = pa.table({"text": pa.array([f"{n}" * size for n in range(rows)], pa.string())})
    pq.write_table(table, sink, row_group_size=per_group)
    store = laid_down(sink.getvalue(), ".parquet")
    cut, counted, _ = read(store, corpus_config(store.uri, part_bytes=limit))
    assert cut == [(f"{n}" * size, n) for n in range(rows)]
    assert counted.records == rows


def test_cuts_lie_between_row_groups_and_inside_one_that_is_too_large() -> None:
    sink = io.BytesIO()
    rng = np.random.default_rng(0)
    columns = {"text": [rng.bytes(500).hex() for _ in range(40)]}
    with pq.ParquetWriter(sink, pa.schema([("text", pa.string())]), compression="none") as writer:
        for start, stop in ((0, 5), (5, 10), (10, 40)):
            writer.write_table(pa.table({"text": columns["text"][start:stop]}), row_group_size=100)
    store = laid_down(sink.getvalue(), ".parquet")
    config = corpus_config(store.uri, part_bytes=15_000)
    pieces = document_splits(document_files(config), config)
    assert [(p.stretch.start, p.stretch.stop) for p in pieces] == [(0, 10), (10, 20), (20, 30), (30, None)]


def test_lines_of_text_are_cut_and_a_text_of_one_document_is_not() -> None:
    data = "".join(f"line {n}\n" for n in range(50)).encode()
    store = laid_down(data, ".txt")
    lines, _, pieces = read(store, corpus_config(store.uri, part_bytes=60, text_records=TextRecords.line))
    assert (pieces, [text for text, _ in lines]) == (7, [f"line {n}" for n in range(50)])
    whole, _, pieces = read(store, corpus_config(store.uri, part_bytes=60))
    assert (pieces, [text for text, _ in whole]) == (1, [data.decode()])


def test_in_a_cut_file_ids_and_errors_name_the_byte() -> None:
    line = b'{"text": "aaaaaaaaaaaaaaaa"}\n'
    store = laid_down(line * 10 + b"broken\n", ".jsonl")
    config = corpus_config(store.uri, part_bytes=2 * len(line))
    pieces = document_splits(document_files(config), config)
    second = list(read_documents(pieces[1].files[0], config, stretch=pieces[1].stretch))
    assert [document.id for document in second] == [f"x.jsonl@{at * len(line)}" for at in (2, 3)]
    with pytest.raises(CorpusError, match=rf"x\.jsonl, the line at byte {10 * len(line)} is not JSON"):
        list(read_documents(pieces[-1].files[0], config, stretch=pieces[-1].stretch))


def test_a_terabyte_is_cut_and_a_million_files_are_joined_by_names_and_sizes_alone() -> None:
    config = corpus_config("s3://nowhere/")
    (one,) = [InputFile("s3://nowhere/x.jsonl", 1 << 40, "tag")]
    pieces = document_splits([one], config)
    assert len(pieces) == 4096
    assert all(piece.stretch.stop == after.stretch.start for piece, after in pairwise(pieces))
    assert pieces[-1].stretch == FileRange(4095 << 28, None)
    many = [InputFile(f"s3://nowhere/{n:06d}.txt", n % 5000, "tag") for n in range(50_000)]
    joined = document_splits(many, config)
    assert [file for piece in joined for file in piece.files] == many
    assert 1024 <= len(joined) <= 1200
    few = many[1:1000:100]
    assert [piece.files for piece in document_splits(few, config)] == [(file,) for file in few]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_a_cut_corpus_holds_the_documents_of_the_whole_one_and_adds_up(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"x{suffix}", token_rows(200, seed=3))
    pack = settings(Packing.document, 20)
    whole, one = prepare(path, tmp_path / "whole", pack)
    cut, several = prepare(path, tmp_path / "cut", pack, part_bytes=1000)
    assert len(cut.parts) > 3
    assert [plain(each) for each in several.read(np.arange(several.sequences))] == [
        plain(each) for each in one.read(np.arange(one.sequences))
    ]
    assert cut.counts == whole.counts
    assert cut.lengths == whole.lengths


def test_of_a_damaged_file_that_was_cut_the_stretch_is_left_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [{"id": f"d{n}", "tokens": rng.integers(2, VOCAB, 30_000).tolist()} for n in range(24)]
    path = write_rows(tmp_path / "x.jsonl.gz", rows)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadFileError, match="truncated or corrupt"):
        prepare(path, tmp_path / "out", PACK, part_bytes=1 << 19)
    manifest, _ = prepare(path, tmp_path / "out", PACK, part_bytes=1 << 19, allow_bad_files=2)
    kept = [part.sequences > 0 for part in manifest.parts]
    bad = manifest.counts.files_bad
    assert kept == [True] * (len(kept) - bad) + [False] * bad
    assert 1 <= bad < len(kept)


def test_of_joined_files_a_damaged_one_is_left_out_alone(tmp_path: Path) -> None:
    for n in range(4):
        write_rows(tmp_path / "in" / f"{n}.jsonl.gz", [{"id": f"d{n}", "tokens": [2, 3]}] * 5)
    bad = tmp_path / "in" / "2.jsonl.gz"
    bad.write_bytes(bad.read_bytes()[:-9])
    config, store = corpus_config(tmp_path / "in", allow_bad_files=1), Store(str(tmp_path / "out"))
    piece = InputSplit(tuple(document_files(config)))
    part = prepare_part(piece, 0, config, PACK, None, store)
    manifest = write_manifest(store, config, PACK, None, [part])
    assert (manifest.counts.files_read, manifest.counts.files_bad) == (3, 1)
    assert list(manifest.left_out.by_reason) == ["file cannot be read"]
    corpus = open_corpus(store)
    spans = [span.id for sequence in corpus.read(np.arange(corpus.sequences)) for span in sequence.documents]
    assert list(dict.fromkeys(spans)) == ["d0", "d1", "d3"]


# Duplicates


def contents(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row["tokens"]) for row in rows]


@examples(max_examples=25)
@given(
    st.lists(st.lists(st.integers(2, 4), max_size=2), min_size=1, max_size=30), st.integers(1, 4), st.integers(20, 99)
)
def test_of_equal_documents_the_first_one_stays_whatever_file_and_piece_it_lies_in(
    found: list[list[int]], files: int, limit: int
) -> None:
    rows = [{"id": f"d{n}", "tokens": tokens} for n, tokens in enumerate(found)]
    base = f"memory://duplicates/{uuid.uuid4().hex}"
    size = -(-len(rows) // files)
    for n, start in enumerate(range(0, len(rows), size)):
        lines = "".join(json.dumps(row) + "\n" for row in rows[start : start + size])
        Store(f"{base}/in").write(f"{n}.jsonl", lines.encode())
    first = {tuple(row["tokens"]): row["id"] for row in reversed(rows)}
    expected = [row["id"] for row in rows if first[tuple(row["tokens"])] == row["id"] and row["tokens"]]
    if not expected:
        return
    manifest, corpus = prepare(
        f"{base}/in", f"{base}/out", settings(Packing.document, 8), part_bytes=limit, deduplicate=True
    )
    assert [sequence.document_id for sequence in corpus.read(np.arange(corpus.sequences))] == expected
    counts = manifest.counts
    assert counts.documents_duplicate == len(rows) - len(first)
    assert counts.records_read == counts.documents_read + counts.documents_duplicate


def test_texts_token_ids_prompts_and_masks_are_equal_only_as_a_whole(tmp_path: Path) -> None:
    rows = [
        {"tokens": [2, 3], "mask": [0, 1]},
        {"tokens": [2, 3], "mask": [1, 1]},
        {"tokens": [2, 3], "mask": [0, 1]},
    ]
    path = write_rows(tmp_path / "x.jsonl", rows)
    pack = settings(Packing.document, 8)
    masked, _ = prepare(path, tmp_path / "a", pack, deduplicate=True, mask_field="mask")
    assert masked.counts.documents_duplicate == 1
    bare, _ = prepare(path, tmp_path / "b", pack, deduplicate=True)
    assert bare.counts.documents_duplicate == 2
    assert bare.settings["deduplicate"]


def test_a_part_is_made_again_where_other_documents_of_it_are_dropped(tmp_path: Path) -> None:
    rows = token_rows(10, seed=1)
    write_rows(tmp_path / "in" / "b.jsonl", rows)
    pack = settings(Packing.document, 20)
    before, _ = prepare(tmp_path / "in", tmp_path / "out", pack, deduplicate=True)
    write_rows(tmp_path / "in" / "c.jsonl", rows[:4])
    after, _ = prepare(tmp_path / "in", tmp_path / "out", pack, deduplicate=True)
    assert after.parts[0].digest == before.parts[0].digest
    assert after.parts[1].sequences == 0
    assert after.counts.documents_duplicate == before.counts.documents_duplicate + 4
