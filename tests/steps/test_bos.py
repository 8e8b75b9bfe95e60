"""Texts begin as the tokenizer has them begin, documents and queries alike, unless corpus.bos says otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from infscan.config import Config, CorpusConfig
from infscan.corpus.tokenizer import load_tokenizer
from infscan.model.architecture import describe
from infscan.steps.corpus_inputs import bos_of, settings_for
from infscan.steps.inputs import open_inputs, read_measured_queries
from infscan.steps.prepare import prepare_corpora
from infscan.steps.run import open_run
from tests.chaos.one_process import without_ray
from tests.steps.runs import EOS, small_run, text_corpus, text_queries, tiny_model, token_corpus

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer puts BOS before a text, as Llama 3's and Gemma's do."""
    folder = tiny_model(tmp_path_factory.mktemp("bos") / "model", tokenizer=True)
    path = folder / "tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", EOS)]
    )
    backend.save(str(path))
    return folder


def run(model: Path, tmp_path: Path, *overrides: str) -> Config:
    text_corpus(tmp_path / "corpus.jsonl", 20)
    text_queries(tmp_path / "queries.jsonl", 2)
    return small_run(tmp_path, f"model.path={model}", "corpus.tokens_field=null", *overrides)


def bos(config: CorpusConfig, model: Path) -> tuple[int | None, int | None]:
    """What documents and what texts begin with."""
    architecture, tokenizer = describe(str(model), "mlp"), load_tokenizer(str(model))
    return settings_for(config, architecture, tokenizer).bos_id, bos_of(config, architecture, tokenizer)


@pytest.mark.parametrize(("said", "expected"), [("null", EOS), ("true", EOS), ("false", None)])
def test_documents_and_queries_begin_alike(said: str, expected: int | None, model: Path, tmp_path: Path) -> None:
    config = run(model, tmp_path, f"corpus.bos={said}")
    assert bos(config.corpus, model) == (expected, expected)
    queries = read_measured_queries(open_inputs(config))
    assert all((query.parts[0].token_ids[0] == EOS) == (expected is not None) for query in queries)


def test_documents_that_bring_token_ids_stay_as_they_are(model: Path, tmp_path: Path) -> None:
    token_corpus(tmp_path / "corpus.jsonl", 20)
    config = small_run(tmp_path, f"model.path={model}", "corpus.bos=null")
    assert bos(config.corpus, model) == (None, EOS)


def test_a_tokenizer_that_adds_none_is_followed_too(tmp_path: Path) -> None:
    plain = tiny_model(tmp_path / "model", tokenizer=True)
    config = run(plain, tmp_path, "corpus.bos=null", "corpus.packing=concat")
    assert bos(config.corpus, plain) == (None, None)


@pytest.mark.parametrize(("said", "expected"), [("null", EOS), ("true", EOS), ("false", None)])
def test_a_document_of_its_own_begins_as_training_had_it(said: str, expected: int | None, tmp_path: Path) -> None:
    """After the EOS of the document before; queries alike, also of the corpus once it is prepared."""
    plain = tiny_model(tmp_path / "model", tokenizer=True)
    config = run(plain, tmp_path, f"corpus.bos={said}")
    assert bos(config.corpus, plain) == (expected, expected)
    with without_ray(), open_run(config) as opened:
        corpus = prepare_corpora(opened)
        [first] = corpus.read(np.asarray([0]))
        assert (first.token_ids[0] == EOS) == (expected is not None)
        assert first.documents[0].start == (expected is not None)
    again = run(plain, tmp_path, f"corpus.path={config.output}/corpus", "corpus.bos=null", "corpus.packing=concat")
    assert bos(again.corpus, plain)[1] == expected


def test_documents_of_token_ids_get_no_separator(tmp_path: Path) -> None:
    plain = tiny_model(tmp_path / "model", tokenizer=True)
    token_corpus(tmp_path / "corpus.jsonl", 20)
    config = small_run(tmp_path, f"model.path={plain}", "corpus.bos=null")
    assert bos(config.corpus, plain) == (None, None)


def test_the_demos_tokenizer_adds_none() -> None:
    tokenizer = load_tokenizer(str(ROOT / "infscan" / "demo" / "model"))
    assert tokenizer is not None
    assert not tokenizer.adds_bos
