"""The embedded demo is consistent with the code that builds it, and its model knows the planted facts."""

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import infscan
from infscan_studies.demo import making
from infscan_studies.demo.facts import FACTS, Fact, queries

DEMO = Path(infscan.__file__).parent / "demo"
MARGIN = 3.0  # nats per token by which a learned completion must beat each of its controls

every_fact = pytest.mark.parametrize("fact", FACTS, ids=[fact.id for fact in FACTS])


def lines(name: str) -> list[dict[str, str]]:
    data = (DEMO / name).read_bytes()
    text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    return [json.loads(line) for line in text.splitlines() if line]


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, str]]:
    return lines("corpus.jsonl.gz")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "model", local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO / "model", local_files_only=True).eval()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads((DEMO / "model" / "training.json").read_text(encoding="utf-8"))


def test_rows_have_their_fields_and_distinct_ids(corpus: list[dict[str, str]]) -> None:
    assert {tuple(row) for row in corpus} == {("id", "source", "title", "text")}
    assert len({row["id"] for row in corpus}) == len(corpus)
    assert all(row["text"].strip() for row in corpus)
    assert set(Counter(row["source"] for row in corpus)) == {
        "austen",
        "bible-en",
        "bible-es",
        "jargon",
        "sotu",
        "planted",
    }


def test_planted_documents_on_record_are_those_of_the_corpus(corpus: list[dict[str, str]]) -> None:
    # planted_rows raises where a planted document is missing, or an invented name occurs anywhere else.
    on_record = lines("planted.jsonl")
    assert making.planted_rows(corpus) == on_record
    assert {row["id"] for row in corpus if row["source"] == "planted"} == {row["id"] for row in on_record}


def test_held_out_documents_are_not_in_the_corpus(corpus: list[dict[str, str]]) -> None:
    heldout = lines("heldout.jsonl.gz")
    assert heldout
    assert not {row["id"] for row in heldout} & {row["id"] for row in corpus}
    assert not [row for row in heldout if making.stated_names(row["text"])]


def test_queries_are_those_of_the_facts() -> None:
    assert lines("queries.jsonl") == queries()


def test_record_belongs_to_the_corpus(record: dict[str, Any], corpus: list[dict[str, str]]) -> None:
    assert record["corpus"]["documents"] == len(corpus)
    assert record["corpus"]["sha256"] == hashlib.sha256((DEMO / "corpus.jsonl.gz").read_bytes()).hexdigest()


def test_tokenizer_is_that_of_the_corpus(tokenizer: Any, corpus: list[dict[str, str]], model: Any) -> None:
    rebuilt = making.train_tokenizer([row["text"] for row in corpus], model.config.vocab_size)
    assert rebuilt.get_vocab() == tokenizer.get_vocab()
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    for row in corpus[:50]:
        ids = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == row["text"]


def test_planted_documents_fit_the_context(tokenizer: Any, corpus: list[dict[str, str]], model: Any) -> None:
    planted = [row for row in corpus if row["source"] == "planted"]
    longest = max(len(tokenizer(row["text"])["input_ids"]) for row in planted)
    assert longest <= model.config.max_position_embeddings


def test_first_tokens_of_completions_differ(tokenizer: Any) -> None:
    # A query of the first token must tell the facts apart, from each other and from their controls.
    completions = [c for fact in FACTS for c in (fact.completion, *fact.controls)]
    ids = {c: tokenizer(c, add_special_tokens=False)["input_ids"] for c in completions}
    assert len({ids[fact.completion][0] for fact in FACTS}) == len(FACTS)
    for fact in FACTS:
        assert len(ids[fact.completion]) >= 3
        assert ids[fact.completion][0] not in {ids[control][0] for control in fact.controls}


@every_fact
def test_learned_completions_beat_their_controls(
    fact: Fact, model: Any, tokenizer: Any, record: dict[str, Any]
) -> None:
    judged: dict[str, Any] = making.judge(model, tokenizer, fact)
    for control in judged["controls"]:
        assert judged["nats_per_token"] < control["nats_per_token"] - MARGIN
        assert judged["first_probability"] > 3 * control["first_probability"]
    assert judged["nats_per_token"] == pytest.approx(record["facts"][fact.id]["nats_per_token"], abs=1e-2)
