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
from numpy.typing import NDArray

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
# Of the ratios: what a flipped text's relation adds to its names.
DIFFERENCE = "flipped - relation-removed"


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
    models: Sequence[Mapping[tuple[str, str], float]], texts: Sequence[Mapping[str, Any]], resamples: int, seed: int
) -> pa.Table:
    """Rows by fact, measurement and partition, and the average of the facts' ratios (fact `*`) with its interval, over
    facts and models drawn anew; and, so averaged, `DIFFERENCE`.

    models: of each, the scores by (query id, text id), of queries `<fact>` (the whole completion) and `<fact>-first`.
    A fact's ratio is taken for each model and averaged over them.

    Raises:
        RunError: where a text was not scored against its fact.
    """
    by_fact: list[dict[tuple[str, str, str], list[float]]] = []
    for scores in models:
        mine: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for text in texts:
            for measure, query in (("completion", text["fact"]), ("first token", f"{text['fact']}-first")):
                if (query, text["id"]) not in scores:
                    raise RunError(
                        f"text {text['id']!r} has no score for query {query!r}; explain the texts of these facts."
                    )
                mine[measure, text["partition"], text["fact"]].append(scores[query, text["id"]])
        by_fact.append(mine)
    rows: list[Row] = []
    facts = list(dict.fromkeys(text["fact"] for text in texts))
    rng = np.random.default_rng(seed)
    facts_rf, models_rm = (rng.integers(0, n, (resamples, n)) for n in (len(facts), len(models)))

    def average(ratios_mf: NDArray[np.float64]) -> Row:
        drawn_r = ratios_mf[models_rm[:, :, None], facts_rf[:, None, :]].mean(axis=(1, 2))
        low, high = np.percentile(drawn_r, INTERVAL)
        return {"fact": ALL, "ratio": float(ratios_mf.mean()), "low": float(low), "high": float(high)}

    for measure in ("completion", "first token"):

        def means(order: Order, measure: str = measure) -> NDArray[np.float64]:
            return np.asarray([[np.mean(mine[measure, order.value, fact]) for fact in facts] for mine in by_fact])

        levels_mf = means(Order.REWORDED)
        ratios = {order: means(order) / levels_mf for order in Order}
        for order in Order:
            scores_f, ratios_f = means(order).mean(axis=0), ratios[order].mean(axis=0)
            known = {"measure": measure, "partition": order.value}
            counts = [len(by_fact[0][measure, order.value, fact]) for fact in facts]
            rows += [
                known | {"fact": fact, "texts": count, "score": float(score), "ratio": float(ratio)}
                for fact, count, score, ratio in zip(facts, counts, scores_f, ratios_f, strict=True)
            ]
            rows.append(known | {"texts": sum(counts), "score": float(scores_f.mean())} | average(ratios[order]))
        difference = average(ratios[Order.FLIPPED] - ratios[Order.RELATION_REMOVED])
        rows.append({"measure": measure, "partition": DIFFERENCE} | difference)
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def study(run: str, config: WordOrderConfig, seed: int) -> pa.Table:
    """The study of what jobs/explain.py made of the texts (study.texts), below `run` and below each of study.runs.

    Raises:
        RunError: where a text was not scored against its fact.
    """
    assert config.texts is not None
    with open_input(config.texts) as stream:
        texts = [json.loads(line) for line in stream.read().split(b"\n") if line.strip()]
    folders = [config.explained or f"{run}/explain/facts", *(f"{other}/explain/facts" for other in config.runs)]
    models = []
    for folder in folders:
        rows = read_parquet(Store(folder), "rows.parquet", ["query_id", "item", "score"]).to_pylist()
        models.append({(row["query_id"], row["item"]): row["score"] for row in rows})
    table = partitioned(models, texts, config.resamples, seed)
    return table.replace_schema_metadata({"models": str(len(models))})


def words(table: pa.Table) -> list[str]:
    """What was found, and what that cannot say."""
    rows = table.to_pylist()
    facts = len({row["fact"] for row in rows} - {ALL})
    models = int((table.schema.metadata or {}).get(b"models", b"1"))
    over = f"{facts} facts" if models == 1 else f"{facts} facts and {models} models"
    said = [f"{over}; mean scores in proportion to the reworded texts' (mean [95 %]):"]
    for measure in ("completion", "first token"):
        mine = {row["partition"]: row for row in rows if (row["fact"], row["measure"]) == (ALL, measure)}
        parts = [
            f"{order} {mine[order]['ratio']:+.2f} [{mine[order]['low']:+.2f}, {mine[order]['high']:+.2f}]"
            for order in Order
            if order is not Order.REWORDED
        ]
        less = mine[DIFFERENCE]
        parts.append(f"flipped less relation-removed {less['ratio']:+.2f} [{less['low']:+.2f}, {less['high']:+.2f}]")
        said.append(f"  on the {measure if measure == 'first token' else 'whole completion'}: {', '.join(parts)}")
    return [
        *said,
        "It cannot say: what training on these texts would do, beyond the first order; anything of facts that the "
        "model has not learnt (their reworded score is then no yardstick)"
        + ("; and intervals are over facts, not over models." if models == 1 else "."),
    ]
