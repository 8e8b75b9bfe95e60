"""Token arrays scanned where they lie: the same sequences as prepared documents, in any order, from ranges alone."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from infscan.config import Attention, Packing, with_checksum
from infscan.corpus import arrays, in_place, megatron
from infscan.corpus.addressable import AddressableCorpus, open_corpus, require_document_boundaries
from infscan.corpus.documents import document_files, read_documents
from infscan.corpus.packing import Packer, PackSettings
from infscan.corpus.reading import Reading
from infscan.corpus.sequences import Sequence
from infscan.errors import CorpusError, StorageError
from infscan.storage import Store, remember_written
from tests.conftest import Bucket
from tests.corpus import layouts
from tests.corpus.builders import EOS, VOCAB, corpus_config, documents, settings

T = 8
with_empty = st.lists(st.lists(st.integers(2, VOCAB - 1), max_size=6), min_size=1, max_size=12)
rows = st.lists(st.lists(st.integers(2, VOCAB - 1), min_size=1, max_size=30), min_size=1, max_size=12)


def memory() -> Store:
    return Store(f"memory://in-place/{uuid.uuid4().hex}")


def ended(docs: list[list[int]]) -> list[list[int]]:
    return [[*tokens, EOS] for tokens in docs]


def stream(docs: list[list[int]]) -> list[int]:
    return [token for tokens in ended(docs) for token in tokens]


def in_megatron(docs: list[list[int]], pack: PackSettings, *, pieces: int = 1, dtype: str = "<u2") -> AddressableCorpus:
    store = memory()
    layouts.megatron(store, "a", docs if pack.packing is Packing.document else ended(docs), dtype, pieces=pieces)
    return layouts.described(store, corpus_config(store.uri, packing=pack.packing), pack)


def in_npy(docs: list[list[int]], pack: PackSettings, *, header: bool, dtype: str = "<u2") -> AddressableCorpus:
    store = memory()
    layouts.npy(store, "a.npy", stream(docs), dtype, header=header)
    given = None if header else np.dtype(dtype).name
    return layouts.described(store, corpus_config(store.uri, dtype=given), pack)


def in_mds(
    docs: list[list[int]], pack: PackSettings, *, encoding: str, compress: bool, per: int = 1
) -> AddressableCorpus:
    """Samples of `per` windows; a last one that is shorter than the others allow goes without its end."""
    flat = stream(docs)
    size = pack.sequence_length * per
    samples = [{"tokens": np.array(flat[at : at + size])} for at in range(0, len(flat), size)]
    if encoding == "bytes":
        samples = [{"tokens": sample["tokens"].astype("<i8").tobytes()} for sample in samples]
    store = memory()
    layouts.mds(store, samples, {"tokens": encoding}, compress=compress)
    return layouts.described(store, corpus_config(store.uri), pack)


FORMATS: dict[str, Callable[[list[list[int]], PackSettings], AddressableCorpus]] = {
    "megatron": lambda docs, pack: in_megatron(docs, pack),
    "megatron of sentences": lambda docs, pack: in_megatron(docs, pack, pieces=3, dtype="<i4"),
    "raw npy": lambda docs, pack: in_npy(docs, pack, header=False),
    "raw npy of uint32": lambda docs, pack: in_npy(docs, pack, header=False, dtype="<u4"),
    "npy": lambda docs, pack: in_npy(docs, pack, header=True),
    "big-endian npy": lambda docs, pack: in_npy(docs, pack, header=True, dtype=">u4"),
    "mds": lambda docs, pack: in_mds(docs, pack, encoding="ndarray:int32", compress=False),
    "mds, no dtype": lambda docs, pack: in_mds(docs, pack, encoding="ndarray", compress=False),
    "mds, zstd, bytes": lambda docs, pack: in_mds(docs, pack, encoding="bytes", compress=True),
}


def everything(corpus: AddressableCorpus) -> list[Sequence]:
    return corpus.read(np.arange(corpus.sequences))


def content(sequence: Sequence) -> tuple[Any, ...]:
    """A sequence without its provenance: token ids, and where its documents lie in it."""
    return sequence.sequence_id, sequence.token_ids.tolist(), [(span.start, span.end) for span in sequence.documents]


def packed(docs: list[list[int]], pack: PackSettings) -> list[tuple[Any, ...]]:
    return [content(sequence) for sequence in Packer(pack).pack(documents(docs))]


def after_eos(sequence: Sequence) -> list[int]:
    """Where documents begin, said without their spans: at 0 and after every EOS."""
    tokens = sequence.token_ids.tolist()
    return [at for at in range(len(tokens)) if at == 0 or tokens[at - 1] == EOS]


@pytest.mark.parametrize("kind", list(FORMATS))
@examples(max_examples=10)
@given(docs=with_empty, length=st.integers(2, 12))
def test_every_layout_tells_where_attention_begins_anew(kind: str, docs: list[list[int]], length: int) -> None:
    corpus = FORMATS[kind](docs, settings(Packing.concat, length))
    for sequence in open_corpus(corpus.store, Reading(Attention.within)).read(np.arange(corpus.sequences)):
        assert sequence.starts is not None
        assert sequence.starts.tolist() == after_eos(sequence)
    assert all(sequence.starts is None for sequence in everything(corpus))


def test_megatron_documents_without_eos_are_told_apart_by_the_index() -> None:
    store = memory()
    layouts.megatron(store, "a", [[5, 6, 7], [8, 9], [4] * 6])
    pack = settings(Packing.concat, T)
    corpus = layouts.described(store, corpus_config(store.uri), pack)
    found = open_corpus(corpus.store, Reading(Attention.within)).read(np.arange(2))
    assert [sequence.starts.tolist() for sequence in found if sequence.starts is not None] == [[0, 3, 5], [0]]
    require_document_boundaries(corpus)


@pytest.mark.parametrize("kind", ["npy", "mds"])
def test_arrays_without_an_eos_are_refused_where_documents_are_kept_apart(kind: str) -> None:
    store = memory()
    flat = [token for tokens in big_corpus(50) for token in tokens]
    if kind == "npy":
        layouts.npy(store, "a.npy", flat)
    else:
        layouts.mds(store, [{"tokens": np.array(flat[at : at + T])} for at in range(0, 400, T)], {"tokens": "ndarray"})
    pack = settings(Packing.concat, T)
    with pytest.raises(CorpusError, match=r"nothing says where they begin: none of [\d,]+ token ids is EOS \(0\)"):
        require_document_boundaries(layouts.described(store, corpus_config(store.uri), pack))
    # Told what documents end with, it is read; and so are samples that are documents.
    require_document_boundaries(layouts.described(store, corpus_config(store.uri), replace(pack, eos_id=flat[0])))
    if kind == "mds":
        alone = settings(Packing.document, T)
        require_document_boundaries(layouts.described(store, corpus_config(store.uri, packing=Packing.document), alone))


@pytest.mark.parametrize("kind", list(FORMATS))
@examples(max_examples=10)
@given(docs=rows, length=st.integers(2, 12))
def test_every_layout_gives_the_sequences_of_the_packed_documents(
    kind: str, docs: list[list[int]], length: int
) -> None:
    pack = settings(Packing.concat, length)
    corpus = FORMATS[kind](docs, pack)
    expected = packed(docs, pack)
    assert corpus.sequences == len(expected)
    tokens = sum(len(tokens) for _, tokens, _ in expected)
    assert corpus.counts["tokens"] == (None if "mds" in kind else tokens)
    assert corpus.tokens >= tokens
    assert [content(sequence) for sequence in everything(corpus)] == expected


@examples(max_examples=10)
@given(docs=rows, length=st.integers(2, 12))
def test_megatron_documents_are_sequences_of_their_own_where_asked(docs: list[list[int]], length: int) -> None:
    pack = settings(Packing.document, length)
    corpus = in_megatron(docs, pack)
    assert [content(sequence) for sequence in everything(corpus)] == packed(docs, pack)
    counts = corpus.counts
    assert counts["tokens_read"] + counts["tokens_added"] - counts["tokens_truncated"] == counts["tokens"]
    assert counts["documents_read"] == len(docs)
    assert corpus.tokens == sum(map(len, everything(corpus)))


@pytest.mark.parametrize("kind", list(FORMATS))
@examples(max_examples=10)
@given(data=st.data())
def test_any_numbers_come_back_in_any_order_and_as_blocks_of_tokens(kind: str, data: st.DataObject) -> None:
    docs = data.draw(rows)
    corpus = FORMATS[kind](docs, settings(Packing.concat, T))
    whole = everything(corpus)
    ids = data.draw(st.lists(st.integers(0, corpus.sequences - 1), max_size=20))
    again = pickle.loads(pickle.dumps(corpus))
    found = again.read(np.array(ids, np.int64))
    assert [(content(one), one.documents, one.byte_offset) for one in found] == [
        (content(whole[n]), whole[n].documents, whole[n].byte_offset) for n in ids
    ]
    start = data.draw(st.integers(0, corpus.sequences))
    stop = data.draw(st.integers(start, corpus.sequences))
    tokens = [
        block.tokens[block.offsets[row] : block.offsets[row + 1]].tolist()
        for block in corpus.token_blocks(start, stop)
        for row in range(len(block))
    ]
    assert tokens == [whole[n].token_ids.tolist() for n in range(start, stop)]


@pytest.mark.parametrize("kind", ["megatron", "megatron of sentences", "raw npy", "npy", "big-endian npy"])
@examples(max_examples=10)
@given(docs=rows, length=st.integers(2, 12))
def test_a_byte_offset_leads_back_to_the_very_document(kind: str, docs: list[list[int]], length: int) -> None:
    corpus = FORMATS[kind](docs, settings(Packing.concat, length))
    store = Store(corpus.store.uri.removesuffix("-described"))
    dtype = {"megatron of sentences": "<i4", "big-endian npy": ">u4"}.get(kind, "<u2")
    starts = np.cumsum([0, *(len(tokens) + 1 for tokens in docs)]).tolist()
    for sequence in everything(corpus):
        data = store.read(sequence.path.rpartition("/")[2])
        first = sequence.documents[0]
        name, mark, number = first.id.replace("@", " @ ").replace("#", " # ").split(" ")
        assert name == sequence.path.rpartition("/")[2] == first.source
        document = docs[int(number)] if mark == "#" else docs[starts.index(int(number))]
        assert np.frombuffer(data[sequence.byte_offset :], dtype)[: len(document)].tolist() == document
        if first.end > first.start:
            shown = sequence.token_ids[first.start : first.end].tolist()
            assert any(document[at : at + len(shown)] == shown for at in range(len(document)))


def test_many_files_are_numbered_through_in_the_order_of_their_names(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "in"))
    docs = [[[n + 2] * (n + 1)] * 3 for n in range(6)]
    for n in (3, 0, 5, 1, 4, 2):
        layouts.megatron(store, f"deep/{n % 2}/part-{n}", ended(docs[n]))
    pack = settings(Packing.concat, T)
    corpus = layouts.described(store, corpus_config(store.uri), pack)
    expected = [one for n in (0, 2, 4, 1, 3, 5) for one in packed(docs[n], pack)]
    assert [content(one)[1:] for one in everything(corpus)] == [one[1:] for one in expected]
    assert [one.sequence_id for one in everything(corpus)] == list(range(corpus.sequences))


@pytest.mark.parametrize("path", ["part-1.bin", "part-1.idx", "part-1", "part-[1]*", ""])
def test_a_megatron_corpus_is_named_by_either_file_its_prefix_a_glob_or_its_folder(tmp_path: Path, path: str) -> None:
    store = Store(str(tmp_path))
    layouts.megatron(store, "part-1", [[2, 3, EOS]])
    config = corpus_config(tmp_path / path)
    assert layouts.described(store, config, settings(Packing.concat, T), Store(f"{tmp_path}-out")).tokens == 3


def test_samples_of_several_windows_are_cut_and_keep_their_own_names() -> None:
    store = memory()
    samples = [
        {"tokens": np.arange(2, 2 + 2 * T - 3), "uid": f"u{n}", "site": "s"} if n < 2 else
        {"tokens": np.array([2, EOS, *range(3, 2 * T + 1)]), "uid": f"u{n}", "site": "s"}
        for n in range(3)
    ]  # fmt: skip
    layouts.mds(store, samples, {"tokens": "ndarray:int32", "uid": "str", "site": "str"}, per_shard=2)
    config = corpus_config(store.uri, id_field="uid", source_field="site")
    corpus = layouts.described(store, config, settings(Packing.concat, T))
    assert corpus.sequences == 6
    found = everything(corpus)
    assert [one.documents[0].id for one in found] == ["u0", "u0", "u1", "u1", "u2", "u2@2"]
    assert {one.source for one in found} == {"s"}
    assert [len(one) for one in found] == [8, 5, 8, 5, 8, 8]
    layouts.mds(store, [*samples, {"tokens": np.arange(2, 6), "uid": "odd", "site": "s"}],
                {"tokens": "ndarray:int32", "uid": "str", "site": "str"}, per_shard=2)  # fmt: skip
    corpus = layouts.described(store, config, settings(Packing.concat, T))
    with pytest.raises(CorpusError, match=r"sample 1 has 4 tokens.*corpus\.in_place=false"):
        everything(corpus)


def merged_mds(*, compress: bool) -> Store:
    """Two folders of shards, each with its index, and one merged of both; a shard is decompressed too."""
    store = memory()
    shards = []
    for number in range(2):
        folder = store / f"{number}"
        layouts.mds(folder, [{"tokens": np.arange(2, 7) + number}] * 3, {"tokens": "ndarray:int32"}, compress=compress)
        for shard in folder.read_json("index.json")["shards"]:
            for key in ("raw_data", "zip_data"):
                if shard[key]:
                    shard[key]["basename"] = f"{number}/{shard[key]['basename']}"
            shards.append(shard)
    store.write_json("index.json", {"shards": shards, "version": 2})
    if compress:
        store.write("0/shard.00000.mds", zstandard.decompress(store.read("0/shard.00000.mds.zstd"), 1 << 20))
    return store


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("only", ["both", "merged"])
def test_a_shard_of_a_merged_index_counts_once(compress: bool, only: str) -> None:
    store = merged_mds(compress=compress)
    if only == "merged":
        store.remove("0/index.json")
        store.remove("1/index.json")
    config = corpus_config(store.uri, tokens_field="tokens")
    corpus = layouts.described(store, config, settings(Packing.concat, T))
    found = sorted(tuple(one.token_ids.tolist()) for one in everything(corpus))
    assert found == [(2, 3, 4, 5, 6)] * 3 + [(3, 4, 5, 6, 7)] * 3
    prepared = corpus_config(store.uri, tokens_field="tokens", in_place=False)
    documents = [one for file in document_files(prepared) for one in read_documents(file, prepared)]
    assert len(documents) == 6


@pytest.mark.parametrize("packing", Packing)
@pytest.mark.parametrize("last", [2, 3])
def test_pythias_pieces_of_one_file_are_read_as_the_file(packing: Packing, last: int) -> None:
    docs = ended(big_corpus(40))
    whole, cut = memory(), memory()
    layouts.megatron(whole, "document", docs)
    layouts.megatron(cut, "document", docs)
    data = cut.read("document.bin")
    # Cut anywhere, in the middle of a token too.
    bounds = [0, 101, 102, len(data)]
    for number in range(3):
        cut.write(f"document-{number:05d}-of-{last:05d}.bin", data[bounds[number] : bounds[number + 1]])
    cut.remove("document.bin")
    pack = settings(packing, T)
    one = layouts.described(whole, corpus_config(whole.uri, packing=packing), pack)
    for path in (cut.uri, f"{cut.uri}/document"):
        two = layouts.described(cut, corpus_config(path, packing=packing), pack)
        assert [content(each) for each in two.read(np.arange(two.sequences))] == [
            content(each) for each in one.read(np.arange(one.sequences))
        ]
    cut.write(f"document-00001-of-{last:05d}.bin", b"xyz")
    with pytest.raises(CorpusError, match=r"with its other pieces, and its index says"):
        layouts.described(cut, corpus_config(cut.uri, packing=packing), pack)
    cut.remove(f"document-00001-of-{last:05d}.bin")
    with pytest.raises(CorpusError, match=rf"document-00001-of-{last:05d}\.bin is missing, a piece"):
        layouts.described(cut, corpus_config(cut.uri, packing=packing), pack)


def big_corpus(count: int = 5000) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, n).tolist() for n in rng.integers(1, 60, count)]


@pytest.mark.parametrize("kind", ["megatron", "raw npy"])
def test_a_window_costs_a_few_small_ranges_and_never_the_file(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "_BLOCK", 64)
    docs = big_corpus()
    pack = settings(Packing.concat, T)
    corpus = FORMATS[kind](docs, pack)
    expected = packed(docs, pack)
    asked: list[int] = []

    def counted(uri: str, start: int, stop: int) -> bytes:
        asked.append(stop - start)
        return real(uri, start, stop)

    real = in_place.read_range
    for module in (megatron, in_place):
        monkeypatch.setattr(module, "read_range", counted)
    monkeypatch.setattr(arrays, "_STEP_TOKENS", 512)
    (one,) = corpus.read(np.array([corpus.sequences // 2]))
    assert content(one) == expected[corpus.sequences // 2]
    assert sum(asked) < 6000 < 2 * corpus.tokens / 20
    assert len(asked) < 30


def test_a_document_longer_than_the_search_is_named_after_where_the_search_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arrays, "_SEARCH_TOKENS", 64)
    corpus = in_npy([[2] * 300, [3] * 5], settings(Packing.concat, T), header=False)
    ids = [one.document_id for one in everything(corpus)]
    assert ids[0] == "a.npy@0"
    assert set(ids) <= {f"a.npy@{start}" for start in (0, 64, 128, 192, 301)}
    assert ids[-1] == "a.npy@301"


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    docs, pack = big_corpus(300), settings(Packing.concat, T)

    def fingerprint(place: str, docs: list[list[int]] = docs, pack: PackSettings = pack, name: str = "a") -> str:
        store = Store(str(tmp_path / place))
        layouts.megatron(store, name, ended(docs))
        return layouts.described(store, corpus_config(store.uri), pack).fingerprint

    assert fingerprint("one") == fingerprint("two/below")
    others = [
        fingerprint("first", [[9, *docs[0][1:]], *docs[1:]]),
        fingerprint("last", [*docs[:-1], [*docs[-1][:-1], 48]]),
        fingerprint("more", [*docs, [5]]),
        fingerprint("T", pack=settings(Packing.concat, T + 1)),
        fingerprint("name", name="b"),
    ]
    assert len({fingerprint("one"), *others}) == 6


def test_a_file_that_changes_after_it_was_described_stops_the_reading(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "in"))
    layouts.npy(store, "a.npy", stream(big_corpus(50)))
    corpus = layouts.described(store, corpus_config(store.uri), settings(Packing.concat, T))
    whole = everything(corpus)
    store.write("a.npy", store.read("a.npy")[:-2] + b"\x05\x00")
    with pytest.raises(CorpusError, match=r"a\.npy has another ETag.*changed under the run"):
        everything(pickle.loads(pickle.dumps(corpus)))
    store.remove("a.npy")
    with pytest.raises(CorpusError, match=r"a\.npy is gone"):
        everything(pickle.loads(pickle.dumps(corpus)))
    assert len(whole) == corpus.sequences


def refused(match: str, write: Callable[[Store], None], packing: Packing = Packing.concat, **config: Any) -> None:
    store = memory()
    write(store)
    with pytest.raises(CorpusError, match=match):
        layouts.described(store, corpus_config(store.uri, **config), settings(packing, T))


def test_a_format_that_is_given_takes_no_file_beside_the_arrays() -> None:
    store = memory()
    for name in ("train.bin", "train.csv.gz", "00000.ds.index"):
        store.write(name, np.array([2, 3, EOS], "<u2").tobytes())
    corpus = layouts.described(store, corpus_config(store.uri, format="npy"), settings(Packing.concat, T))
    assert (corpus.sequences, corpus.tokens) == (1, 3)


def test_files_that_are_cut_off_or_of_another_kind_are_refused() -> None:
    docs = [[2, 3, EOS], [4, EOS]]

    def cut(name: str, keep: int) -> Callable[[Store], None]:
        def write(store: Store) -> None:
            layouts.megatron(store, "a", docs)
            store.write(name, store.read(name)[:keep])

        return write

    refused(r"a\.bin has 6 bytes, and its index says 10", cut("a.bin", 6))
    refused(r"a\.idx has 40 bytes, and its header says", cut("a.idx", 40))
    refused(r"a\.idx is no Megatron index", cut("a.idx", 5))
    refused(r"a\.idx is missing.*nanoGPT's, is read with corpus\.format=npy", lambda s: s.write("a.bin", b"12"))
    refused(
        "notes.dat is not one of the npy files", lambda s: (layouts.npy(s, "a.npy", [2]), s.write("notes.dat", b"x"))
    )
    refused("is no number of uint16", lambda store: store.write("a.npy", b"123"))
    refused("a header of litgpt", lambda store: store.write("a.bin", b"LITPKDS" + bytes(33)), format="npy")
    refused("a header of llm.c", lambda store: store.write("a.bin", (20240520).to_bytes(4, "little")), format="npy")
    refused("pickles are never opened", lambda s: (s.write("a.bin", b"12"), s.write("meta.pkl", b"12")), format="npy")
    refused("hold no token", lambda store: store.write("a.npy", b""))
    refused("holds float64", lambda store: store.write("a.npy", _saved(np.zeros(3))))
    refused("holds object", lambda store: store.write("a.npy", _saved(np.array([[1]], object))))
    refused(r"has the shape \(2, 5\)", lambda store: store.write("a.npy", _saved(np.ones((2, 5), np.uint16))))
    refused("its header says", lambda store: store.write("a.npy", _saved(np.ones(50, np.uint16))[:-2]))
    refused("cannot number them", lambda store: layouts.npy(store, "a.npy", [2]), Packing.document)
    refused("'float16' is none of", lambda store: layouts.npy(store, "a.npy", [2]), dtype="float16")


def _saved(array: np.ndarray) -> bytes:
    import io

    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=array.dtype == object)
    return stream.getvalue()


def test_token_ids_of_another_vocabulary_or_width_are_refused_before_anything_is_scanned() -> None:
    refused(f"holds token id {VOCAB}, outside the vocabulary", lambda store: layouts.npy(store, "a.npy", [2, VOCAB]))
    refused(r"every second token id is 0.*corpus\.dtype=uint32",
            lambda store: layouts.npy(store, "a.npy", [3] * 200, "<u4"))  # fmt: skip
    refused("outside the vocabulary", lambda store: layouts.npy(store, "a.npy", [3] * 200), dtype="uint32")
    refused("outside the vocabulary", lambda store: layouts.megatron(store, "a", [[2, -1]], "<i4"))


def test_shards_that_are_pickled_damaged_or_of_another_make_are_refused() -> None:
    samples = [{"tokens": np.arange(2, 2 + T)}] * 7
    int32 = {"tokens": "ndarray:int32"}
    write = layouts.mds
    refused("'tokens' is pickled", lambda store: write(store, [{"tokens": b"x"}], {"tokens": "pkl"}))
    refused("compressed with 'br'", lambda store: write(store, samples, int32, compress=True, compression="br"))
    refused("version 1", lambda store: write(store, samples, int32, version=1))
    refused(r"and no 'tokens'", lambda store: write(store, [{"text": "x"}], {"text": "str"}))
    refused("holds no token ids", lambda store: write(store, [{"tokens": "x"}], {"tokens": "str"}))
    refused("holds float32", lambda store: write(store, [{"tokens": np.ones(3)}], {"tokens": "ndarray:float32"}))
    refused("decompressed, more than", lambda store: write(store, samples, int32, compress=True, raw_data={
        "basename": "shard.00000.mds", "bytes": 3 << 30, "hashes": {}}))  # fmt: skip
    refused("decompresses to another size", lambda store: write(store, samples[:3], int32, compress=True, raw_data={
        "basename": "shard.00000.mds", "bytes": 99, "hashes": {}}))  # fmt: skip

    def then(name: str, change: Callable[[bytes], bytes], compress: bool = False) -> Callable[[Store], None]:
        def both(store: Store) -> None:
            write(store, samples, int32, compress=compress)
            store.write(name, change(store.read(name)))

        return both

    refused(r"shard\.00000\.mds has .* bytes, and .*index\.json says", then("shard.00000.mds", lambda data: data[:-1]))
    refused("is no index of MDS shards", then("index.json", lambda data: data[:-5]))
    refused("offsets do not fit", then("shard.00000.mds", lambda data: data[:4] + b"\xff" * 8 + data[12:]))
    refused("shard is corrupt|decompresses to another size",
            then("shard.00000.mds.zstd", lambda data: data[:9] + bytes(len(data) - 9), compress=True))  # fmt: skip


def test_a_damaged_index_of_documents_is_named() -> None:
    store = memory()
    layouts.megatron(store, "a", [[2] * 20, [3] * 20])
    data = store.read("a.idx")
    pack = settings(Packing.concat, T)
    store.write("a.idx", data[:-16] + b"\x09" + data[-15:])
    with pytest.raises(CorpusError, match=r"a\.idx names sequence 9"):
        everything(layouts.described(store, corpus_config(store.uri), pack))
    store.write("a.idx", data[:-8] + b"\x01" + data[-7:])
    with pytest.raises(CorpusError, match="documents run from sequence 0 to 1 of 2"):
        layouts.described(store, corpus_config(store.uri), pack)


def test_arrays_in_an_s3_bucket_are_read_by_ranges(moto_s3: Bucket) -> None:
    docs, pack = big_corpus(400), settings(Packing.concat, T)
    store = Store(moto_s3.uri())
    layouts.megatron(store, "a", ended(docs))
    layouts.npy(store, "npy/a.npy", stream(docs))
    expected = packed(docs, pack)
    for path in ("a.bin", "npy"):
        corpus = layouts.described(store, corpus_config(f"{store}/{path}"), pack, Store(f"memory://s3-{path}"))
        ids = np.array([corpus.sequences - 1, 0, corpus.sequences // 2])
        assert [content(one) for one in corpus.read(ids)] == [expected[n] for n in ids]


@pytest.mark.parametrize(
    "elsewhere",
    ["http://169.254.169.254/latest/meta-data", "http://localtest.me:8080/x", "/etc", "s3://theirs/x"],
)
def test_a_strangers_description_leads_nowhere_unless_the_user_allows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: str
) -> None:
    store = Store(str(tmp_path / "theirs"))
    layouts.npy(store, "a.npy", stream(big_corpus(50)))
    value = layouts.described(store, corpus_config(store.uri), settings(Packing.concat, T)).description.to_json()
    named = replace_first(value, elsewhere)
    part = {"at": elsewhere, "label": "theirs", "fingerprint": "f"}
    for description in (named, with_checksum({"format": "joined", "fingerprint": "f", "corpora": [part]})):
        store.write_json("addressable.json", description)
        with pytest.raises(StorageError, match=r"addressable\.json names .*, outside its folder"):
            open_corpus(store, foreign=True)
    store.write_json("addressable.json", named)
    monkeypatch.setenv("INFSCAN_ALLOWED_ADDRESSES", f"/nowhere, {elsewhere}")
    assert open_corpus(store, foreign=True).sequences


def test_a_strangers_description_may_name_what_is_in_its_folder_and_no_link_out_of_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "theirs"))
    layouts.npy(store, "a.npy", stream(big_corpus(50)))
    value = layouts.described(store, corpus_config(store.uri), settings(Packing.concat, T)).description.to_json()
    store.write_json("addressable.json", value)
    assert open_corpus(store, foreign=True).sequences
    (tmp_path / "theirs" / "a.npy").rename(tmp_path / "secret.npy")
    (tmp_path / "theirs" / "a.npy").symlink_to(tmp_path / "secret.npy")
    with pytest.raises(StorageError, match=r"a\.npy, outside its folder"):
        open_corpus(store, foreign=True)


def test_what_this_user_described_may_lie_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFSCAN_CACHE", str(tmp_path / "cache"))
    data = Store(str(tmp_path / "data"))
    layouts.npy(data, "a.npy", stream(big_corpus(50)))
    value = layouts.described(data, corpus_config(data.uri), settings(Packing.concat, T)).description.to_json()
    mine = Store(str(tmp_path / "run" / "corpus"))
    mine.write_json("addressable.json", value)
    with pytest.raises(StorageError, match="this user's infscan did not write"):
        open_corpus(mine, foreign=True)
    remember_written(mine.read("addressable.json"))
    assert open_corpus(mine, foreign=True).sequences


def replace_first(value: dict[str, Any], uri: str) -> dict[str, Any]:
    """A description whose first file lies elsewhere."""
    first, *others = value["files"]
    return value | {"files": [first | {"data": first["data"] | {"uri": uri}}, *others]}
