"""Corpora that are dirty, damaged or meant to do harm: every record is counted, every refusal names the place."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.config import Packing
from infscan.corpus.documents import read_documents
from infscan.corpus.manifest import Manifest
from infscan.corpus.packing import Counts
from infscan.corpus.tally import LISTED, Tally
from infscan.errors import BadDocumentError, BadFileError, CorpusError
from infscan.storage import Store, expand
from tests.conftest import Bucket
from tests.corpus.builders import VOCAB, corpus_config, prepare, token_rows, write_rows
from tests.corpus.builders import settings as pack_settings

PACK = pack_settings(Packing.document, 8)
GOOD = b'{"text": "fine", "id": "a"}\n'
BAD = {
    "not UTF-8": b'{"text": "\xff"}',
    "not JSON": b'{"text": "cut',
    "a raw control character": b'{"text": "a\x00b"}',
    "nothing but NUL": b"\x00" * 40,
    "not an object": b"[1, 2]",
    "nested too deeply": b'{"text": ' + b"[" * 100_000,
    "a text that is none": b'{"text": {"html": "<script>"}}',
    "half a surrogate pair": b'{"text": "\\ud83d"}',
    "a surrogate spelt in UTF-8": b'{"text": "\xed\xa0\x80"}',
    "a number beyond 64 bits": b'{"tokens": [18446744073709551616]}',
    "a number with 5,000 digits": b'{"tokens": [' + b"9" * 5000 + b"]}",
    "a float that is no number": b'{"tokens": [NaN]}',
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
}


def add_up(counts: Counts) -> None:
    assert (
        counts.records_read
        == counts.records_blank + counts.documents_bad + counts.documents_duplicate + counts.documents_read
    )
    assert counts.tokens_read + counts.tokens_added - counts.tokens_truncated == counts.tokens


def read_all(path: Path | str, allowed: int = 1 << 30) -> tuple[list[str | None], Tally]:
    """The texts of what is left of a file after its bad documents; the tally adds up."""
    (file,) = expand(str(path))
    tally = Tally(allowed)
    found = [document.text for document in read_documents(file, corpus_config(path), tally)]
    assert tally.records == tally.blank + tally.bad + len(found)
    assert sum(tally.left_out().by_reason.values()) == tally.bad
    return found, tally


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_stops_preparing_by_name_or_is_left_out_and_counted(tmp_path: Path, case: str) -> None:
    path = tmp_path / "dirty.jsonl"
    path.write_bytes(GOOD + BAD[case].replace(b"\n", b"") + b"\n" + GOOD)
    with pytest.raises(BadDocumentError, match=r"dirty\.jsonl, line 2"):
        read_all(path, allowed=0)
    texts, tally = read_all(path, allowed=1)
    assert (texts, tally.records, tally.bad) == (["fine", "fine"], 3, 1)
    assert "dirty.jsonl, line 2" in tally.left_out().first[0]


@pytest.mark.parametrize(
    ("content", "texts", "blank"),
    [
        (b"", [], 0),
        (b"\n \n\t\r\n", [], 3),
        (b"\xef\xbb\xbf" + GOOD, ["fine"], 0),
        (b"\xef\xbb\xbf", [], 1),
        (GOOD.replace(b"\n", b"\r\n") * 2, ["fine", "fine"], 0),
        (GOOD.rstrip(b"\n"), ["fine"], 0),
        (b'{"text": "a\\u0000b\\u001b[31m"}\n', ["a\0b\x1b[31m"], 0),
        (b'{"text": "one", "text": "two"}\n', ["two"], 0),
        (b'{"text": "a", "other": 1e999, "big": 123456789012345678901234567890}\n', ["a"], 0),
        (b'{"text": "\xe2\x80\xae <script>"}\n', ["\u202e <script>"], 0),
    ],
    ids=["empty", "blank", "BOM", "BOM only", "CRLF", "no last newline", "NUL", "key twice", "numbers", "bidi"],
)
def test_what_is_odd_and_harmless_is_read(tmp_path: Path, content: bytes, texts: list[str], blank: int) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_bytes(content)
    found, tally = read_all(path, allowed=0)
    assert (found, tally.blank) == (texts, blank)


def test_behind_a_byte_order_mark_offsets_still_lead_back(tmp_path: Path) -> None:
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD * 3)
    for document in read_documents(expand(str(path))[0], corpus_config(path)):
        assert path.read_bytes()[document.offset :].startswith(GOOD)


@given(
    lines=st.lists(
        st.one_of(
            st.just(GOOD.strip()),
            st.just(b" "),
            st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"")),
            st.sampled_from(list(BAD.values())).map(lambda line: line[:200].replace(b"\n", b"")),
        ),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_every_line_of_a_fuzzed_file_is_a_document_blank_or_bad(lines: list[bytes]) -> None:
    # A byte order mark may stand before the first line alone.
    Store("memory://hostile").write("x.jsonl", b"".join(line + b"\n" for line in [GOOD.strip(), *lines]))
    texts, tally = read_all("memory://hostile/x.jsonl")
    assert tally.records == 1 + len(lines)
    assert texts.count("fine") >= 1 + lines.count(GOOD.strip())


@given(data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "ipc"])
def test_a_mutated_file_is_refused_or_its_records_add_up(tmp_path_factory, suffix: str, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.getbasetemp() / "mutated"
    path = write_rows(folder / f"x.{suffix}", [{"text": f"t{n}", "tokens": [n]} for n in range(20)])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CorpusError):
        read_all(path)


def test_bad_documents_are_allowed_up_to_a_number_over_all_files(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / "in").mkdir(exist_ok=True)
        rows = "".join(json.dumps(row) + "\nbroken\n\n" for row in token_rows(4, seed=n))
        (tmp_path / "in" / f"{n}.jsonl").write_text(rows)
    manifest, corpus = prepare(tmp_path / "in", tmp_path / "out", PACK, allow_bad_documents=12)
    counts = manifest.counts
    add_up(counts)
    assert (counts.files_read, counts.records_read, counts.records_blank) == (3, 36, 12)
    assert (counts.documents_bad, counts.documents_read) == (12, 12)
    assert manifest.left_out.by_reason == {"not JSON": 12}
    assert [line.partition(" is not JSON")[0].rpartition("/")[2] for line in manifest.left_out.first[:2]] == [
        "0.jsonl, line 2",
        "0.jsonl, line 5",
    ]
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json())), "m") == manifest
    clean = write_rows(tmp_path / "clean.jsonl", [row for n in range(3) for row in token_rows(4, seed=n)])
    assert prepare(clean, tmp_path / "clean", PACK)[1].sequences == corpus.sequences
    with pytest.raises(CorpusError, match=r"12 documents cannot be used, more than corpus\.allow_bad_documents=11"):
        prepare(tmp_path / "in", tmp_path / "out2", PACK, allow_bad_documents=11)
    with pytest.raises(CorpusError, match=r"line 11 .*corpus\.allow_bad_documents=3 was reached before it"):
        prepare(tmp_path / "in", tmp_path / "out3", PACK, allow_bad_documents=3)
    assert not (tmp_path / "out3").exists()


def test_the_list_of_what_is_left_out_is_short_and_the_count_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD + b"broken\n" * 1000)
    left_out = read_all(path)[1].left_out()
    assert (len(left_out.first), left_out.by_reason) == (LISTED, {"not JSON": 1000})


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_token_outside_the_vocabulary_is_a_bad_document(tmp_path: Path, suffix: str) -> None:
    path = write_rows(tmp_path / f"x.{suffix}", [{"tokens": [2, 3]}, {"tokens": [VOCAB]}, {"tokens": [4]}])
    manifest, _ = prepare(path, tmp_path / "out", PACK, allow_bad_documents=1)
    add_up(manifest.counts)
    assert (manifest.counts.documents_read, manifest.counts.documents_bad) == (2, 1)
    assert manifest.left_out.by_reason == {"token outside the vocabulary": 1}


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_truncated_file_stops_preparing_or_is_left_out_whole(tmp_path: Path, suffix: str) -> None:
    rows = token_rows(50)
    write_rows(tmp_path / "in" / f"0.{suffix}", rows)
    cut = write_rows(tmp_path / "in" / f"1.{suffix}", rows)
    cut.write_bytes(cut.read_bytes()[:-20])
    write_rows(tmp_path / "in" / f"2.{suffix}", rows)
    with pytest.raises(BadFileError, match=rf"1\.{suffix}.*copy the file again"):
        prepare(tmp_path / "in", tmp_path / "out", PACK)
    manifest, _ = prepare(tmp_path / "in", tmp_path / "out", PACK, allow_bad_files=1)
    add_up(manifest.counts)
    assert (manifest.counts.files_read, manifest.counts.files_bad) == (2, 1)
    assert manifest.counts.documents_read == 100
    assert [part.sequences > 0 for part in manifest.parts] == [True, False, True]
    assert f"1.{suffix}" in manifest.left_out.first[0]


HOSTILE_TABLES = {
    "nulls": ({"text": pa.array(["a", None])}, 1),
    "numbers for text": ({"text": pa.array([1.5, 2.5])}, 2),
    "bytes that are no text": ({"text": pa.array([b"a", b"\xff"])}, 1),
    "not UTF-8": ({"text": pa.array([b"ok", b"\xff"]).view(pa.string())}, 1),
    "an impossible date": ({"text": pa.array(["a"]), "id": pa.array([2**62], pa.timestamp("us"))}, 1),
    "nested": ({"text": pa.array([{"a": [1]}])}, 1),
    "token ids as text": ({"tokens": pa.array(["1 2 3"])}, 1),
    "lists of null": ({"tokens": pa.array([[None, 1]])}, 1),
    "unsigned 64 bit": ({"tokens": pa.array([[2**64 - 1]], pa.list_(pa.uint64()))}, 0),
    "no row": ({"text": pa.array([], pa.string())}, 0),
}


@pytest.mark.parametrize("case", HOSTILE_TABLES)
def test_rows_of_wrong_types_are_bad_documents(tmp_path: Path, case: str) -> None:
    columns, bad = HOSTILE_TABLES[case]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table(columns), path)
    assert read_all(path)[1].bad == bad


def test_a_token_id_beyond_the_vocabulary_of_any_width_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"tokens": pa.array([[2**64 - 1]], pa.list_(pa.uint64()))}), tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match="token id 18446744073709551615"):
        prepare(tmp_path / "x.parquet", tmp_path / "out", PACK)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(CorpusError, match="the column 'text' 2 times"):
        read_all(tmp_path / "x.parquet")


def test_documents_with_one_id_stay_apart(tmp_path: Path) -> None:
    rows = [{"id": "same", "tokens": [2, 3]}, {"id": "same", "tokens": [4]}]
    _, corpus = prepare(write_rows(tmp_path / "x.jsonl", rows), tmp_path / "out", PACK)
    found = corpus.read(np.arange(2))
    assert [(one.document_id, one.sequence_id) for one in found] == [("same", 0), ("same", 1)]
    assert found[0].byte_offset != found[1].byte_offset


def test_ids_that_look_like_paths_name_no_file(tmp_path: Path) -> None:
    hostile = ["../../escape", "/etc/passwd", "a\0b", "C:\\x", "<script>alert(1)</script>", "\x1b]0;owned\x07"]
    rows = [{"id": name, "source": name, "tokens": [2, 3]} for name in hostile]
    _, corpus = prepare(write_rows(tmp_path / "in" / "x.jsonl", rows), tmp_path / "out", PACK)
    assert [one.document_id for one in corpus.read(np.arange(len(hostile)))] == hostile
    assert {path.name for path in tmp_path.rglob("*")} == {
        "in",
        "x.jsonl",
        "out",
        "part-00000.parquet",
        "_inputs.parquet",
        "manifest.json",
    }


# A file that changes


def test_a_file_of_the_same_size_and_another_time_of_change_is_another_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD)
    (file,) = expand(str(path))
    os.utime(path, (1, 1))
    with pytest.raises(CorpusError, match="it changed under the run"):
        list(read_documents(file, corpus_config(path)))


@pytest.mark.parametrize("change", ["grows", "is replaced", "is removed"])
def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path, change: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(GOOD * 2)
    (file,) = expand(str(path))
    stream = read_documents(file, corpus_config(path))
    next(stream)
    if change == "grows":
        path.write_bytes(GOOD * 3)
    elif change == "is replaced":
        path.unlink()
        path.write_bytes(GOOD.replace(b"fine", b"evil") * 2)
        os.utime(path, (2, 2))
    else:
        path.unlink()
    with pytest.raises(CorpusError, match="it changed under the run"):
        list(stream)


def test_an_object_that_was_replaced_by_one_of_the_same_size_is_noticed(moto_s3: Bucket) -> None:
    store = Store(moto_s3.uri())
    store.write("x.jsonl", GOOD)
    (file,) = expand(f"{store.uri}/x.jsonl")
    assert len(list(read_documents(file, corpus_config(file.uri)))) == 1
    (listed,) = expand(store.uri)
    assert listed == file
    store.write("x.jsonl", GOOD.replace(b"fine", b"evil"))
    with pytest.raises(CorpusError, match="ETag"):
        list(read_documents(file, corpus_config(file.uri)))


# Bombs


def zstd_bomb(blocks: int) -> bytes:
    """A frame of run-length blocks: 4 bytes stand for 128 KiB of `a`."""
    header = b"\x28\xb5\x2f\xfd\x00" + bytes([7 << 3])
    block, last = (struct.pack("<I", flag | 1 << 1 | 128 * 1024 << 3)[:3] + b"a" for flag in (0, 1))
    return header + block * (blocks - 1) + last


PROBE = """
import resource, sys
from infscan.corpus.documents import read_documents
from infscan.corpus.tally import Tally
from infscan.storage import expand
from tests.corpus.builders import corpus_config
for path in sys.argv[1:]:
    (file,) = expand(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for allowed in (0, 10):
        tally = Tally(allowed)
        try:
            number = sum(1 for _ in read_documents(file, corpus_config(path), tally))
            said = f"{number} read, {tally.bad} bad"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, said)
