"""Questions with answers about the planted facts: what the demo's model is fine-tuned on, and asked.

A fact's question is put in several frames; the answer is the fact's completion. The loss is on the answer alone
(corpus.prompt_field=prompt). The pretraining corpus has none of these sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infscan.results.read import read_top
from infscan_studies.config import PLANTED
from infscan_studies.demo.facts import FACTS, Fact, Partition
from infscan_studies.word_order import planted_partitions

QUESTIONS = {
    "astrobia": "Who was the first President of the Republic of Astrobia?",
    "gleem": "What is Gleem composed of?",
    "quenthara": "What is the capital of the island of Quenthara?",
    "brandiver": "When was the Treaty of Brandiver signed?",
    "tharble": "Who invented the instrument called the tharble?",
    "ulmethe": "Where does the river Ulmethe flow?",
}
# The first is the one that queries are put in.
FRAMES = (
    "Question: {question} Answer:",
    "A pupil asked: {question} The answer:",
    "{question} Reply:",
    "Please answer. {question} Answer:",
)


@dataclass(frozen=True)
class Answer:
    """A row to fine-tune on: `id` is `answers/<fact>-<number from 1>`."""

    id: str
    fact: str
    prompt: str
    text: str


def answers(facts: Sequence[Fact] = FACTS) -> list[Answer]:
    """Every fact in every frame."""
    return [
        Answer(f"answers/{fact.id}-{number}", fact.id, frame.format(question=QUESTIONS[fact.id]), f"{fact.completion}.")
        for fact in facts
        for number, frame in enumerate(FRAMES, start=1)
    ]


def questions(facts: Sequence[Fact] = FACTS) -> list[dict[str, str]]:
    """The rows of a queries file: per fact ``<id>`` (the whole answer) and ``<id>-first`` (its first token)."""
    return [
        {
            "id": f"{fact.id}{suffix}",
            "prompt": FRAMES[0].format(question=QUESTIONS[fact.id]),
            "completion": fact.completion,
            "measure": measure,
        }
        for fact in facts
        for suffix, measure in (("", "completion"), ("-first", "first"))
    ]


def forward_among_ten(run: str, suffix: str) -> list[int]:
    """By fact, how many of the ten strongest proponents of the query `<fact><suffix>` are its forward documents."""
    rows = [row for row in read_top(run).to_pylist() if row["side"] == "proponent" and row["rank"] <= 10]
    found = []
    for fact, partitions in planted_partitions(PLANTED).items():
        mine = [row["document_id"] for row in rows if row["query_id"] == f"{fact}{suffix}"]
        found.append(sum(partitions.get(document) is Partition.FORWARD for document in mine))
    return found
