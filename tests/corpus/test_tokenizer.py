"""The tokenizer: none where there is none, text to ids and back, and a digest of its content."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from infscan.corpus.tokenizer import load_tokenizer
from infscan.errors import ModelError

END = "<|endoftext|>"


def save_tokenizer(folder: Path, words: tuple[str, ...] = ("hello world", "word 12")) -> Path:
    """A byte-level BPE tokenizer of 300 tokens, as a model folder holds it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(words, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END).save_pretrained(folder)
    return folder


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(str(tmp_path)) is None


def test_text_comes_back_from_its_ids_and_no_special_token_is_added(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(save_tokenizer(tmp_path)))
    assert tokenizer is not None
    texts = ["hello world", "", " Señor , \N{GRINNING FACE}\n\n", "hello  , world ."]
    rows = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(row) for row in rows] == texts
    assert all(row.dtype == np.int64 for row in rows)
    assert tokenizer.eos_id is not None
    assert all(tokenizer.eos_id not in row for row in rows)
    assert tokenizer.bos_id is None
    assert tokenizer.decode([tokenizer.eos_id]) == END
    assert np.array_equal(tokenizer.encode(texts[0]), rows[0])
    assert tokenizer.encode_batch([]) == []


def test_the_digest_is_of_the_content_and_not_of_the_folder(tmp_path: Path) -> None:
    one = load_tokenizer(str(save_tokenizer(tmp_path / "one")))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    two = load_tokenizer(str(tmp_path / "two"))
    three = load_tokenizer(str(save_tokenizer(tmp_path / "three", ("other words", "entirely"))))
    assert one is not None
    assert two is not None
    assert three is not None
    assert one.digest == two.digest != three.digest


def test_a_broken_tokenizer_is_refused_by_path(tmp_path: Path) -> None:
    (save_tokenizer(tmp_path) / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=f"{tmp_path}: its tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_in_an_object_store_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from infscan.storage import Store

    monkeypatch.setenv("INFSCAN_CACHE", str(tmp_path / "cache"))
    folder = save_tokenizer(tmp_path / "model")
    for file in folder.iterdir():
        Store("memory://models/tiny").write(file.name, file.read_bytes())
    remote, local = load_tokenizer("memory://models/tiny"), load_tokenizer(str(folder))
    assert remote is not None
    assert local is not None
    assert remote.digest == local.digest


def sentencepiece_alone(folder: Path) -> Path:
    """A vocabulary of SentencePiece without tokenizer.json, as Llama 2's own release has it."""
    import io

    import sentencepiece

    model = io.BytesIO()
    texts = ["the river runs to the sea", "the island is Velmistok", "he said yes to the river"] * 4
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2,
        byte_fallback=False,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_sentencepieces_own_file_is_enough(tmp_path: Path) -> None:
    import sentencepiece

    folder = sentencepiece_alone(tmp_path / "model")
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer is not None
    own = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("the river is Velmistok", "yes the sea"):
        assert tokenizer.encode(text).tolist() == own.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_vocabulary_that_is_damaged_or_a_pointer_is_named(tmp_path: Path) -> None:
    folder = sentencepiece_alone(tmp_path / "model")
    (folder / "tokenizer.model").write_bytes(b"no tokenizer yet")
    with pytest.raises(ModelError, match=r"makes no token of a text|cannot be loaded"):
        load_tokenizer(str(folder))
    (folder / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match=r"tokenizer\.model is a pointer of Git LFS"):
        load_tokenizer(str(folder))
