"""Does what a query's translation rests on, too, and does a document's translation count?

Grosse et al. 2023 (section 5.3.1): the larger the model, the more an English query's top sequences influence its
translations too.
Here, of pairs of queries: the part of their top lists that is in both, beside what is in both of queries that are no
translations of each other; and, where the corpus holds a pair's text in both languages, the rank of the *other*
language's document among all sequences. Flipped translation pairs are facts like any other: `infscan facts` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from infscan.errors import ConfigError, RunError
from infscan.influence.agreement import INTERVAL
from infscan.results.dense import score_column
from infscan.results.read import read_scores, read_top
from infscan.storage import open_input
from infscan.storage.foreign import parse_json
from infscan_studies.config import CrossLingualConfig
from infscan_studies.models import ALL, overlap

# Rows with `top`: a pair's two lists. Rows with `document`: where a query ranks the document of its translation.
SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("translation", pa.string()),
        ("top", pa.int64()),
        ("overlap", pa.float64()),
        # The average over the query's pairings with other pairs' translations.
        ("unrelated", pa.float64()),
        ("document", pa.string()),
        # Of the document's strongest sequence, from 1; and how many sequences there are.
        ("rank", pa.int64()),
        ("sequences", pa.int64()),
        # Of the average over pairs of `overlap` (query `*`), 95 %.
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Pair:
    """Two queries with one meaning; the documents that state it, in the language of each (None: not known)."""

    query: str
    translation: str
    query_document: str | None = None
    translation_document: str | None = None


def read_pairs(path: str) -> list[Pair]:
    """JSONL: `query`, `translation` (ids of queries), and optional `query_document`, `translation_document`.

    Raises:
        ConfigError: with the line and the fix.
    """
    with open_input(path) as stream:
        lines = [line for line in stream.read().split(b"\n") if line.strip()]
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            pairs.append(Pair(**parse_json(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number}: not a pair ({error}); give query and translation, and query_document and "
                "translation_document where the corpus holds them."
            ) from None
    if len(pairs) < 2:
        raise ConfigError(f"{path}: {len(pairs)} pairs; give two or more, or there is nothing unrelated beside them.")
    return pairs


def overlaps(
    lists: Mapping[str, Sequence[int]], pairs: Sequence[Pair], tops: Sequence[int], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """lists: by query, the proponents' sequence_ids, strongest first."""
    rows: list[dict[str, Any]] = []
    for top in tops:
        cut = {query: numbers[:top] for query, numbers in lists.items()}
        mine = []
        for pair in pairs:
            others = [other.translation for other in pairs if other is not pair]
            mine.append(
                {
                    "query": pair.query,
                    "translation": pair.translation,
                    "top": top,
                    "overlap": overlap(cut[pair.query], cut[pair.translation]),
                    "unrelated": float(np.mean([overlap(cut[pair.query], cut[other]) for other in others])),
                }
            )
        found = np.asarray([row["overlap"] for row in mine])
        drawn = np.random.default_rng(seed).integers(0, len(found), (resamples, len(found)))
        low, high = np.percentile(found[drawn].mean(axis=1), INTERVAL)
        average = {
            "overlap": float(found.mean()),
            "unrelated": float(np.mean([row["unrelated"] for row in mine])),
            "low": float(low),
            "high": float(high),
        }
        rows += [*mine, {"query": ALL, "translation": ALL, "top": top} | average]
    return rows


def document_ranks(scores: pa.Table, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Where each query of a pair ranks the document of the other. scores: of `read_scores`.

    A sequence of several documents counts as the one that it begins with.

    Raises:
        RunError: where no sequence begins with a document that a pair names.
    """
    documents = np.asarray(scores["document_id"].to_pylist(), object)
    rows = []
    for pair in pairs:
        for query, translation, document in (
            (pair.query, pair.translation, pair.translation_document),
            (pair.translation, pair.query, pair.query_document),
        ):
            if document is None:
                continue
            places = np.flatnonzero(documents == document)
            if not len(places):
                raise RunError(f"no scanned sequence begins with the document {document!r} of the pair {query!r}.")
            values = scores[score_column(query)].to_numpy()
            best = values[places].max()
            rows.append(
                {
                    "query": query,
                    "translation": translation,
                    "document": document,
                    "rank": int((values > best).sum()) + 1,
                    "sequences": len(values),
                }
            )
    return rows


def study(run: str, config: CrossLingualConfig, seed: int) -> pa.Table:
    """The study of a finished run whose queries come in pairs (study.pairs).

    Raises:
        ConfigError: where a pair names a query that the run was not asked.
        RunError: where documents are named and the run kept its top rows' scores alone.
    """
    assert config.pairs is not None
    pairs = read_pairs(config.pairs)
    lists: dict[str, list[int]] = {}
    for row in read_top(run).to_pylist():
        if row["side"] == "proponent":
            lists.setdefault(row["query_id"], []).append(row["sequence_id"])
    for query in (query for pair in pairs for query in (pair.query, pair.translation)):
        if query not in lists:
            raise ConfigError(f"{config.pairs}: {query!r} has no proponents in {run}; name queries of this run.")
    rows = overlaps(lists, pairs, config.tops, config.resamples, seed)
    if any(pair.query_document or pair.translation_document for pair in pairs):
        rows += document_ranks(read_scores(run), pairs)
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def words(table: pa.Table) -> list[str]:
    """What was found, and what that cannot say."""
    rows = table.to_pylist()
    pairs = len({row["query"] for row in rows if row["top"] is not None} - {ALL})
    said = [
        f"Of the top {row['top']}, {row['overlap']:.1%} [{row['low']:.1%}, {row['high']:.1%}] are in both lists of a "
        f"query and its translation, {row['unrelated']:.1%} of queries that are none ({pairs} pairs)."
        for row in rows
        if row["query"] == ALL
    ]
    ranks = [(row["rank"], row["sequences"]) for row in rows if row["rank"] is not None]
    if ranks:
        places = np.asarray([rank for rank, _ in ranks])
        said.append(
            f"The document in the other language: median rank {np.median(places):,.0f} of {ranks[0][1]:,} sequences, "
            f"in the top 10 of {(places <= 10).sum()} of {len(ranks)} queries, in the top 1% of "
            f"{(places <= 0.01 * ranks[0][1]).sum()}."
        )
    return [
        *said,
        "It cannot say: why two lists agree (names, numbers and loan words are spelt alike in many languages); nor "
        "anything of languages that the tokenizer splits into bytes. Intervals are over pairs.",
    ]
