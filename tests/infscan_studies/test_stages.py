"""Laws of the fact benchmark: what its documents state, and what its measures count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import infscan
from benchmarks.two_stages import interval, invented_facts, recall_at, reciprocal_ranks
from infscan_studies.demo import making
from infscan_studies.demo.answers import FRAMES, QUESTIONS, answers, questions
from infscan_studies.demo.facts import FACTS

DEMO = Path(infscan.__file__).parent / "demo"


def test_proponents_state_the_fact_and_distractors_do_not() -> None:
    facts = invented_facts(12, seed=0)
    assert facts == invented_facts(12, seed=0)
    names = [name for fact in facts for name in (fact.subject, fact.object)]
    assert len(set(names)) == len(names)
    for fact in facts:
        kinds = dict(fact.documents)
        assert len(fact.proponents) == 4
        for document, text in kinds.items():
            states = fact.subject in text and fact.object in text
            assert states == (document in fact.proponents)
            # A BM25 distractor has the subject, a same-object one the object.
            assert states or ((fact.subject in text) == ("/words-" in document))
        assert fact.subject in fact.question
        assert fact.object not in fact.question


def test_ranks_count_the_best_proponent_and_the_share_at_the_top() -> None:
    documents = ["a", "b", "c", "d", "e"]
    scores_qn = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0, 2.0]])
    proponents = [["b", "d"], ["c", "e"]]
    assert reciprocal_ranks(scores_qn, documents, proponents).tolist() == [1 / 2, 1.0]
    assert recall_at(scores_qn, documents, proponents, 2).tolist() == [0.5, 0.5]
    assert recall_at(scores_qn, documents, proponents, 4).tolist() == [1.0, 1.0]
    mean, low, high = interval(np.array([0.0, 1.0] * 20))
    assert low < mean == 0.5 < high


def test_answers_on_record_are_those_of_the_facts() -> None:
    def rows(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in (DEMO / name).read_text().splitlines()]

    assert rows("answers.jsonl") == [vars(answer) for answer in answers()]
    assert rows("questions.jsonl") == questions()
    assert set(QUESTIONS) == {fact.id for fact in FACTS}
    # The pretraining corpus has none of the questions.
    corpus = {document.text for fact in FACTS for document in making.planted_documents(fact)}
    assert not [text for text in corpus for question in QUESTIONS.values() if question in text]


def test_the_fine_tuned_model_answers_better_than_it_did() -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model-answers", local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model-answers", local_files_only=True)
    record = json.loads((DEMO / "model-answers" / "training.json").read_text())["nats_per_token"]
    for fact in FACTS:
        prompt, answer = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (FRAMES[0].format(question=QUESTIONS[fact.id]), fact.completion)
        )
        nats = making.completion_nats(model, prompt, answer)
        assert sum(nats) / len(nats) == pytest.approx(record["after"][fact.id], abs=1e-2)
        assert record["after"][fact.id] < record["before"][fact.id] - 0.5
