"""Is the answer there word for word? Of a query's published rows, which hold its completion, or all of it.

Grosse et al. 2023 (section 5.3.3): for a famous quote the top sequences contain it. What is looked for is a run of
words, whatever the case and the signs between them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from infscan.errors import RunError
from infscan.queries import read_measured
from infscan.results.read import read_sequences, read_top
from infscan.storage import Store
from infscan_studies.config import MemorisationConfig

_WORD = re.compile(r"\w+")
SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("rank", pa.int32()),
        ("sequence_id", pa.int64()),
        ("document_id", pa.string()),
        ("score", pa.float64()),
        ("completion", pa.bool_()),
        ("whole", pa.bool_()),
        # Words of the longest run that the row shares with prompt and completion, and how many those have.
        ("longest", pa.int64()),
        ("words", pa.int64()),
    ]
)


def words_in(text: str) -> list[str]:
    """The words of a text in order, case folded."""
    return _WORD.findall(text.casefold())


def longest_run(a: Sequence[str], b: Sequence[str]) -> int:
    """Words of the longest run that is in both."""
    best = 0
    before = np.zeros(len(b) + 1, np.int64)
    codes: dict[str, int] = {}
    b_codes = np.asarray([codes.setdefault(word, len(codes)) for word in b], np.int64)
    for word in a:
        now = np.zeros_like(before)
        now[1:] = np.where(b_codes == codes.get(word, -1), before[:-1] + 1, 0)
        best = max(best, int(now.max()))
        before = now
    return best


def memorised(
    rows: Sequence[Mapping[str, Any]], texts: Mapping[int, str], questions: Mapping[str, tuple[str, str]]
) -> pa.Table:
    """rows: proponents. questions: (prompt, completion) by query."""
    found = []
    for row in rows:
        prompt, completion = questions[row["query_id"]]
        whole, wanted = words_in(prompt + completion), words_in(completion)
        text = words_in(texts[row["sequence_id"]])
        longest = longest_run(whole, text)
        found.append(
            {
                "query": row["query_id"],
                "rank": row["rank"],
                "sequence_id": row["sequence_id"],
                "document_id": row["document_id"],
                "score": row["score"],
                "completion": bool(wanted) and longest_run(wanted, text) == len(wanted),
                "whole": bool(whole) and longest == len(whole),
                "longest": longest,
                "words": len(whole),
            }
        )
    return pa.Table.from_pylist(found, schema=SCHEMA)


def study(run: str, config: MemorisationConfig, seed: int) -> pa.Table:
    """The study of a finished run's proponents; queries that came as token ids are left out.

    Raises:
        RunError: where the run is not finished, has no text, or no query that came as text.
    """
    questions = {
        query.id: (query.prompt or "", query.completion)
        for query in read_measured(Store(run))
        if query.completion is not None
    }
    sequences = read_sequences(run).select(["sequence_id", "text"]).to_pydict()
    if not questions or any(text is None for text in sequences["text"]):
        raise RunError(f"{run} has no text: neither queries nor sequences as token ids can be looked for word by word.")
    texts = dict(zip(sequences["sequence_id"], sequences["text"], strict=True))
    rows = [
        row
        for row in read_top(run).to_pylist()
        if row["side"] == "proponent" and row["rank"] <= config.rows and row["query_id"] in questions
    ]
    return memorised(rows, texts, questions)


def words(table: pa.Table) -> list[str]:
    """What was found, and what that cannot say."""
    rows = table.to_pylist()
    by_query: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_query.setdefault(row["query"], []).append(row)
    said = []
    for name, column in (("the completion", "completion"), ("prompt and completion", "whole")):
        first = sum(mine[0][column] for mine in by_query.values())
        among = sum(any(row[column] for row in mine) for mine in by_query.values())
        said.append(
            f"{name.capitalize()}, word for word: in the strongest row of {first} of {len(by_query)} queries, in one "
            f"of the {max(map(len, by_query.values()), default=0)} strongest of {among}."
        )
    lacking = [query for query, mine in by_query.items() if not any(row["completion"] for row in mine)]
    if lacking:
        said.append(f"In none: {', '.join(lacking[:12])}{', ...' if len(lacking) > 12 else ''}.")
    return [
        *said,
        "It cannot say: that a row without the words did not teach them (a translation, another spelling), nor that "
        "the corpus lacks them where no published row has them.",
    ]
