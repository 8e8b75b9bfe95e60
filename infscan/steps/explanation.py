"""From explained pairs to the rows of an explanation's tables (`infscan.results.explained`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infscan.corpus.addressable import AddressableCorpus
from infscan.corpus.near_duplicates import carrying, near_duplicates
from infscan.corpus.sequences import Sequence
from infscan.queries import Query
from infscan.results.documents import strongest_span
from infscan.results.publish import is_spurious
from infscan.results.read import read_sequences, read_tokens, read_top

Floats = NDArray[np.float64]
Rows = list[dict[str, Any]]
Decode = Callable[[list[int]], str] | None


@dataclass(frozen=True)
class Explained:
    """One (query, sequence), float64; groups of layers add up, their rows of `matrix_lt` one after another."""

    # [layers, T], by layer and input position; all of it is the score.
    matrix_lt: Floats
    # Of token t as an output (0 for one without a loss), and as an input; None where not asked for.
    output_t: Floats | None
    input_t: Floats | None

    @property
    def score(self) -> float:
        return float(self.matrix_lt.sum())


@dataclass(frozen=True)
class Item:
    """A sequence to explain, and for which queries (by index). rows: the run's published row of a query, by index."""

    name: str
    sequence: Sequence
    queries: tuple[int, ...]
    rows: Mapping[int, Mapping[str, Any]]
    text: str | None

    @property
    def in_corpus(self) -> bool:
        return self.sequence.sequence_id >= 0


def tables(
    queries: Sequences[Query],
    items: Sequences[Item],
    by_pair: Mapping[tuple[int, int], Explained],
    by_part: Mapping[tuple[int, int], Sequences[Explained]],
    layers: Sequences[str],
    decode: Decode,
    *,
    matrix: bool,
) -> dict[str, Rows]:
    """rows, layers, tokens, completion (where there are parts) and matrix (where asked for), query by query.

    by_pair: by item and query. by_part: of each, the query's measured tokens.
    """
    found: dict[str, Rows] = {"rows": [], "layers": [], "tokens": []}
    if matrix:
        found["matrix"] = []
    if by_part:
        found["completion"] = []
    for row, query in _ordered(items, by_pair):
        item, one = items[row], by_pair[row, query]
        pair = {"query_id": queries[query].id, "item": item.name}
        found["rows"].append(pair | _row(item, query, one))
        by_layer = one.matrix_lt.sum(axis=1).tolist()
        found["layers"] += [pair | {"layer": layer, "score": s} for layer, s in zip(layers, by_layer, strict=True)]
        found["tokens"] += [pair | token for token in _tokens(item.sequence.token_ids.tolist(), one, decode)]
        if matrix:
            matrix_lt = one.matrix_lt.tolist()
            found["matrix"] += [pair | {"layer": l, "scores": s} for l, s in zip(layers, matrix_lt, strict=True)]
        if by_part:
            found["completion"] += [
                pair | part for part in _completion(queries[query], by_part[row, query], decode, matrix=matrix)
            ]
    return found


def _ordered(items: Sequences[Item], pairs: Mapping[tuple[int, int], Explained]) -> list[tuple[int, int]]:
    """(item, query) by query; the run's rows by side and rank, then the rest by score."""

    def key(pair: tuple[int, int]) -> tuple[Any, ...]:
        published = items[pair[0]].rows.get(pair[1])
        if published:
            return pair[1], 0, published["side"] == "opponent", published["rank"]
        return pair[1], 1, -pairs[pair].score, pair[0]

    return sorted(pairs, key=key)


def _row(item: Item, query: int, one: Explained) -> dict[str, Any]:
    published = item.rows.get(query, {})
    by_token, spans = one.matrix_lt.sum(axis=0), item.sequence.documents
    strongest = strongest_span([(span.start, span.end) for span in spans], by_token, one.score)[0]
    return {
        "sequence_id": item.sequence.sequence_id if item.in_corpus else None,
        "side": published.get("side"),
        "rank": published.get("rank"),
        "score": one.score,
        "published": published.get("score"),
        "spurious": is_spurious(by_token.astype(np.float32)),
        "document_id": spans[strongest].id if item.in_corpus else None,
        "source": spans[strongest].source if item.in_corpus else None,
        "text": item.text,
    }


def _tokens(token_ids: list[int], one: Explained, decode: Decode) -> Rows:
    margins = one.matrix_lt.sum(axis=0).tolist()
    empty = [None] * len(token_ids)
    output = empty if one.output_t is None else one.output_t.tolist()
    entered = empty if one.input_t is None else one.input_t.tolist()
    return [
        {
            "position": position,
            "token_id": token_id,
            "token": decode([token_id]) if decode else None,
            "score": margins[position],
            "output": output[position],
            "input": entered[position],
        }
        for position, token_id in enumerate(token_ids)
    ]


def _completion(query: Query, parts: Sequences[Explained], decode: Decode, *, matrix: bool) -> Rows:
    measured = [(part.token_ids[position], position) for part in query.parts for position in part.positions]
    return [
        {
            "index": index,
            "position": position,
            "token_id": token_id,
            "token": decode([token_id]) if decode else None,
            "score": one.score,
            "scores": one.matrix_lt.sum(axis=0).tolist() if matrix else None,
        }
        for index, ((token_id, position), one) in enumerate(zip(measured, parts, strict=True))
    ]


def neighbours(corpus: AddressableCorpus, items: Sequences[Item], decode: Decode) -> Rows:
    """The sequences before and after each item of the corpus, where the same document goes on in them."""
    found: Rows = []
    for item in items:
        own = item.sequence
        for offset in (-1, 1):
            number = own.sequence_id + offset
            if not item.in_corpus or not 0 <= number < corpus.sequences:
                continue
            [other] = corpus.read(np.asarray([number], np.int64))
            before, after = (other, own) if offset < 0 else (own, other)
            last, first = before.documents[-1], after.documents[0]
            if (last.id, last.source) == (first.id, first.source):
                text = decode(other.token_ids.tolist()) if decode else None
                known = {"sequence_id": number, "document_id": last.id, "text": text}
                found.append({"item": item.name, "offset": offset} | known)
    return found


def similar(run: str, query_ids: Sequences[str], threshold: float) -> Rows:
    """Of every query and side, the published rows that are near-duplicates of another one, by group and rank."""
    columns = read_sequences(run).select(["sequence_id", "token_ids", "documents"]).to_pylist()
    sequences = {row["sequence_id"]: row for row in columns}
    margins = {(row["query_id"], row["sequence_id"]): row["scores"] for row in read_tokens(run).to_pylist()}

    def piece(row: Mapping[str, Any]) -> np.ndarray:
        own = sequences[row["sequence_id"]]
        scores = np.asarray(margins[row["query_id"], row["sequence_id"]])
        return np.asarray(own["token_ids"], np.int64)[carrying(own["documents"], scores)]

    by_side: dict[tuple[str, str], Rows] = {}
    for row in read_top(run).to_pylist():
        if row["query_id"] in set(query_ids):
            by_side.setdefault((row["query_id"], row["side"]), []).append(row)
    found: Rows = []
    for mine in by_side.values():
        mine.sort(key=lambda row: row["rank"])
        groups = near_duplicates([piece(row) for row in mine], threshold)
        chosen = [(group, row) for group, row in zip(groups, mine, strict=True) if groups.count(group) > 1]
        for group, row in sorted(chosen, key=lambda pair: (pair[0], pair[1]["rank"])):
            columns = ("query_id", "side", "rank", "sequence_id", "document_id")
            found.append({"group": mine[group]["sequence_id"]} | {name: row[name] for name in columns})
    return found
