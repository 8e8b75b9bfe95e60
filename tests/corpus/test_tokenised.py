"""What the tokenizer cannot take is a bad document, and not the end of the job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from infscan.config import Packing
from infscan.corpus import tokenised
from infscan.corpus.documents import document_files, document_splits
from infscan.corpus.prepared import NOTHING, prepare_task
from infscan.corpus.rows import Document
from infscan.corpus.tally import Tally
from infscan.corpus.tokenised import with_tokens
from infscan.corpus.tokenizer import load_tokenizer
from infscan.errors import BadDocumentError, ModelError
from infscan.storage import Store
from tests.corpus.builders import corpus_config, settings, write_rows
from tests.corpus.test_tokenizer import save_tokenizer

# The regex engine gives this one up after its limit of retries, as it does Llama 3's pattern after 11 MiB of blanks.
HARD = "x" * 64
PATTERN = r"(x+x+)+y| ?\w+|\W"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = save_tokenizer(tmp_path_factory.mktemp("panics"))
    library = Tokenizer.from_file(str(found / "tokenizer.json"))
    library.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    library.save(str(found / "tokenizer.json"))
    return found


def document(number: int, text: str, **other: Any) -> Document:
    return Document(f"d{number}", "s", text, None, "a.jsonl", number, **other)


def test_a_panic_is_one_bad_document_among_good_ones(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer is not None
    texts = ["one", HARD, "two", "three", HARD, "four"]
    documents = [document(number, text) for number, text in enumerate(texts)]
    documents.append(document(6, "five", prompt=HARD))
    tally = Tally(allowed=3)
    found = list(with_tokens(documents, tokenizer, tally))
    assert [one.id for one in found] == ["d0", "d2", "d3", "d5"]
    assert [tokenizer.decode(one.token_ids) for one in found if one.token_ids is not None] == texts[:1] + texts[2:4] + [
        "four"
    ]
    assert tally.left_out().by_reason == {"not tokenised": 3}
    with pytest.raises(BadDocumentError, match=r"a\.jsonl: document 'd1': the tokenizer gave a text up.*retry-limit"):
        list(with_tokens(documents, tokenizer, Tally()))


def test_a_text_that_would_take_gigabytes_is_a_bad_document(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenised, "MAX_TEXT_CHARACTERS", 8)
    tally = Tally(allowed=2)
    documents = [document(0, "a" * 9), document(1, "a" * 8), document(2, "a" * 5, prompt="b" * 4)]
    assert [one.id for one in with_tokens(documents, load_tokenizer(str(folder)), tally)] == ["d1"]
    assert tally.left_out().by_reason == {"too long": 2}


def test_a_tokenizer_that_panics_while_it_is_loaded_is_refused_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        """As the tokenizers library raises it."""

    def panic(*given: Any, **named: Any) -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", panic)
    with pytest.raises(ModelError, match=rf"{save_tokenizer(tmp_path)}.*Option::unwrap"):
        load_tokenizer(str(tmp_path))


def test_a_task_holds_its_tokenizer_to_the_one_that_was_planned(folder: Path, tmp_path: Path) -> None:
    """A node's own copy of the model may be another one."""
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer is not None
    write_rows(tmp_path / "in" / "a.jsonl", [{"text": "one two"}])
    config = corpus_config(tmp_path / "in", text_field="text", tokens_field=None)
    pieces = document_splits(document_files(config), config)
    store = Store(str(tmp_path / "out"))

    def prepare(model: Path) -> tuple[int, int]:
        pack = replace(settings(Packing.document, 8), vocab_size=400)
        return prepare_task(pieces[0], 0, config, pack, str(model), tokenizer.digest, store, NOTHING)

    other = save_tokenizer(tmp_path / "other", ("other words",))
    for model in (other, tmp_path / "none"):
        (tmp_path / "none").mkdir(exist_ok=True)
        with pytest.raises(ModelError, match=r"not the one that the run was planned with.*as its tokenizer"):
            prepare(model)
    assert not store.list()
    assert prepare(folder)[0] == 1
