"""Files as people have them: named alike in several folders, beside licences and checksums, with fields of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infscan.config import Packing, TextRecords
from infscan.corpus.beside import data_files
from infscan.corpus.documents import data_and_beside, document_files, read_documents
from infscan.corpus.files import partitions
from infscan.corpus.named_fields import check_named_fields
from infscan.corpus.packing import Packer
from infscan.corpus.prepared import RULES, earlier_rules
from infscan.corpus.rows import Document
from infscan.errors import BadDocumentError, BadFileError, CorpusError
from infscan.storage import InputFile, Store, expand
from tests.corpus import layouts
from tests.corpus.builders import EOS, corpus_config, documents, settings, write_rows

TEXT = [{"text": "one two three"}, {"text": "four five"}]


def read(path: Path | str, **fields: Any) -> list[Document]:
    config = corpus_config(path, tokens_field=None, **fields)
    return [one for file in document_files(config) for one in read_documents(file, config)]


def labels(found: Sequence[Document]) -> list[tuple[str, str]]:
    return [(one.id, one.source) for one in found]


# Made-up ids and sources.


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet", ".arrow"])
def test_files_named_alike_in_several_folders_give_ids_and_sources_of_their_own(tmp_path: Path, suffix: str) -> None:
    for folder in ("chunk1", "chunk2/deep"):
        write_rows(tmp_path / folder / f"part-0{suffix}", TEXT)
    first = 1 if "jsonl" in suffix else 0
    names = [f"chunk1/part-0{suffix}", f"chunk2/deep/part-0{suffix}"]
    expected = [(f"{name}#{row}", name) for name in names for row in (first, first + 1)]
    assert labels(read(tmp_path)) == expected
    assert labels(read(f"{tmp_path}/*/")) == expected
    assert labels(read(f"{tmp_path}/chunk1/*")) == [
        (f"part-0{suffix}#{n}", f"part-0{suffix}") for n in (first, first + 1)
    ]
    assert labels(read(tmp_path / names[0]))[0] == (f"part-0{suffix}#{first}", f"part-0{suffix}")


def test_a_folder_of_texts_is_one_source(tmp_path: Path) -> None:
    for name in ("books/a.txt", "books/b.txt", "c4/a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("some words")
    assert labels(read(tmp_path)) == [("books/a.txt", "books"), ("books/b.txt", "books"), ("c4/a.txt", "c4")]
    assert labels(read(tmp_path / "books")) == [("a.txt", "books"), ("b.txt", "books")]
    assert labels(read(tmp_path / "c4" / "a.txt")) == [("a.txt", "a.txt")]
    by_line = read(tmp_path, text_records=TextRecords.line)
    assert labels(by_line)[0] == ("books/a.txt#1", "books/a.txt")


@pytest.mark.parametrize("kind", ["npy", "megatron", "mds"])
@pytest.mark.parametrize("in_place", [True, False])
def test_arrays_named_alike_give_ids_of_their_own(kind: str, in_place: bool, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "data"))
    for folder in ("books", "c4"):
        if kind == "npy":
            layouts.npy(store / folder, "part-0.npy", [2, 3, EOS])
        elif kind == "megatron":
            layouts.megatron(store / folder, "part-0", [[2, 3, EOS]])
        else:
            layouts.mds(store / folder, [{"tokens": np.array([2, 3, EOS])}], {"tokens": "ndarray:int32"})
    config = corpus_config(store.uri, in_place=in_place, eos_id=EOS)
    if in_place:
        corpus = layouts.described(store, config, settings(Packing.concat, 8), Store(str(tmp_path / "out")))
        found = [(one.document_id, one.source) for one in corpus.read(np.arange(corpus.sequences))]
    else:
        found = labels([one for file in document_files(config) for one in read_documents(file, config)])
    assert len({name for name, _ in found}) == len({source for _, source in found}) == 2
    assert [name.partition("/")[0] for name, _ in found] == ["books", "c4"]


def test_hives_columns_are_kept(tmp_path: Path) -> None:
    write_rows(tmp_path / "lang=en" / "year=2024" / "part-0.parquet", TEXT[:1])
    write_rows(tmp_path / "lang=de" / "year=__HIVE_DEFAULT_PARTITION__" / "part-0.parquet", TEXT[:1])
    assert [one.source for one in read(tmp_path, source_field="lang")] == ["de", "en"]
    assert [one.source for one in read(tmp_path, source_field="year")] == [
        "lang=de/year=__HIVE_DEFAULT_PARTITION__/part-0.parquet",
        "2024",
    ]
    assert partitions("s3://bucket/a%3Db=c%20d/x.parquet") == {"a": "b=c d"}


@pytest.mark.parametrize(
    ("changes", "names", "earlier"),
    [
        ({}, ["x.jsonl"], None),
        ({}, ["a/x.jsonl"], "without its folder"),
        ({"text_records": TextRecords.line}, ["x.txt"], None),
        ({}, ["x.txt"], "a source of its own"),
        ({"prompt_field": "p"}, ["x.jsonl"], "tokenised apart"),
        ({"tokens_field": "t"}, ["x.jsonl"], "EOS that documents bring was doubled"),
        ({"tokens_field": "t", "packing": Packing.document}, ["x.jsonl"], None),
    ],
)
def test_a_corpus_of_an_earlier_version_is_kept_where_it_would_come_out_alike(
    changes: dict[str, Any], names: list[str], earlier: str | None
) -> None:
    config = corpus_config("/data", **{"tokens_field": None, **changes})
    files = [InputFile(f"/data/{name}", 1, "") for name in names]
    found = earlier_rules({"packing": config.packing.value}, config, files)
    assert (found is None) == (earlier is None)
    assert earlier is None or earlier in str(found)
    assert earlier_rules({"rules": RULES, "packing": config.packing.value}, config, files) is None


# Fields.


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".arrow"])
def test_dotted_paths_are_read_everywhere(tmp_path: Path, suffix: str) -> None:
    rows = [{"doc": {"en": "one", "de": "eins"}, "meta": {"set": "web", "n": {"id": 7}}, "ask": {"q": "why"}}]
    path = write_rows(tmp_path / f"x{suffix}", rows)
    fields = {"text_field": "doc.en", "id_field": "meta.n.id", "source_field": "meta.set", "prompt_field": "ask.q"}
    [found] = read(path, **fields)
    assert (found.text, found.id, found.source, found.prompt) == ("one", "7", "web", "why")
    [tokens] = read_tokens(write_rows(tmp_path / f"t{suffix}", [{"a": {"ids": [1, 2], "mask": [0, 1]}}]))
    assert tokens.token_ids is not None
    assert tokens.loss is not None
    assert (tokens.token_ids.tolist(), tokens.loss.tolist()) == ([1, 2], [False, True])


def read_tokens(path: Path) -> list[Document]:
    config = corpus_config(path, tokens_field="a.ids", mask_field="a.mask")
    return [one for file in document_files(config) for one in read_documents(file, config)]


def test_a_field_whose_name_has_a_dot_is_that_field(tmp_path: Path) -> None:
    [found] = read(write_rows(tmp_path / "x.jsonl", [{"meta.set": "flat", "meta": {"set": "deep"}, "text": "a"}]),
                   source_field="meta.set")  # fmt: skip
    assert found.source == "flat"


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("key", "field", "hint"),
    [("id_field", "hexhsa", "did you mean hexsha?"), ("source_field", "meta.language", "did you mean meta.lang?")],
)
def test_a_named_field_that_no_row_has_is_refused(tmp_path: Path, suffix: str, key: str, field: str, hint: str) -> None:
    rows = [{"hexsha": f"h{n}", "text": "words", "meta": {"lang": "py"}} for n in range(3)]
    config = corpus_config(write_rows(tmp_path / f"x{suffix}", rows), tokens_field=None, **{key: field})
    with pytest.raises(CorpusError, match=rf"corpus\.{key}={field} is in no row of .*{hint[:-1]}"):
        check_named_fields([(config, document_files(config))])
    right = corpus_config(config.path, tokens_field=None, id_field="hexsha", source_field="meta.lang")
    check_named_fields([(right, document_files(right))])
    # Rows may lack it, as long as one has it.
    some = write_rows(tmp_path / "some.jsonl", [*rows, {field.split(".")[0]: "x", "text": "y"}])
    if "." not in field:
        check_named_fields([(config, expand(str(some)))])


def test_columns_of_mds_are_named_or_refused() -> None:
    store = Store("memory://real-files/mds")
    layouts.mds(store, [{"tokens": np.array([2, 3]), "id": 0.5}], {"tokens": "ndarray:int32", "id": "float64"})
    config = corpus_config(store.uri)
    corpus = layouts.described(store, config, settings(Packing.concat, 8))
    assert corpus.read(np.array([0]))[0].document_id == "shard.00000.mds#0"
    with pytest.raises(CorpusError, match=r"corpus\.id_field=uid is not there; its columns are id, tokens"):
        layouts.described(store, corpus_config(store.uri, id_field="uid"), settings(Packing.concat, 8))


@pytest.mark.parametrize(
    ("value", "label"),
    [(3, "3"), (3.0, "3"), ("3", "3"), (float("nan"), None), (None, None)],
)
def test_whole_numbers_are_ids_whatever_made_them_floats(tmp_path: Path, value: Any, label: str | None) -> None:
    table = pa.table({"text": ["a"], "key": pa.array([value], from_pandas=False)})
    pq.write_table(table, tmp_path / "x.parquet")
    [found] = read(tmp_path / "x.parquet", id_field="key")
    assert found.id == (label or "x.parquet#0")
    # One that was asked for and is not there is made up, and counted.
    assert found.aside == (label is None)


@pytest.mark.parametrize("value", [0.5, {"$oid": "65f0"}, [1], True, "x" * 5000, 2.0**60])
def test_an_id_that_can_be_none_is_left_aside_or_refused_where_it_was_asked_for(tmp_path: Path, value: Any) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"text": "a", "id": value, "key": value}])
    [found] = read(path)
    assert (found.id, found.aside) == ("x.jsonl#1", 1)
    with pytest.raises(BadDocumentError, match=r"'key' is .*corpus\.id_field"):
        read(path, id_field="key")
    [oid] = read(write_rows(tmp_path / "y.jsonl", [{"text": "a", "_id": {"$oid": "65f0"}}]), id_field="_id.$oid")
    assert oid.id == "65f0"


def test_a_decimal_is_an_id_and_bytes_are_text_where_they_are_utf8(tmp_path: Path) -> None:
    table = pa.table({"text": [b"one \xc3\xa9"], "id": [Decimal(12)], "source": [b"web"]})
    pq.write_table(table, tmp_path / "x.parquet")
    [found] = read(tmp_path / "x.parquet")
    assert (found.text, found.id, found.source) == ("one é", "12", "web")
    pq.write_table(pa.table({"text": [b"ok", b"\xff"]}), tmp_path / "y.parquet")
    with pytest.raises(BadDocumentError, match=r"row 1: 'text' is bytes, not UTF-8 at byte 0"):
        read(tmp_path / "y.parquet")


# What lies beside the data.

BESIDE = ["SHA256SUMS.txt", "LICENSE.txt", "README.md", "LICENSE", "meta.json", "dataset_info.json", "00.jsonl.sha256"]
NOT_BESIDE = ["license-to-kill.txt", "state-of-the-union.txt", "notice-1934.txt", "data.json", "metadata.jsonl"]


def test_licences_and_checksums_are_left_aside_and_counted(tmp_path: Path) -> None:
    write_rows(tmp_path / "00.jsonl.zst", TEXT)
    for name in BESIDE:
        (tmp_path / name).write_text("0f1e 00.jsonl.zst\n")
    kept, aside = data_and_beside(corpus_config(tmp_path))
    assert [file.uri for file in kept] == [str(tmp_path / "00.jsonl.zst")]
    assert sorted(Path(file.uri).name for file in aside) == sorted(BESIDE)
    assert [one.text for one in read(tmp_path / "LICENSE.txt")] == ["0f1e 00.jsonl.zst\n"]
    others = [InputFile(f"/x/{name}", 1, "") for name in NOT_BESIDE]
    assert data_files(others) == (others, [])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.jsonl", "b.parquet"], "files of several formats, jsonl (a.jsonl) and parquet (b.parquet)"),
        (["a.jsonl.zst", "urls.txt"], "files of several formats, jsonl (a.jsonl.zst) and text (urls.txt)"),
        (["a.jsonl", "a.jsonl.gz"], "their documents would count twice"),
        (["x/a.jsonl.gz", "x/a.jsonl.zst"], "their documents would count twice"),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "data/train*"),
        (["train/chunk1/x.jsonl", "validation/chunk1/x.jsonl"], "train/**"),
        (["train.jsonl", "test.jsonl"], "train*"),
        (["en/c4-train.00000-of-00002.json.gz", "en/c4-validation.00000-of-00001.json.gz"], "**/*-train*"),
        (["example_train_0.jsonl.zst", "example_holdout_7.jsonl.zst"], "**/*_train*"),
        (["data/train_sft-0-of-1.parquet", "data/test_sft-0-of-1.parquet"], "data/train*"),
        (["c4-af.tfrecord-0-of-4.json.gz", "c4-af-validation.tfrecord-0-of-1.json.gz"], "c4-af.tfrecord-*"),
        (["en.jsonl", "en_test.jsonl"], "en.jsonl*"),
        (["a.json", "a.jsonl"], "one file in two forms"),
        (["train/index.json", "train/shard.00000.mds", "val/index.json", "val/shard.00000.mds"], "train/**"),
        (["train.bin", "val.bin"], "train*"),
    ],
)
def test_a_folder_of_no_one_kind_is_refused_with_the_glob_that_chooses(
    tmp_path: Path, names: list[str], said: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(CorpusError) as caught:
        document_files(corpus_config(tmp_path))
    assert said in str(caught.value)
    chosen = str(caught.value).partition("such as ")[2].split(",")[0].rstrip(".")
    assert 1 <= len(document_files(corpus_config(chosen))) < len(names)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("shard-000000.tar", r"\.tar is not read \(unpack it first\)"),
        ("a.jsonl.bz2", r"\.bz2 is not read \(compress it as \.gz or \.zst instead\)"),
        ("a.csv.gz", r"\.csv\.gz is not read \(write it as JSONL or Parquet first\)"),
        ("a.pkl", "pickles are never opened"),
        ("model.safetensors", "a model's weights; move it away"),
        ("a.jsonl.part", "its download is not finished"),
    ],
)
def test_what_is_no_corpus_by_its_suffix_is_refused_with_what_to_do(tmp_path: Path, name: str, said: str) -> None:
    write_rows(tmp_path / "a.jsonl", TEXT)
    (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CorpusError, match=f"{name}: .*{said}"):
            document_files(corpus_config(path))


def test_a_link_to_another_file_is_refused_and_one_to_elsewhere_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "blobs" / "0f1e", TEXT)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").symlink_to("../blobs/0f1e")
    assert len(document_files(corpus_config(tmp_path / "data"))) == 1
    (tmp_path / "data" / "b.jsonl").symlink_to("a.jsonl")
    with pytest.raises(CorpusError, match=r"a\.jsonl and b\.jsonl, which are one file by a link"):
        document_files(corpus_config(tmp_path / "data"))


def test_what_systems_leave_in_folders_is_left_aside(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", TEXT)
    for name in ("Thumbs.db", "desktop.ini", "a.jsonl.crc", ".DS_Store", "_SUCCESS", "__MACOSX/._a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    kept, aside = data_and_beside(corpus_config(tmp_path))
    assert [Path(file.uri).name for file in kept] == ["a.jsonl"]
    assert sorted(Path(file.uri).name for file in aside) == ["Thumbs.db", "a.jsonl.crc", "desktop.ini"]


def test_where_all_is_said_to_be_text_a_programs_files_are_documents(tmp_path: Path) -> None:
    for name in ("a.py", "README.md", "setup.cfg"):
        (tmp_path / name).write_text(name)
    kept, aside = data_and_beside(corpus_config(tmp_path, format="text"))
    assert ([Path(file.uri).name for file in kept], aside) == (["README.md", "a.py", "setup.cfg"], [])


def test_text_with_nul_characters_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("UTF-16 of Latin letters".encode("utf-16-le"))
    with pytest.raises(BadDocumentError, match=r"a\.txt holds NUL characters: it is UTF-16, or no text"):
        read(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('[{"text": "a"}]', r"is a list, not an object; .*jq -c '\.\[\]'"),
        ("[", "is not JSON by itself; write one object per line"),
        (
            '{"text": [{"role": "user", "content": "a"}]}',
            "is a list, not a text; .*by its chat template",
        ),
    ],
)
def test_json_that_is_no_jsonl_says_how_to_make_it_some(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "a.json").write_text(f"{line}\n")
    with pytest.raises(BadDocumentError, match=said):
        read(tmp_path / "a.json")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_dotted_paths_lead_through_names_with_dots_and_json_in_texts(tmp_path: Path, suffix: str) -> None:
    row = {"a.b": {"text": "one"}, "meta": '{"source": {"set": "web"}}', "key": ""}
    write_rows(tmp_path / f"x.{suffix}", [row])
    [found] = read(tmp_path / f"x.{suffix}", text_field="a.b.text", source_field="meta.source.set", id_field="key")
    first = f"x.{suffix}#{int(suffix == 'jsonl')}"
    # An empty id is none.
    assert (found.text, found.source, found.id, found.aside) == ("one", "web", first, 1)


def test_splits_are_read_together_where_a_glob_says_so_and_alone_as_they_are(tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "training-log.jsonl"):
        write_rows(tmp_path / name, TEXT)
    assert len(document_files(corpus_config(f"{tmp_path}/**"))) == 3
    assert len(document_files(corpus_config(f"{tmp_path}/train.jsonl"))) == 1


def test_a_pointer_of_git_lfs_is_called_one(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    for name in ("x.parquet", "y.jsonl"):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(BadFileError, match=rf"{name} is a pointer of Git LFS, .*git lfs pull"):
            read(tmp_path / name)
    (tmp_path / "z.npy").write_bytes(pointer)
    config = corpus_config(tmp_path / "z.npy")
    with pytest.raises(BadFileError, match="is a pointer of Git LFS"):
        layouts.described(Store(str(tmp_path)), config, settings(Packing.concat, 8), Store(str(tmp_path / "out")))


# EOS and BOS.


@pytest.mark.parametrize("bos", [False, True])
def test_separators_that_documents_bring_are_not_doubled(bos: bool) -> None:
    pack = settings(Packing.concat, 32, bos=bos)
    first = [pack.bos_id] if pack.bos_id is not None else []
    plain, ended = [[5, 6], [7]], [[*first, 5, 6, EOS], [*first, 7, EOS]]
    rows = [[one.token_ids.tolist() for one in Packer(pack).pack(documents(each))] for each in (plain, ended)]
    assert rows[0] == rows[1] == [[*first, 5, 6, EOS, *first, 7, EOS]]
    kept = Packer(settings(Packing.document, 32)).pack(documents([[5, EOS]]))
    assert [one.token_ids.tolist() for one in kept] == [[5, EOS]]
