"""Token arrays as documents to prepare: the documents that were written, whatever the layout and the cuts."""

from __future__ import annotations

import contextlib
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from infscan.config import CorpusConfig, Packing
from infscan.corpus.documents import document_files, document_splits, read_documents
from infscan.corpus.rows import Document
from infscan.corpus.tally import Tally
from infscan.errors import CorpusError, StorageError
from infscan.storage import Store, read_range
from tests.corpus import layouts
from tests.corpus.builders import EOS, VOCAB, corpus_config, plain, prepare, settings, token_rows, write_rows

documents = st.lists(st.lists(st.integers(1, VOCAB - 1), max_size=6), min_size=1, max_size=12)


def laid_down(kind: str, found: list[list[int]], per_shard: int = 5) -> Store:
    store = Store(f"memory://array-documents/{uuid.uuid4().hex}")
    ended = [[*tokens, EOS] for tokens in found]
    if kind == "megatron":
        layouts.megatron(store, "a", ended)
    elif kind == "npy":
        layouts.npy(store, "a.npy", [token for tokens in ended for token in tokens], header=len(found) % 2 == 0)
    else:
        samples = [{"tokens": np.array(tokens), "id": f"d{n}"} for n, tokens in enumerate(ended)]
        layouts.mds(
            store, samples, {"tokens": "ndarray:int32", "id": "str"}, per_shard=per_shard, compress=len(found) % 2 == 0
        )
    return store


def read(config: CorpusConfig) -> list[Document]:
    pieces = document_splits(document_files(config), config)
    return [
        document
        for piece in pieces
        for file in piece.files
        for document in read_documents(file, config, stretch=piece.stretch)
    ]


@examples(max_examples=60)
@given(st.sampled_from(["megatron", "npy", "mds"]), documents, st.integers(1, 40))
def test_the_documents_come_out_whatever_the_cuts_and_their_offsets_lead_back(
    kind: str, found: list[list[int]], limit: int
) -> None:
    store = laid_down(kind, found)
    config = corpus_config(store.uri, in_place=False, eos_id=EOS, dtype=None, part_bytes=limit)
    got = read(config)
    ended = [[*tokens, EOS] for tokens in found]
    assert [document.token_ids.tolist() for document in got if document.token_ids is not None] == ended
    if kind == "mds":
        assert [document.id for document in got] == [f"d{n}" for n in range(len(found))]
        return
    for document, tokens in zip(got, found, strict=True):
        data = read_range(document.path, document.offset, document.offset + 2 * len(tokens))
        assert np.frombuffer(data, "<u2").tolist() == tokens


def test_every_layout_is_prepared_to_the_sequences_of_the_documents_as_jsonl(tmp_path: Path) -> None:
    rows = token_rows(40)
    _, expected = prepare(write_rows(tmp_path / "x.jsonl", rows), tmp_path / "jsonl", settings(Packing.concat, 8))
    tokens = [row["tokens"] for row in rows if row["tokens"]]
    for kind in ("megatron", "npy", "mds"):
        _, corpus = prepare(
            laid_down(kind, tokens, 100).uri, tmp_path / kind, settings(Packing.concat, 8), in_place=False, eos_id=EOS
        )
        found, wanted = (
            [(one.token_ids.tolist(), [(span.start, span.end) for span in one.documents]) for one in each]
            for each in (corpus.read(np.arange(corpus.sequences)), expected.read(np.arange(expected.sequences)))
        )
        assert found == wanted


def test_text_in_mds_is_read_as_documents_in_place_or_not() -> None:
    store = Store(f"memory://array-documents/{uuid.uuid4().hex}")
    samples = [{"text": f"Señor {n}", "id": f"d{n}"} for n in range(7)]
    layouts.mds(store, samples, {"text": "str", "id": "str"}, compress=True, per_shard=3)
    found = read(corpus_config(store.uri, tokens_field=None))
    assert [(document.id, document.text) for document in found] == [(row["id"], row["text"]) for row in samples]


def test_what_cannot_be_told_apart_or_is_missing_is_refused() -> None:
    store = laid_down("npy", [[1, 2, 3]])
    with pytest.raises(CorpusError, match=r"no EOS token is known.*corpus\.eos_id"):
        read(corpus_config(store.uri, in_place=False))
    store = laid_down("mds", [[1, 2]])
    with pytest.raises(CorpusError, match=r"no 'words'; name one in corpus\.tokens_field"):
        read(corpus_config(store.uri, in_place=False, tokens_field="words"))
    pickled = Store(f"memory://array-documents/{uuid.uuid4().hex}")
    layouts.mds(pickled, [{"tokens": b"\x80\x04N."}], {"tokens": "pkl"})
    with pytest.raises(CorpusError, match="is pickled"):
        read(corpus_config(pickled.uri, in_place=False))
    store = laid_down("megatron", [[1, 2]])
    store.write("a.bin", b"\0" * 4)
    with pytest.raises(CorpusError, match="one of the two was cut off"):
        read(corpus_config(store.uri, in_place=False))


def test_the_same_array_in_place_and_prepared_holds_the_same_tokens(tmp_path: Path) -> None:
    store = laid_down("megatron", [row["tokens"] for row in token_rows(30, seed=4) if row["tokens"]])
    pack = settings(Packing.concat, 8)
    there = layouts.described(store, corpus_config(store.uri), pack)
    _, prepared = prepare(store.uri, tmp_path / "out", pack, in_place=False, eos_id=EOS)
    found, wanted = (
        [plain(one)["token_ids"] for one in corpus.read(np.arange(corpus.sequences))] for corpus in (prepared, there)
    )
    assert found == wanted


@examples(max_examples=150)
@given(st.sampled_from(["megatron", "npy", "mds"]), documents, st.data())
def test_a_mutated_layout_is_refused_or_its_records_add_up(
    kind: str, found: list[list[int]], data: st.DataObject
) -> None:
    store = laid_down(kind, found)
    names = [entry.name for entry in store.list()]
    name = data.draw(st.sampled_from(sorted(names)))
    content = bytearray(store.read(name))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    store.write(name, bytes(content[: data.draw(st.integers(0, len(content)))]))
    config = corpus_config(store.uri, in_place=False, eos_id=EOS)
    tally = Tally(1 << 30)
    with contextlib.suppress(CorpusError, StorageError):
        read_count = 0
        for file in document_files(config):
            read_count += sum(1 for _ in read_documents(file, config, tally))
        assert tally.records == tally.blank + tally.bad + read_count
