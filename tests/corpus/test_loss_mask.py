"""Where training had its loss: laws of prompts and masks from the file to the prepared corpus and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infscan.config import CorpusConfig, Packing
from infscan.corpus.addressable import PreparedCorpus, open_corpus
from infscan.corpus.documents import read_documents
from infscan.corpus.packing import Packer, PackSettings
from infscan.corpus.prepared import prepare_part, write_manifest
from infscan.corpus.splits import InputSplit
from infscan.errors import CorpusError
from infscan.storage import Store, expand
from tests.corpus.builders import write_rows

EOS, T, VOCAB = 0, 8, 100
PROMPT = {"tokens_field": "tokens", "prompt_field": "prompt"}
MASK = {"tokens_field": "tokens", "mask_field": "mask"}


class Words:
    """A tokenizer: a word is a token, whose number is its first letter's."""

    digest, eos_id, bos_id = "words", EOS, None
    unk_id: int | None = None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([ord(word[0]) - ord("a") + 1 for word in text.split()], np.int64) for text in texts]

    def encode_with_offsets(self, texts: list[str]) -> None:
        return None


def prepared(folder: Path, rows: list[dict[str, Any]], packing: Packing, **fields: Any) -> PreparedCorpus:
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "in.jsonl", rows)
    config = CorpusConfig(path=str(folder / "in.jsonl"), packing=packing, **fields)
    pack = PackSettings(packing, T, VOCAB, EOS if packing is Packing.concat else None, None, config.masked)
    store, words = Store(str(folder / "out")), Words()
    parts = [
        prepare_part(InputSplit((file,)), index, config, pack, words, store)  # type: ignore[arg-type]
        for index, file in enumerate(expand(config.path))
    ]
    write_manifest(store, config, pack, words.digest, parts)
    return open_corpus(store)


def contents(corpus: PreparedCorpus) -> list[tuple[list[int], list[int] | None]]:
    found = corpus.read(np.arange(corpus.sequences))
    return [(one.token_ids.tolist(), None if one.loss is None else one.loss.astype(int).tolist()) for one in found]


def test_prompts_have_no_loss_and_completions_and_eos_have_one(tmp_path: Path) -> None:
    rows = [{"id": "x", "prompt": "a b c", "text": " d e"}, {"id": "y", "prompt": "", "text": " f"}]
    documents = prepared(tmp_path / "document", rows, Packing.document, prompt_field="prompt")
    assert contents(documents) == [([1, 2, 3, 4, 5], [0, 0, 0, 1, 1]), ([6], [1])]
    packed = prepared(tmp_path / "concat", rows, Packing.concat, prompt_field="prompt")
    assert contents(packed) == [([1, 2, 3, 4, 5, EOS, 6, EOS], [0, 0, 0, 1, 1, 1, 1, 1])]
    assert documents.manifest.counts.tokens_masked == packed.manifest.counts.tokens_masked == 3


def test_bos_has_no_loss_and_a_mask_is_cut_where_its_tokens_are() -> None:
    rows = [{"tokens": list(range(1, 11)), "prompt": 4}]
    documents = [*from_rows(rows, **PROMPT)]
    packer = Packer(PackSettings(Packing.concat, T, VOCAB, EOS, 99, masked=True))
    first, second = packer.pack(documents)
    assert first.token_ids.tolist() == [99, 1, 2, 3, 4, 5, 6, 7]
    assert first.loss is not None
    assert first.loss.astype(int).tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert second.loss is not None
    assert (second.token_ids.tolist(), second.loss.astype(int).tolist()) == ([8, 9, 10, EOS], [1, 1, 1, 1])


def from_rows(rows: list[dict[str, Any]], **fields: Any) -> Any:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    write_rows(folder / "in.jsonl", rows)
    [file] = expand(str(folder / "in.jsonl"))
    return read_documents(file, CorpusConfig(path=file.uri, **fields))


def test_a_length_token_ids_a_mask_and_a_text_say_the_same(tmp_path: Path) -> None:
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "length": ({"tokens": [1, 2, 3, 4, 5], "prompt": 3}, PROMPT),
        "ids": ({"tokens": [4, 5], "prompt": [1, 2, 3]}, PROMPT),
        "mask": ({"tokens": [1, 2, 3, 4, 5], "mask": [0, 0, 0, 1, 1]}, MASK),
        "text": ({"text": " d e", "prompt": "a b c"}, {"prompt_field": "prompt"}),
    }
    corpora = {
        name: prepared(tmp_path / name, [{"id": "x", **row}], Packing.document, **fields)
        for name, (row, fields) in ways.items()
    }
    assert len({corpus.fingerprint for corpus in corpora.values()}) == 1
    assert all(contents(corpus) == [([1, 2, 3, 4, 5], [0, 0, 0, 1, 1])] for corpus in corpora.values())


