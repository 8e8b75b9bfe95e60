"""Queries of several kinds, read side by side: role-play, arithmetic, code, or whatever kinds a user has.

Grosse et al. 2023 (section 5.3, appendix E) read the strongest sequences of such queries for models of several sizes
beside each other. Here the strongest rows of every query and run stand in one table and in one page of Markdown, with
what can be counted: the query's words and numbers that they share, and which third of the layers carries them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from infscan.errors import ConfigError, RunError
from infscan.influence.agreement import INTERVAL
from infscan.queries import Query, read_measured
from infscan.report.thirds import THIRDS, thirds
from infscan.results.read import read_layers, read_sequences, read_top
from infscan.storage import Store
from infscan_studies.config import SideBySideConfig
from infscan_studies.models import ALL, rarity, shared

_NUMBER = re.compile(r"\d+")
_SHOWN = 400  # characters of a sequence on the page

# A row per published row that is read, and per kind and run their averages over queries (query `*`).
SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("query", pa.string()),
        ("run", pa.string()),
        ("rank", pa.int64()),
        ("sequence_id", pa.int64()),
        ("document_id", pa.string()),
        ("score", pa.float64()),
        # Of the query's words, by rarity, and of its numbers, the part that the row has (null: it has none).
        ("shared_words", pa.float64()),
        ("shared_numbers", pa.float64()),
        # Of the absolute layer margins.
        *((third, pa.float64()) for third in THIRDS),
        # Of `shared_words`, over queries, 95 %.
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("text", pa.string()),
    ]
)


def kind_of(query: str) -> str:
    """`role-play-3` is of kind `role-play`: an id without its last hyphen and what follows."""
    return query.rpartition("-")[0] or query


def shared_numbers(query: str, text: str) -> float | None:
    """Of the query's distinct numbers, the part that the text has; None where it has none."""
    mine = set(_NUMBER.findall(query))
    return len(mine & set(_NUMBER.findall(text))) / len(mine) if mine else None


def read_rows(run: str, queries: Mapping[str, Query], count: int) -> list[dict[str, Any]]:
    """The strongest `count` proponents of each of these queries.

    Raises:
        RunError: where the run is not finished or its sequences have no text.
    """
    sequences = read_sequences(run).select(["sequence_id", "text"]).to_pydict()
    if any(text is None for text in sequences["text"]):
        raise RunError(f"{run} has no text (its model has no tokenizer), and rows are read as texts.")
    texts = dict(zip(sequences["sequence_id"], sequences["text"], strict=True))
    idf, unseen = rarity(list(texts.values())), float(np.log(2 * len(texts) + 2))
    margins: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    layers = read_layers(run).to_pylist()
    third = thirds(list(dict.fromkeys(row["layer"] for row in layers)))
    for row in layers:
        mine = margins[row["query_id"], row["sequence_id"]]
        mine[third[row["layer"]]] = mine.get(third[row["layer"]], 0.0) + abs(row["score"])
    found = []
    for row in read_top(run).to_pylist():
        query = queries.get(row["query_id"])
        if query is None or row["side"] != "proponent" or row["rank"] > count:
            continue
        asked, text = f"{query.prompt or ''}{query.completion}", texts[row["sequence_id"]]
        parts = margins[query.id, row["sequence_id"]]
        total = sum(parts.values()) or 1.0
        found.append(
            {
                "kind": kind_of(query.id),
                "query": query.id,
                "run": run,
                **{name: row[name] for name in ("rank", "sequence_id", "document_id", "score")},
                "shared_words": shared(asked, text, idf, unseen),
                "shared_numbers": shared_numbers(asked, text),
                **{name: parts.get(name, 0.0) / total for name in THIRDS},
                "text": text,
            }
        )
    return found


def averages(rows: Sequence[Mapping[str, Any]], resamples: int, seed: int) -> list[dict[str, Any]]:
    """Per kind and run, the averages over queries of the averages over rows."""
    found: list[dict[str, Any]] = []
    for kind, run in dict.fromkeys((row["kind"], row["run"]) for row in rows):
        mine = [row for row in rows if (row["kind"], row["run"]) == (kind, run)]
        queries = list(dict.fromkeys(row["query"] for row in mine))

        def means(column: str, mine: list[Mapping[str, Any]] = mine, queries: list[str] = queries) -> np.ndarray:
            by_query = [[row[column] for row in mine if row["query"] == query] for query in queries]
            return np.asarray([np.mean(values) for values in by_query if None not in values])

        words = means("shared_words")
        drawn = np.random.default_rng(seed).integers(0, len(words), (resamples, len(words)))
        low, high = np.percentile(words[drawn].mean(axis=1), INTERVAL)
        numbers = means("shared_numbers")
        found.append(
            {
                "kind": kind,
                "query": ALL,
                "run": run,
                "shared_words": float(words.mean()),
                "shared_numbers": float(numbers.mean()) if len(numbers) else None,
                **{name: float(means(name).mean()) for name in THIRDS},
                "low": float(low),
                "high": float(high),
            }
        )
    return found


