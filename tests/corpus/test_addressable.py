"""Reading by number: any numbers in any order, few row groups, and files that are missing or changed by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.config import Packing
from infscan.corpus import part_file
from infscan.corpus.addressable import AddressableCorpus, PreparedCorpus, is_prepared, open_corpus
from infscan.errors import CorpusError
from infscan.storage import Store
from tests.corpus.builders import plain, prepare, settings, token_rows, write_rows

PACK = settings(Packing.concat, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven parts (one of them empty) of several small row groups each."""
    base = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part_file, "ROW_GROUP_SEQUENCES", 3)
        for n in range(7):
            write_rows(base / "in" / f"{n}.jsonl", [] if n == 2 else token_rows(10, seed=n))
        prepare(base / "in", base / "out", PACK)
    return base / "out"


@pytest.fixture(scope="module")
def everything(folder: Path) -> list[dict[str, object]]:
    corpus = open_corpus(Store(str(folder)))
    return [plain(sequence) for sequence in corpus.read(np.arange(corpus.sequences))]


@given(data=st.data())
def test_any_numbers_come_back_in_the_order_asked_for(
    data: st.DataObject, folder: Path, everything: list[dict[str, object]]
) -> None:
    corpus: AddressableCorpus = open_corpus(Store(str(folder)))
    ids = data.draw(st.lists(st.integers(0, corpus.sequences - 1), max_size=30))
    for _ in range(2):
        assert [plain(sequence) for sequence in corpus.read(np.array(ids, np.int64))] == [everything[n] for n in ids]


def test_sequences_are_numbered_through_and_no_longer_than_the_corpus_says(
    folder: Path, everything: list[dict[str, object]]
) -> None:
    corpus = open_corpus(Store(str(folder)))
    assert [one["sequence_id"] for one in everything] == list(range(corpus.sequences))
    sequences = corpus.read(np.arange(corpus.sequences))
    assert sum(map(len, sequences)) == corpus.tokens
    assert max(map(len, sequences)) == corpus.sequence_length == 8
    assert max(int(one.token_ids.max()) for one in sequences) < corpus.vocab_size
    assert all(one.token_ids.dtype == np.int64 for one in sequences)


def test_each_row_group_is_decoded_once_and_no_other_is_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    real = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, n, **options: decoded.append(n) or real(self, n, **options)
    )
    corpus = open_corpus(Store(str(folder)))
    corpus.read(np.array([4, 0, 5, 1, 3, 4]))
    assert decoded == [0, 1]
    corpus.read(np.array([1, 5]))
    assert decoded == [0, 1]


def test_a_corpus_pickles_with_files_open(folder: Path, everything: list[dict[str, object]]) -> None:
    corpus = open_corpus(Store(str(folder)))
    corpus.read(np.array([0]))
    copy = pickle.loads(pickle.dumps(corpus))
    assert copy.fingerprint == corpus.fingerprint
    assert plain(copy.read(np.array([5]))[0]) == everything[5]
    corpus.close()
    assert plain(corpus.read(np.array([5]))[0]) == everything[5]


@pytest.mark.parametrize("ids", [[-1], [0, 10**6]])
def test_numbers_the_corpus_does_not_have_are_refused(folder: Path, ids: list[int]) -> None:
    with pytest.raises(CorpusError, match="has the sequences 0 to "):
        open_corpus(Store(str(folder))).read(np.array(ids))


def copied(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_missing_changed_or_damaged_part_is_named(folder: Path, tmp_path: Path) -> None:
    base = copied(folder, tmp_path / "copy")
    part = base / "part-00001.parquet"
    whole = part.read_bytes()

    def fails(reason: str, corpus: PreparedCorpus | None = None) -> None:
        with pytest.raises(CorpusError, match=rf"part-00001\.parquet.*{reason}"):
            (corpus or open_corpus(Store(str(base)))).read(np.arange(40))

    opened = open_corpus(Store(str(base)))
    part.write_bytes(whole + b"x")
    fails(rf"has {len(whole) + 1} bytes and the manifest says {len(whole)}")
    fails("bytes and the manifest says", opened)
    part.unlink()
    fails("is missing")
    fails("is missing", opened)
    column = pq.read_metadata(pa.BufferReader(whole)).row_group(0).column(0)
    end = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size
    # What pages hold has checksums; in their headers a change may mean nothing.
    for at in (10, end - 3):
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        fails("cannot be read")
    part.write_bytes(whole)
    assert len(opened.read(np.arange(40))) == 40


def test_a_folder_without_a_readable_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    base = copied(folder, tmp_path / "copy")
    assert is_prepared(str(base))
    (base / "manifest.json").write_text('{"schema_version": 99}')
    with pytest.raises(CorpusError, match=r"manifest\.json has schema version 99"):
        open_corpus(Store(str(base)))
    (base / "manifest.json").write_text('{"schema_version": 1, "settings": {}}')
    with pytest.raises(CorpusError, match="is not a corpus manifest"):
        open_corpus(Store(str(base)))
    (base / "manifest.json").unlink()
    assert not is_prepared(str(base))
    with pytest.raises(CorpusError, match=r"manifest\.json is missing"):
        open_corpus(Store(str(base)))


def test_a_corpus_on_an_object_store_reads_the_same(folder: Path, everything: list[dict[str, object]]) -> None:
    store = Store("memory://prepared/corpus")
    for file in folder.iterdir():
        store.write(file.name, file.read_bytes())
    assert is_prepared(store.uri)
    corpus = open_corpus(store)
    assert [plain(sequence) for sequence in corpus.read(np.arange(corpus.sequences))] == everything