def test_the_mask_enters_the_fingerprint_and_a_corpus_without_one_has_no_column(tmp_path: Path) -> None:
    rows = [{"id": "x", "tokens": [1, 2, 3], "mask": [0, 1, 1]}]
    plain = prepared(tmp_path / "plain", rows, Packing.document, tokens_field="tokens")
    masked = prepared(tmp_path / "masked", rows, Packing.document, **MASK)
    other = prepared(tmp_path / "other", [{**rows[0], "mask": [0, 0, 1]}], Packing.document, **MASK)
    assert len({plain.fingerprint, masked.fingerprint, other.fingerprint}) == 3
    assert contents(plain) == [([1, 2, 3], None)]
    schemas = [pq.read_schema(Path(str(corpus.store.local_path("part-00000.parquet")))) for corpus in (plain, masked)]
    assert ["loss_mask" in schema.names for schema in schemas] == [False, True]


def test_parquet_brings_masks_and_prompts_too(tmp_path: Path) -> None:
    table = pa.table(
        {"id": ["x", "y"], "tokens": [[1, 2, 3], [4, 5]], "mask": [[0, 1, 1], [1, 0]], "prompt": [[7], []]}
    )
    pq.write_table(table, tmp_path / "in.parquet")
    [file] = expand(str(tmp_path / "in.parquet"))
    by_mask = list(read_documents(file, CorpusConfig(path=file.uri, **MASK)))
    assert [document.loss.astype(int).tolist() for document in by_mask] == [[0, 1, 1], [1, 0]]
    by_prompt = list(read_documents(file, CorpusConfig(path=file.uri, **PROMPT)))
    assert [document.token_ids.tolist() for document in by_prompt] == [[7, 1, 2, 3], [4, 5]]
    assert [document.loss.astype(int).tolist() for document in by_prompt] == [[0, 1, 1, 1], [1, 1]]


def test_a_prompt_without_a_completion_is_counted_as_empty(tmp_path: Path) -> None:
    rows = [{"id": "x", "prompt": "a b", "text": ""}, {"id": "y", "prompt": "a", "text": " b"}]
    corpus = prepared(tmp_path, rows, Packing.document, prompt_field="prompt")
    assert contents(corpus) == [([1, 2], [0, 1])]
    assert corpus.manifest.counts.documents_empty == 1


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"text": "a"}, {"prompt_field": "prompt"}, "has no field 'prompt'; it has 'text'.*corpus.prompt_field"),
        ({"text": "a", "prompt": 3}, {"prompt_field": "prompt"}, "'prompt' is a number, not a text"),
        ({"tokens": [1], "prompt": "a"}, PROMPT, "'prompt' is a text beside token ids"),
        ({"tokens": [1], "prompt": None}, PROMPT, "'prompt' is null beside token ids"),
        ({"tokens": [1], "prompt": True}, PROMPT, "'prompt' is true or false beside token ids"),
        ({"tokens": [1, 2], "prompt": 3}, PROMPT, "'prompt' is 3, and there are 2 token ids"),
        ({"tokens": [1, 2], "prompt": -1}, PROMPT, "'prompt' is -1, and there are 2 token ids"),
        ({"tokens": [1]}, PROMPT, "has no field 'prompt'"),
        ({"tokens": [1]}, MASK, "has no field 'mask'.*corpus.mask_field"),
        ({"tokens": [1, 2], "mask": [1]}, MASK, "'mask' is 1 values for 2 token ids"),
        ({"tokens": [1, 2], "mask": [1, 2]}, MASK, "'mask' is a list with 2 in it; give a 0"),
        ({"tokens": [1], "mask": [[1]]}, MASK, "give a 0"),
        ({"tokens": [1], "mask": "1"}, MASK, "'mask' is a text"),
    ],
)
def test_a_row_that_does_not_say_where_its_loss_is_is_refused(
    row: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError, match=f"in.jsonl, line 1.*{message}"):
        list(from_rows([row], **fields))


def test_a_part_of_another_mask_is_made_again(tmp_path: Path) -> None:
    rows = [{"id": "x", "tokens": [1, 2, 3], "mask": [0, 1, 1], "half": [0, 0, 1]}]
    write_rows(tmp_path / "in.jsonl", rows)
    [file] = expand(str(tmp_path / "in.jsonl"))
    config = CorpusConfig(path=file.uri, packing=Packing.document, **MASK)
    pack, store = PackSettings(Packing.document, T, VOCAB, masked=True), Store(str(tmp_path / "out"))
    first = prepare_part(InputSplit((file,)), 0, config, pack, None, store)
    second = prepare_part(InputSplit((file,)), 0, replace(config, mask_field="half"), pack, None, store)
    assert first.digest != second.digest
