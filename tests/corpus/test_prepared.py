"""A prepared corpus holds what its documents hold, under a fingerprint of its content and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from infscan.config import Packing
from infscan.corpus.addressable import is_prepared
from infscan.corpus.documents import read_documents
from infscan.corpus.manifest import Manifest, part_schema, read_inputs
from infscan.corpus.packing import Counts, Packer, PackSettings
from infscan.corpus.part_file import ROW_GROUP_SEQUENCES, finished_part
from infscan.corpus.prepared import prepare_part, write_manifest
from infscan.corpus.splits import InputSplit
from infscan.corpus.tokenizer import load_tokenizer
from infscan.errors import CorpusError
from infscan.storage import Store, expand
from tests.corpus.builders import BOS, EOS, VOCAB, corpus_config, plain, prepare, settings, token_rows, write_rows
from tests.corpus.test_tokenizer import save_tokenizer

PACK = settings(Packing.concat, 8)


def test_gz_zst_plain_and_parquet_give_the_same_sequences(tmp_path: Path) -> None:
    rows = token_rows(40)
    found = {}
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"):
        path = write_rows(tmp_path / f"in{suffix}", rows)
        manifest, corpus = prepare(path, tmp_path / f"out{suffix}", PACK)
        sequences = [plain(sequence) for sequence in corpus.read(range(corpus.sequences))]
        if suffix == ".parquet":  # offsets are rows there
            sequences = [
                {**one, "byte_offset": other["byte_offset"]}
                for one, other in zip(sequences, found[".jsonl"][1], strict=True)
            ]
        found[suffix] = manifest.fingerprint, sequences
    assert all(value == found[".jsonl"] for value in found.values())


def test_the_fingerprint_knows_no_folder_and_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = token_rows(40)
    for folder in ("here", "there/below"):
        for n in range(3):
            write_rows(tmp_path / folder / f"{n}.jsonl", rows[n::3])
    one, _ = prepare(tmp_path / "here", tmp_path / "a", PACK)
    two, _ = prepare(tmp_path / "there/below", tmp_path / "b", PACK)
    again, _ = prepare(tmp_path / "here", tmp_path / "c", PACK)
    assert one.fingerprint == two.fingerprint == again.fingerprint
    for part in one.parts:
        assert (tmp_path / "a" / part.name).read_bytes() == (tmp_path / "c" / part.name).read_bytes()


@pytest.mark.parametrize("change", ["a token", "a document id", "T", "packing"])
def test_the_fingerprint_sees_every_change_of_content(tmp_path: Path, change: str) -> None:
    rows, pack = token_rows(10), PACK
    before, _ = prepare(write_rows(tmp_path / "x.jsonl", rows), tmp_path / "a", pack)
    if change == "a token":
        rows[4]["tokens"][0] ^= 1
    elif change == "a document id":
        rows[4]["id"] = "another"
    else:
        pack = settings(Packing.concat, 9) if change == "T" else settings(Packing.document, 8)
    after, _ = prepare(write_rows(tmp_path / "y.jsonl", rows), tmp_path / "b", pack)
    assert before.fingerprint != after.fingerprint


def test_the_manifest_adds_up_and_numbers_the_parts_through(tmp_path: Path) -> None:
    for n in range(4):
        write_rows(tmp_path / "in" / f"{n}.jsonl", [] if n == 1 else token_rows(10 + n, seed=n))
    manifest, corpus = prepare(tmp_path / "in", tmp_path / "out", PACK)
    assert manifest.counts == sum((part.counts for part in manifest.parts), Counts())
    counts = manifest.counts
    assert counts.tokens_read + counts.tokens_added - counts.tokens_truncated == counts.tokens == manifest.tokens
    assert [part.sequences for part in manifest.parts][1] == 0
    value = json.loads((tmp_path / "out" / "manifest.json").read_text())
    starts = [part["first_sequence_id"] for part in value["parts"]]
    assert starts == [0, *(sum(p.sequences for p in manifest.parts[: n + 1]) for n in range(3))]
    assert list(read_inputs(corpus.store, manifest)) == [str(tmp_path / "in" / f"{n}.jsonl") for n in range(4)]
    lengths = [len(row["tokens"]) for n in (0, 2, 3) for row in token_rows(10 + n, seed=n)]
    assert value["document_lengths"]["2-3"] == sum(2 <= length <= 3 for length in lengths)
    assert sum(value["document_lengths"].values()) == len(lengths)
    assert Manifest.from_json(value, "here") == manifest
    sequences = corpus.read(range(corpus.sequences))
    assert [sequence.sequence_id for sequence in sequences] == list(range(manifest.sequences))


def test_sequences_are_what_the_packer_made_of_each_file(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", token_rows(30))
    _, corpus = prepare(path, tmp_path / "out", PACK)
    expected = Packer(PACK).pack(read_documents(expand(str(path))[0], corpus_config(path)))
    assert [plain(one) for one in corpus.read(range(corpus.sequences))] == [plain(one) for one in expected]


def test_a_part_is_kept_only_for_the_same_file_and_settings(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", token_rows(10))
    config, store = corpus_config(path), Store(str(tmp_path / "out"))
    (file,) = expand(str(path))
    made = prepare_part(InputSplit((file,)), 0, config, PACK, None, store)
    assert finished_part(store, 0) == made
    assert finished_part(store, 1) is None
    stamp = (tmp_path / "out" / made.name).stat().st_ino
    assert prepare_part(InputSplit((file,)), 0, config, PACK, None, store) == made
    assert (tmp_path / "out" / made.name).stat().st_ino == stamp
    other = prepare_part(InputSplit((file,)), 0, config, settings(Packing.concat, 5), None, store)
    assert other.settings != made.settings
    (tmp_path / "out" / made.name).write_bytes(b"PAR1 cut off")
    assert finished_part(store, 0) is None
    assert prepare_part(InputSplit((file,)), 0, config, PACK, None, store) == made


def test_a_bad_document_leaves_no_part(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [*token_rows(5), {"id": "bad", "tokens": [VOCAB]}])
    store = Store(str(tmp_path / "out"))
    with pytest.raises(CorpusError, match=f"'bad'.* token id {VOCAB}"):
        prepare_part(InputSplit((expand(str(path))[0],)), 0, corpus_config(path), PACK, None, store)
    assert store.list() == []
    assert not is_prepared(store.uri)


def test_a_corpus_without_a_token_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"tokens": []}])
    with pytest.raises(CorpusError, match="1 files with 1 documents hold no token"):
        prepare(path, tmp_path / "out", PACK)
    assert not is_prepared(str(tmp_path / "out"))


def test_text_without_a_tokenizer_is_refused_with_the_mend(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"id": "t", "text": "words"}])
    with pytest.raises(CorpusError, match=r"'t' is text.*corpus\.tokens_field"):
        prepare(path, tmp_path / "out", PACK)


def test_text_is_tokenised_in_order_beside_rows_that_bring_token_ids(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path / "model")))
    assert tokenizer is not None
    rows = [{"id": f"d{n}", **({"tokens": [n % 7 + 2]} if n % 3 else {"text": f"word {n}"})} for n in range(600)]
    path = write_rows(tmp_path / "x.jsonl", rows)
    pack = PackSettings(Packing.document, 64, 300)
    store = Store(str(tmp_path / "out"))
    config = corpus_config(path, packing=Packing.document)
    part = prepare_part(InputSplit((expand(str(path))[0],)), 0, config, pack, tokenizer, store)
    manifest = write_manifest(store, config, pack, tokenizer.digest, [part])
    assert manifest.tokenizer == tokenizer.digest
    found = pq.read_table(tmp_path / "out" / part.name).to_pylist()
    for n, row in enumerate(found):
        assert row["documents"][0]["id"] == f"d{n}"
        assert row["token_ids"] == (rows[n].get("tokens") or tokenizer.encode(f"word {n}").tolist())


def test_row_groups_and_columns_are_as_they_are_said_to_be(tmp_path: Path) -> None:
    rows = [{"tokens": [2, 3]} for _ in range(ROW_GROUP_SEQUENCES + 5)]
    pack = settings(Packing.document, 4)
    prepare(write_rows(tmp_path / "x.jsonl", rows), tmp_path / "out", pack)
    with pq.ParquetFile(tmp_path / "out" / "part-00000.parquet") as parquet:
        groups = [parquet.metadata.row_group(n) for n in range(parquet.metadata.num_row_groups)]
        assert [group.num_rows for group in groups] == [ROW_GROUP_SEQUENCES, 5]
        assert groups[0].column(0).compression == "ZSTD"
        assert parquet.schema_arrow.equals(part_schema(VOCAB))


@pytest.mark.parametrize(
    ("vocab_size", "kind"), [(256, "uint8"), (257, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "uint32")]
)
def test_token_ids_are_as_narrow_as_the_vocabulary_allows(vocab_size: int, kind: str) -> None:
    assert str(part_schema(vocab_size).field("token_ids").type.value_type) == kind


def test_settings_say_what_was_asked_for(tmp_path: Path) -> None:
    pack = settings(Packing.concat, 8, bos=True)
    manifest, _ = prepare(write_rows(tmp_path / "x.jsonl", token_rows(5)), tmp_path / "out", pack, bos=True)
    expected = {"packing": "concat", "sequence_length": 8, "bos_id": BOS, "eos_id": EOS, "tokens_field": "tokens"}
    assert expected.items() <= manifest.settings.items()
    assert json.loads(json.dumps(manifest.to_json())) == manifest.to_json()
