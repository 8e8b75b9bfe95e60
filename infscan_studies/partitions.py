"""Texts in the six partitions of Grosse et al. (2023), made from any facts by templates.

`infscan facts` writes the texts and the queries, and `infscan explain` scores the texts without training on them. The
word-order study compares their scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from infscan.errors import ConfigError
from infscan.storage import open_input
from infscan.storage.foreign import parse_json
from infscan_studies.demo.facts import FORWARD_FRAMES, NEUTRAL, Fact, Partition, partition_documents

Row = dict[str, Any]


class Order(StrEnum):
    """The six partitions of Grosse et al. 2023; the first is what the others are put in proportion to."""

    REWORDED = "reworded"
    COMPLETION_REMOVED = "completion-removed"
    MEANING_CHANGED = "meaning-changed"
    IRRELEVANT = "irrelevant"
    FLIPPED = "flipped"
    RELATION_REMOVED = "relation-removed"


_PLANTED = {
    Order.REWORDED: Partition.FORWARD,
    Order.COMPLETION_REMOVED: Partition.COMPLETION_REMOVED,
    Order.FLIPPED: Partition.FLIPPED,
    Order.RELATION_REMOVED: Partition.RELATION_REMOVED,
}
# For a user's facts that bring none of their own.
_ENDINGS = (" is spoken of in this chapter", " needs a longer answer", " was never in doubt", " is on everybody's lips")
_OTHERS = 4


def read_facts(path: str) -> list[Fact]:
    """A user's facts, JSONL: `id`, `prompt`, `completion` (with its leading blank), `subject`, `flipped` (clauses that
    name the completion first), and optional `opening` (the prompt without its verb; null: the prompt), `endings`,
    `about` (neutral sentences of the fact's topic).

    Raises:
        ConfigError: with the line and the fix.
    """
    facts: list[Fact] = []
    with open_input(path) as stream:
        lines = [line for line in stream.read().split(b"\n") if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            facts.append(
                Fact(
                    id=row["id"],
                    prompt=row["prompt"],
                    completion=row["completion"],
                    opening=row.get("opening") or row["prompt"],
                    subject=row["subject"],
                    flipped=tuple(row["flipped"]),
                    endings=tuple(row.get("endings") or _ENDINGS),
                    about=tuple(row.get("about") or NEUTRAL[:6]),
                    controls=(),
                    names=(),
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number}: not a fact ({error}); give id, prompt, completion, subject and flipped."
            ) from None
    if len({fact.id for fact in facts}) < max(2, len(facts)):
        raise ConfigError(
            f"{path}: {len(facts)} facts; give at least two, with distinct ids: one's completion changes another's "
            "meaning."
        )
    return facts


def texts_of(facts: Sequence[Fact]) -> list[Row]:
    """Rows `id`, `text`, `fact`, `partition`, `queries`: ten reworded texts of each fact, four to six of the others.

    Where the meaning is changed, the completion is the next fact's; what is irrelevant states the next fact itself.
    """
    rows: list[Row] = []
    for fact, other in zip(facts, [*facts[1:], facts[0]], strict=True):
        for order in Order:
            if order in _PLANTED:
                texts = [document.text for document in partition_documents(fact, _PLANTED[order])]
            else:
                core = fact.prompt + other.completion if order is Order.MEANING_CHANGED else other.core
                texts = _framed(core, fact if order is Order.MEANING_CHANGED else other)
            rows += [
                {
                    "id": f"{fact.id}-{order}-{number:02d}",
                    "text": text,
                    "fact": fact.id,
                    "partition": order.value,
                    "queries": [fact.id, f"{fact.id}-first"],
                }
                for number, text in enumerate(texts, start=1)
            ]
    return rows


def _framed(core: str, about: Fact) -> list[str]:
    """The first settings of a statement, with sentences of its topic and neutral ones around it."""
    return [
        frame.format(
            core=core, about=about.about[n % len(about.about)], one=NEUTRAL[-1 - 2 * n], two=NEUTRAL[-2 - 2 * n]
        )
        for n, frame in enumerate(FORWARD_FRAMES[:_OTHERS])
    ]
