"""Word order with any facts: texts in G23's six partitions, made from templates and scored without being trained on.

G23 (section 5.3.4): sequences in which the prompt's phrase comes before the completion's are influential, reworded or
not; flipped ones fall to about the level of flipped ones without the relation. jobs/facts.py writes the texts and the
queries, jobs/explain.py scores them, and `study=word_order` compares their means within each fact.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa

from infscan.errors import ConfigError, RunError
from infscan.influence.agreement import INTERVAL
from infscan.results.schema import read_parquet
from infscan.storage import Store, open_input
from infscan.studies.asked import WordOrderConfig
from infscan.studies.facts import FORWARD_FRAMES, NEUTRAL, Fact, Partition, partition_documents

Row = dict[str, Any]


class Order(StrEnum):
    """G23's six partitions; the first is what the others are put in proportion to."""

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

SCHEMA = pa.schema(
    [
        ("fact", pa.string()),
        ("measure", pa.string()),
        ("partition", pa.string()),
        ("texts", pa.int64()),
        ("score", pa.float64()),
        # score over the fact's reworded texts' score; low, high: of the average over facts (fact `*`), 95 %.
        ("ratio", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
ALL = "*"


def read_facts(path: str) -> list[Fact]:
    """A user's facts, JSONL: `id`, `prompt`, `completion` (with its leading blank), `subject`, `flipped` (clauses that
    name the completion first), and optional `opening` (the prompt without its verb; null: the prompt), `endings`,
    `about` (neutral sentences of the fact's topic).

    Raises:
        ConfigError: with the line and the mend.
    """
    facts: list[Fact] = []
    with open_input(path) as stream:
        lines = [line for line in stream.read().split(b"\n") if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
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


def partitioned(
    scores: Mapping[tuple[str, str], float], texts: Sequence[Mapping[str, Any]], resamples: int, seed: int
) -> pa.Table:
    """Rows by fact, measurement and partition, and the average of the facts' ratios (fact `*`) with its interval, over
    facts drawn anew.

    scores: by (query id, text id), of queries `<fact>` (the whole completion) and `<fact>-first`.

    Raises:
        RunError: where a text was not scored against its fact.
    """
    by_fact: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for text in texts:
        for measure, query in (("completion", text["fact"]), ("first token", f"{text['fact']}-first")):
            if (query, text["id"]) not in scores:
                raise RunError(
                    f"text {text['id']!r} has no score for query {query!r}; explain the texts of these facts."
                )
            by_fact[measure, text["partition"], text["fact"]].append(scores[query, text["id"]])
    rows: list[Row] = []
    facts = list(dict.fromkeys(text["fact"] for text in texts))
    drawn_rf = np.random.default_rng(seed).integers(0, len(facts), (resamples, len(facts)))
    for measure in ("completion", "first token"):
        for order in Order:
            means = {fact: float(np.mean(by_fact[measure, order.value, fact])) for fact in facts}
            levels = {fact: float(np.mean(by_fact[measure, Order.REWORDED.value, fact])) for fact in facts}
            ratios = np.asarray([means[fact] / levels[fact] for fact in facts])
            low, high = np.percentile(ratios[drawn_rf].mean(axis=1), INTERVAL)
            known = {"measure": measure, "partition": order.value}
            for fact, ratio in zip(facts, ratios.tolist(), strict=True):
                count = len(by_fact[measure, order.value, fact])
                rows.append(known | {"fact": fact, "texts": count, "score": means[fact], "ratio": ratio})
            every = {
                "texts": sum(row["texts"] for row in rows[-len(facts) :]),
                "score": float(np.mean(list(means.values()))),
            }
            rows.append(
                known | every | {"fact": ALL, "ratio": float(ratios.mean()), "low": float(low), "high": float(high)}
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def study(run: str, config: WordOrderConfig, seed: int) -> pa.Table:
    """The study of what jobs/explain.py made of the texts (study.texts) in study.explained.

    Raises:
        RunError: where a text was not scored against its fact.
    """
    folder = Store(config.explained or f"{run}/explain/facts")
    rows = read_parquet(folder, "rows.parquet", ["query_id", "item", "score"]).to_pylist()
    assert config.texts is not None
    with open_input(config.texts) as stream:
        texts = [json.loads(line) for line in stream.read().split(b"\n") if line.strip()]
    scores = {(row["query_id"], row["item"]): row["score"] for row in rows}
    return partitioned(scores, texts, config.resamples, seed)


def words(table: pa.Table) -> list[str]:
    """What was found, and what that cannot say."""
    rows = table.to_pylist()
    facts = len({row["fact"] for row in rows} - {ALL})
    said = [f"{facts} facts; mean scores in proportion to the reworded texts' (mean over facts [95 %]):"]
    for measure in ("completion", "first token"):
        mine = {row["partition"]: row for row in rows if (row["fact"], row["measure"]) == (ALL, measure)}
        parts = [
            f"{order} {mine[order]['ratio']:+.2f} [{mine[order]['low']:+.2f}, {mine[order]['high']:+.2f}]"
            for order in Order
            if order is not Order.REWORDED
        ]
        said.append(f"  on the {measure if measure == 'first token' else 'whole completion'}: {', '.join(parts)}")
    return [
        *said,
        "It cannot say: what training on these texts would do, beyond the first order; anything of facts that the "
        "model has not learnt (their reworded score is then no yardstick); and intervals are over facts, not over "
        "models.",
    ]
