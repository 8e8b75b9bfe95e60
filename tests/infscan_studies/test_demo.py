"""Laws of the demo corpus's making: fair shares, whole sentences, pairs kept, nothing that names an invented thing."""

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from infscan.errors import CorpusError
from infscan_studies.demo.facts import FACTS, planted_documents
from infscan_studies.demo.making import (
    completion_nats,
    cut_text,
    hold_out,
    planted_rows,
    select_documents,
    with_planted,
)


def rows(source: str, prefix: str, count: int, length: int = 40) -> list[dict[str, str]]:
    return [
        {"id": f"{prefix}{i}", "source": source, "title": "t", "text": "word " * (length // 5)} for i in range(count)
    ]


def test_short_texts_stay_whole() -> None:
    assert cut_text("One. Two.", 9) == "One. Two."


def test_long_texts_end_after_a_sentence_or_else_a_word() -> None:
    assert cut_text("A first sentence. A second one. And a third", 35) == "A first sentence. A second one."
    assert cut_text("Yes. and then no stop at all for very long", 20) == "Yes. and then no"
    assert cut_text("x" * 30, 10) == "x" * 10


def test_every_source_has_its_share_and_short_documents_come_first() -> None:
    corpus = rows("a", "a/", 30) + rows("b", "b/", 30) + rows("b", "b/long", 30, length=500)
    chosen = select_documents(corpus, count=40, limit=60, seed=0)
    assert sorted(row["source"] for row in chosen) == ["a"] * 20 + ["b"] * 20
    assert not [row for row in chosen if "long" in row["id"]]
    assert chosen == select_documents(corpus[::-1], count=40, limit=60, seed=0)


def test_parallel_documents_are_chosen_in_pairs() -> None:
    corpus = rows("english", "en/", 50) + rows("spanish", "es/", 50)
    chosen = select_documents(corpus, count=20, limit=60, seed=1)
    verses = {source: {r["id"][3:] for r in chosen if r["source"] == source} for source in ("english", "spanish")}
    assert verses["english"] == verses["spanish"]


def test_documents_with_an_invented_name_are_left_out() -> None:
    corpus = [*rows("a", "a/", 4), {"id": "x", "source": "a", "title": "t", "text": "gleem"}]
    assert "x" not in {row["id"] for row in select_documents(corpus, 4, 60, 0)}
    with pytest.raises(CorpusError, match="Source a has 4 documents"):
        select_documents(corpus, 5, 60, 0)


def test_holding_out_parts_the_rows() -> None:
    corpus = rows("a", "a/", 10)
    kept, heldout = hold_out(corpus, 3, seed=0)
    assert len(heldout) == 3
    assert sorted(row["id"] for row in kept + heldout) == sorted(row["id"] for row in corpus)


def test_planted_rows_are_checked_against_the_corpus() -> None:
    corpus = with_planted(rows("a", "a/", 5), seed=0)
    assert [row["id"] for row in planted_rows(corpus)] == [d.id for f in FACTS for d in planted_documents(f)]
    missing = [row for row in corpus if row["id"] != "planted/gleem/forward-03"]
    with pytest.raises(CorpusError, match="planted/gleem/forward-03"):
        planted_rows(missing)
    with pytest.raises(CorpusError, match="Astrobia"):
        planted_rows([*corpus, {"id": "x", "source": "a", "title": "t", "text": "in Astrobia"}])


def test_completion_nats_are_the_models_own() -> None:
    config = GPTNeoXConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = GPTNeoXForCausalLM(config).eval()
    prompt, completion = [1, 2, 3], [4, 5]
    whole = model(input_ids=torch.tensor([[1, 2, 3, 4, 5]]), labels=torch.tensor([[-100, -100, -100, 4, 5]]))
    assert sum(completion_nats(model, prompt, completion)) / 2 == pytest.approx(whole.loss.item(), rel=1e-4)
