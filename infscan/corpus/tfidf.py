"""G23's TF-IDF filter: which sequences share rare tokens with a query. Plain numpy, one pass, bounded memory.

    IDF(w) = log((C - n_w + 0.5) / (n_w + 0.5) + 1)      C sequences, n_w of them containing w
    score(z) = sum over the query's tokens w, with multiplicity, that are present in z of IDF(w)

A sequence that shares no token with the query scores 0: influence across languages or paraphrases is missed by design.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class DocumentFrequencies:
    """In how many of `sequences` sequences each token occurs: counts is int64 [V]. Parts of a corpus add up."""

    sequences: int
    counts: np.ndarray

    def __add__(self, other: DocumentFrequencies) -> DocumentFrequencies:
        return DocumentFrequencies(self.sequences + other.sequences, self.counts + other.counts)

    def idf(self) -> np.ndarray:
        """float64 [V], all positive."""
        return np.log((self.sequences - self.counts + 0.5) / (self.counts + 0.5) + 1.0)


def document_frequencies(sequences: Iterable[np.ndarray], vocab_size: int) -> DocumentFrequencies:
    """Count over sequences of token ids in [0, vocab_size)."""
    counts = np.zeros(vocab_size, np.int64)
    number = 0
    for tokens in sequences:
        counts[np.unique(tokens)] += 1
        number += 1
    return DocumentFrequencies(number, counts)


@dataclass(frozen=True, eq=False)
class Matches:
    """One query's best sequences: scores falling, equal scores by rising sequence id."""

    sequence_ids: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.sequence_ids)


def best(sequence_ids: np.ndarray, scores: np.ndarray, k: int) -> Matches:
    """The k best rows in the filter's total order: score falling, then sequence id rising."""
    order = np.lexsort((sequence_ids, -scores))[:k]
    return Matches(sequence_ids[order], scores[order])


def merge(parts: Sequence[Matches], k: int) -> Matches:
    """The k best of several parts of a corpus, whatever the parts and their order."""
    ids = np.concatenate([np.empty(0, np.int64), *(part.sequence_ids for part in parts)])
    return best(ids, np.concatenate([np.empty(0, np.float64), *(part.scores for part in parts)]), k)


class QueryWeights:
    """All queries' weights over the tokens that occur in any of them: float64 [U, Q], and the way from V to U."""

    def __init__(self, queries: Sequence[np.ndarray], idf: np.ndarray) -> None:
        """Args: queries' token ids (prompt plus completion); idf [V]."""
        used = np.unique(np.concatenate([np.asarray(tokens, np.int64) for tokens in ((), *queries)]))
        self._column = np.full(len(idf), -1, np.int64)
        self._column[used] = np.arange(len(used))
        self.weights = np.zeros((len(used), len(queries)), np.float64)
        for q, tokens in enumerate(queries):
            words, times = np.unique(np.asarray(tokens, np.int64), return_counts=True)
            self.weights[self._column[words], q] = times * idf[words]

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """float64 [Q]. The sum runs in token order, so a sequence's score does not depend on its neighbours."""
        columns = self._column[tokens]
        return self.weights[np.unique(columns[columns >= 0])].sum(axis=0)


def top_matches(
    sequences: Iterable[tuple[int, np.ndarray]], queries: Sequence[np.ndarray], idf: np.ndarray, k: int
) -> list[Matches]:
    """Every query's k best sequences, in one pass over (sequence_id, token ids).

    Memory: idf's V, Q scores for a block of sequences, and at most 2 k rows per query.
    """
    weights = QueryWeights(queries, idf)
    kept = [_Best(k) for _ in queries]
    stream = iter(sequences)
    while block := list(islice(stream, _BLOCK)):
        ids = np.array([sequence_id for sequence_id, _ in block], np.int64)
        scores = np.stack([weights.score(tokens) for _, tokens in block])
        for q, rows in enumerate(kept):
            rows.add(ids, scores[:, q])
    return [rows.result() for rows in kept]


class _Best:
    """The best k rows so far; rows that cannot enter are dropped at once, the rest sorted out k at a time."""

    def __init__(self, k: int) -> None:
        assert k > 0, f"k={k}"
        self.k = k
        self._held = Matches(np.empty(0, np.int64), np.empty(0, np.float64))
        self._waiting: list[Matches] = []
        self._number_waiting = 0

    def add(self, sequence_ids: np.ndarray, scores: np.ndarray) -> None:
        if len(self._held) == self.k:
            last_id, last = self._held.sequence_ids[-1], self._held.scores[-1]
            enters = (scores > last) | ((scores == last) & (sequence_ids < last_id))
            sequence_ids, scores = sequence_ids[enters], scores[enters]
        if not len(sequence_ids):
            return
        self._waiting.append(best(sequence_ids, scores, self.k))
        self._number_waiting += len(self._waiting[-1])
        if self._number_waiting >= self.k:
            self._sort_out()

    def result(self) -> Matches:
        self._sort_out()
        return self._held

    def _sort_out(self) -> None:
        self._held = merge([self._held, *self._waiting], self.k)
        self._waiting, self._number_waiting = [], 0
