"""The same queries over several models: do their top lists agree, and do larger models rest on fewer shared words?

Grosse et al. 2023 (section 5.3.1): influential sequences of small models share the query's words; those of large ones
its matter.
Here: of two runs' top lists, the part that is in both; and of each run's top rows, the part of the query's words that
they share, each word weighted by how rare it is among all rows published.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from infscan.errors import RunError
from infscan.influence.agreement import INTERVAL
from infscan.queries import Query, read_measured
from infscan.results.read import read_sequences, read_summary, read_top
from infscan.storage import Store
from infscan_studies.config import ModelsConfig

ALL = "*"
_WORD = re.compile(r"\w+")

# A row per run (other: null) with the words its rows share, and per pair of runs with the part that both lists have;
# query `*`: the average over queries, with its 95 % interval over queries.
SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("run", pa.string()),
        ("other", pa.string()),
        ("top", pa.int64()),
        ("overlap", pa.float64()),
        ("shared_words", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)


def words_of(text: str) -> set[str]:
    """Distinct words, case folded."""
    return set(_WORD.findall(text.casefold()))


def rarity(texts: Sequence[str]) -> dict[str, float]:
    """IDF(w) = log((C - n_w + 0.5) / (n_w + 0.5) + 1) of words among C texts (docs/method.md#tf-idf)."""
    counts = Counter(word for text in texts for word in words_of(text))
    return {word: float(np.log((len(texts) - n + 0.5) / (n + 0.5) + 1)) for word, n in counts.items()}


def shared(query: str, text: str, idf: Mapping[str, float], unseen: float) -> float:
    """Of the query's words, by rarity, the part that the text has: from 0 to 1. unseen: rarity of a word in no text."""
    weights = {word: idf.get(word, unseen) for word in words_of(query)}
    total = sum(weights.values())
    return sum(weight for word, weight in weights.items() if word in words_of(text)) / total if total else 0.0


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """|A and B| over the longer list's length: 1 for the same rows, whatever their order."""
    longest = max(len(a), len(b))
    return len(set(a) & set(b)) / longest if longest else 1.0


def compared(
    lists: Mapping[str, Mapping[str, Sequence[int]]],
    questions: Mapping[str, str],
    texts: Mapping[int, str],
    tops: Sequence[int],
    resamples: int,
    seed: int,
) -> pa.Table:
    """lists: by run, then by query, the proponents' sequence_ids, strongest first. questions: prompt and completion."""
    idf = rarity(list(texts.values()))
    unseen = float(np.log(2 * len(texts) + 2))
    rows: list[dict[str, Any]] = []

    def add(run: str, other: str | None, top: int, column: str, values: Mapping[str, float]) -> None:
        known = {"run": run, "other": other, "top": top}
        rows.extend(known | {"query": query, column: value} for query, value in values.items())
        found = np.asarray(list(values.values()))
        drawn = np.random.default_rng(seed).integers(0, len(found), (resamples, len(found)))
        low, high = np.percentile(found[drawn].mean(axis=1), INTERVAL)
        rows.append(known | {"query": ALL, column: float(found.mean()), "low": float(low), "high": float(high)})

    for top in tops:
        for run, mine in lists.items():
            by_query = {
                query: float(np.mean([shared(questions[query], texts[number], idf, unseen) for number in found[:top]]))
                for query, found in mine.items()
                if found
            }
            add(run, None, top, "shared_words", by_query)
        for run, other in combinations(lists, 2):
            add(run, other, top, "overlap", {q: overlap(lists[run][q][:top], lists[other][q][:top]) for q in questions})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def study(run: str, config: ModelsConfig, seed: int) -> pa.Table:
    """The study of `run` and of study.runs.

    Raises:
        RunError: where they are not of one corpus and the same questions, or have no text.
    """
    runs = [run, *(other for other in config.runs if other != run)]
    queries = {uri: {query.id: query for query in read_measured(Store(uri))} for uri in runs}
    questions = {name: text for name, query in queries[run].items() if (text := asked(query)) is not None}
    corpora = {read_summary(uri)["inputs"].get("corpus") for uri in runs}
    for uri in runs[1:]:
        theirs = {name: asked(query) for name, query in queries[uri].items()}
        if theirs != questions:
            raise RunError(f"{uri} was asked other questions than {run}; compare runs with the same query file.")
    if len(corpora) > 1:
        raise RunError(
            f"{', '.join(runs)} scanned different corpora, so their sequences have other numbers; prepare one corpus "
            "(models with one tokenizer), and scan it with each."
        )
    texts: dict[int, str] = {}
    lists: dict[str, dict[str, list[int]]] = {}
    for uri in runs:
        sequences = read_sequences(uri).select(["sequence_id", "text"]).to_pydict()
        if any(text is None for text in sequences["text"]):
            raise RunError(f"{uri} has no text (its model has no tokenizer), and shared words are of texts.")
        texts |= dict(zip(sequences["sequence_id"], sequences["text"], strict=True))
        lists[uri] = {name: [] for name in questions}
        for row in read_top(uri).to_pylist():
            if row["side"] == "proponent" and row["query_id"] in questions:
                lists[uri][row["query_id"]].append(row["sequence_id"])
    return compared(lists, questions, texts, config.tops, config.resamples, seed)


def asked(query: Query) -> str | None:
    """A query's words, where it came as text."""
    return None if query.completion is None else f"{query.prompt or ''}{query.completion}"


def words(table: pa.Table) -> list[str]:
    """What was found, and what that cannot say."""
    rows = [row for row in table.to_pylist() if row["query"] == ALL]
    said = [
        f"{row['run']}: its top {row['top']} share {row['shared_words']:.0%} [{row['low']:.0%}, {row['high']:.0%}] of "
        "their query's words, by rarity."
        for row in rows
        if row["other"] is None
    ]
    said += [
        f"{row['run']} and {row['other']}: {row['overlap']:.0%} [{row['low']:.0%}, {row['high']:.0%}] of the top "
        f"{row['top']} are in both."
        for row in rows
        if row["other"] is not None
    ]
    return [
        *said,
        "It cannot say: that a list without the query's words is abstract; it may be noise, which a large model has "
        "less of. Read its rows (infscan explain). Intervals are over queries, not over trainings of a model.",
    ]