"""


def test_decompression_bombs_are_refused_in_bounded_memory(tmp_path: Path) -> None:
    """Each stands for 256 MiB in one line, or half of that in 32 cells; the longest line allowed has 64 MiB."""
    member = gzip.compress(b"a" * (16 << 20))
    (tmp_path / "bomb.jsonl.gz").write_bytes(member * 16)
    (tmp_path / "bomb.jsonl.zst").write_bytes(zstd_bomb(2048))
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 32, pa.int32()), pa.array(["a" * (4 << 20)]))
    pq.write_table(pa.table({"text": text}), tmp_path / "bomb.parquet", compression="zstd", store_schema=False)
    paths = [tmp_path / f"bomb.{suffix}" for suffix in ("jsonl.gz", "jsonl.zst", "parquet")]
    assert max(path.stat().st_size for path in paths) < 1 << 20
    done = subprocess.run([sys.executable, "-c", PROBE, *paths], capture_output=True, text=True, check=True)
    found = [line.partition(" ")[::2] for line in done.stdout.splitlines()]
    refused = "BadDocumentError: "
    assert all(said.startswith(refused) and "line 1 is longer than 67108864 bytes" in said for _, said in found[0:4:2])
    assert [said for _, said in found[1:4:2]] == ["0 read, 1 bad"] * 2
    assert [said for _, said in found[4:]] == ["32 read, 0 bad"] * 2
    # MiB above what the interpreter took before: two copies of the longest line, and one bite decompressed.
    assert max(int(peak) for peak, _ in found) < 320, done.stdout


LOWER = """
from infscan.corpus import arrow_messages, parquet_pages
arrow_messages.MAX_BATCH_BYTES = parquet_pages.MAX_PAGE_BYTES = 64 << 20
parquet_pages.MAX_REPEATED_BYTES = 8 << 20
"""


def test_tables_are_refused_before_a_page_or_batch_is_decompressed(tmp_path: Path) -> None:
    """Each stands for 100 MiB of text, or for 9 MiB eight times, and the bounds are lower here than they are."""
    text = pa.table({"text": pa.array(["a" * (1 << 20)] * 100)})
    pq.write_table(
        text, tmp_path / "page.parquet", compression="zstd", use_dictionary=False, data_page_size=(1 << 31) - 1,
        write_batch_size=2000,
    )  # fmt: skip
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for name, opened in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with opened(str(tmp_path / name), text.schema, options=options) as writer:
            writer.write_table(text)
    several = pa.DictionaryArray.from_arrays(pa.array([0] * 8, pa.int32()), pa.array(["a" * (9 << 20)]))
    pq.write_table(pa.table({"text": several}), tmp_path / "dictionary.parquet", compression="zstd", store_schema=False)
    del text, several
    paths = sorted(tmp_path.iterdir())
    assert max(path.stat().st_size for path in paths) < 100_000
    done = subprocess.run([sys.executable, "-c", LOWER + PROBE, *paths], capture_output=True, text=True, check=True)
    found = [line.partition(" ")[::2] for line in done.stdout.splitlines()]
    said = [said for _, said in found[::2]]
    assert "BadFileError" in said[0]
    assert "a page of" in said[0]
    assert "a record batch of" in said[1]
    assert "a page of" in said[2]
    assert "a record batch of" in said[3]
    assert max(int(peak) for peak, _ in found) < 48, done.stdout


def test_a_cell_longer_than_a_document_is_a_bad_document(tmp_path: Path) -> None:
    texts = ["a", "b" * (65 << 20), "c"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False)
    found, tally = read_all(tmp_path / "a.parquet")
    assert found == ["a", "c"]
    assert tally.left_out().by_reason == {"too long": 1}


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("is_file", [True, False])
def test_checked_arrow_files_read_as_they_are_written(tmp_path: Path, compression: str | None, is_file: bool) -> None:
    """Of any compression, with dictionaries that grow from batch to batch, and one cut off."""
    rows = [[f"t{number % 7}" for number in range(size)] for size in (5, 0, 9)]
    batches = [pa.record_batch({"text": pa.array(some, pa.string()).dictionary_encode()}) for some in rows]
    options = pa.ipc.IpcWriteOptions(compression=compression, emit_dictionary_deltas=True, unify_dictionaries=is_file)
    path = tmp_path / "a.arrow"
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(str(path), batches[0].schema, options=options) as writer:
        writer.write_table(pa.Table.from_batches(batches)) if is_file else [writer.write_batch(one) for one in batches]
    assert read_all(path)[0] == [text for some in rows for text in some]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadFileError):
        read_all(path)


def test_an_arrow_file_that_lost_a_batch_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    batches = [pa.record_batch({"text": [text] * 4}) for text in "abc"]
    with pa.ipc.new_file(str(path), batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    data = bytearray(path.read_bytes())
    # The third message's length, after the schema's and two batches': an end where there is none.
    marks = [at for at in range(0, len(data), 8) if data[at : at + 4] == b"\xff\xff\xff\xff"]
    data[marks[2] + 4 : marks[2] + 8] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(BadFileError, match="its footer lists 2 more record batches"):
        read_all(path)


def test_a_zstd_window_beyond_128_mib_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "wide.jsonl.zst"
    path.write_bytes(compressor.compress(GOOD) + compressor.flush())
    with pytest.raises(BadFileError, match=r"wide\.jsonl\.zst, line 1: its zstd window .*--long=27"):
        read_all(path)


def test_a_line_of_100_mb_is_left_out_and_the_next_one_read(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * 100_000_000 + b'"}\n' + GOOD)
    with pytest.raises(BadDocumentError, match=r"long\.jsonl, line 1 is longer than 67108864 bytes"):
        read_all(path, allowed=0)
    (file,) = expand(str(path))
    (document,) = read_documents(file, corpus_config(path), Tally(1))
    assert path.read_bytes()[document.offset :] == GOOD