def page(rows: Sequence[Mapping[str, Any]], queries: Mapping[str, Query]) -> str:
    """Every query with its rows of each run beside each other, as Markdown. Texts are shown as code, so that nothing in
    them is taken for markup."""
    runs = list(dict.fromkeys(row["run"] for row in rows if row["query"] != ALL))
    lines = ["# Side by side", ""]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        lines += [f"## {kind}", ""]
        for query in dict.fromkeys(row["query"] for row in rows if row["kind"] == kind and row["query"] != ALL):
            asked = queries[query]
            rather = f" rather than {_code(asked.contrast)}" if asked.contrast else ""
            lines += [f"### {query}", "", f"{_code(asked.prompt or '')} → {_code(asked.completion or '')}{rather}", ""]
            lines += [f"| rank | {' | '.join(_code(run) for run in runs)} |", "|---" * (len(runs) + 1) + "|"]
            mine = {(row["run"], row["rank"]): row for row in rows if row["query"] == query}
            for rank in sorted({rank for _, rank in mine}):
                cells = [_cell(mine.get((run, rank))) for run in runs]
                lines.append(f"| {rank} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


def _code(text: str) -> str:
    """Inline code that ends a line, a table's cell or itself nowhere: such signs are replaced by look-alikes."""
    shown = " ".join(text.split()).replace("`", "ˋ").replace("|", "¦")
    return f"`{shown}`" if shown else ""


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    text = row["text"] if len(row["text"]) <= _SHOWN else row["text"][:_SHOWN] + "…"
    share = f"words {row['shared_words']:.0%}, upper layers {row['upper']:.0%}"
    return f"{row['score']:+.4g}, {share}: {_code(text)}"


def read_asked(run: str, config: SideBySideConfig) -> dict[str, Query]:
    """The run's queries that came as text, of study.kinds (empty: all).

    Raises:
        ConfigError: where no query is of a wanted kind.
    """
    known = {query.id: query for query in read_measured(Store(run)) if query.completion is not None}
    kinds = {kind_of(query) for query in known}
    missing = set(config.kinds) - kinds
    if missing or not known:
        raise ConfigError(
            f"study.kinds: {', '.join(sorted(missing)) or 'nothing'} is no kind of a query of {run}; its kinds are "
            f"{', '.join(sorted(kinds)) or 'none, as no query came as text'} (an id without its last -part)."
        )
    return {name: query for name, query in known.items() if not config.kinds or kind_of(name) in config.kinds}


def study(run: str, config: SideBySideConfig, seed: int) -> pa.Table:
    """The study of `run` and study.runs, which were asked the same.

    Raises:
        RunError: where another run was asked otherwise.
    """
    queries = read_asked(run, config)
    rows = []
    for uri in (run, *config.runs):
        theirs = {query.id: (query.prompt, query.completion) for query in read_measured(Store(uri))}
        if any(theirs.get(name) != (query.prompt, query.completion) for name, query in queries.items()):
            raise RunError(f"{uri} was asked other questions than {run}; compare runs with the same query file.")
        rows += read_rows(uri, queries, config.rows)
    return pa.Table.from_pylist([*rows, *averages(rows, config.resamples, seed)], schema=SCHEMA)


def words(table: pa.Table) -> list[str]:
    """What was found, and what that cannot say."""
    said = []
    for row in (row for row in table.to_pylist() if row["query"] == ALL):
        numbers = "" if row["shared_numbers"] is None else f", {row['shared_numbers']:.0%} of its numbers"
        said.append(
            f"{row['kind']}, {row['run']}: rows share {row['shared_words']:.0%} [{row['low']:.0%}, {row['high']:.0%}] "
            f"of their query's words, by rarity{numbers}; layers lower {row['lower']:.0%}, middle {row['middle']:.0%}, "
            f"upper {row['upper']:.0%}."
        )
    return [
        *said,
        "It cannot say: whether a row states what was asked or only sounds like it. Read the rows: side_by_side.md. "
        "Intervals are over queries of a kind.",
    ]
