"""The TF-IDF filter (docs/method.md#tf-idf): which sequences share rare tokens with a query. Numpy, bounded memory.

    IDF(w) = log((C - n_w + 0.5) / (n_w + 0.5) + 1)      C sequences, n_w of them containing w
    score(z) = sum over the query's tokens w, with multiplicity, that are present in z of IDF(w)

IDF is rounded to a multiple of 2^-32 (an error of 1.2e-10 at most). Sums of such numbers are exact in float64, so a
score depends on no order of summation, no batch and no number of workers, and ties are ties.

A sequence that shares no token with the query scores 0: influence across languages or paraphrases is missed by design.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from infscan.corpus.sequences import TokenBlock

_BLOCK = 1024
_UNIT = 2.0**-32
# Entries of the matrix that says which of the queries' tokens a sequence has: 32 MiB.
_PRESENCE = 1 << 22


@dataclass(frozen=True, eq=False)
class DocumentFrequencies:
    """In how many of `sequences` sequences each token occurs: counts is int64 [V]. Parts of a corpus add up."""

    sequences: int
    counts: np.ndarray

    def __add__(self, other: DocumentFrequencies) -> DocumentFrequencies:
        return DocumentFrequencies(self.sequences + other.sequences, self.counts + other.counts)

    def idf(self) -> np.ndarray:
        """float64 [V], all positive, multiples of 2^-32."""
        exact = np.log((self.sequences - self.counts + 0.5) / (self.counts + 0.5) + 1.0)
        return np.maximum(np.rint(exact / _UNIT), 1.0) * _UNIT


def block_of(sequences: Sequence[np.ndarray]) -> TokenBlock:
    """Token ids of several sequences as one block."""
    offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    return TokenBlock(np.concatenate(sequences) if sequences else np.empty(0, np.int64), offsets)


def block_frequencies(block: TokenBlock, vocab_size: int) -> DocumentFrequencies:
    """Of a block of sequences: each row sorted, and counted where it differs from its neighbour."""
    lengths = np.diff(block.offsets)
    rows_st = np.full((len(block), int(lengths.max(initial=0)) + 1), vocab_size, np.int32)
    rows_st[np.arange(rows_st.shape[1]) < lengths[:, None]] = block.tokens
    rows_st.sort(axis=1)
    # The last column is padding, so that a row's last token differs from its neighbour too.
    kept = rows_st[:, :-1][rows_st[:, :-1] != rows_st[:, 1:]]
    return DocumentFrequencies(len(block), np.bincount(kept, minlength=vocab_size + 1)[:vocab_size].astype(np.int64))


def document_frequencies(sequences: Iterable[np.ndarray], vocab_size: int) -> DocumentFrequencies:
    """Count over sequences of token ids in [0, vocab_size)."""
    found = DocumentFrequencies(0, np.zeros(vocab_size, np.int64))
    stream = iter(sequences)
    while block := list(islice(stream, _BLOCK)):
        found += block_frequencies(block_of(block), vocab_size)
    return found


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


def words(parts: Sequence[np.ndarray]) -> np.ndarray:
    """A query's tokens: each as often as the part that has it most often, so that a contrast adds what is its own.

    parts: token ids of prompt and completion, and of prompt and contrast.
    """
    if len(parts) == 1:
        return parts[0]
    tokens, which = np.unique(np.concatenate(parts), return_inverse=True)
    edges = np.cumsum([len(part) for part in parts])[:-1]
    times = [np.bincount(mine, minlength=len(tokens)) for mine in np.split(which, edges)]
    return np.repeat(tokens, np.max(times, axis=0))


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

    def score(self, block: TokenBlock) -> np.ndarray:
        """float64 [B, Q], exact: the product of which tokens a sequence has (0 or 1) and what they weigh."""
        used = self.weights.shape[0]
        step = max(1, _PRESENCE // max(used, 1))
        pieces = [np.empty((0, self.weights.shape[1]))]
        for start in range(0, len(block), step):
            part = block.part(start, min(start + step, len(block)))
            columns = self._column[part.tokens]
            rows = np.repeat(np.arange(len(part)), np.diff(part.offsets))
            hit = columns >= 0
            present_bu = np.zeros((len(part), used))
            present_bu.ravel()[rows[hit] * used + columns[hit]] = 1.0
            pieces.append(present_bu @ self.weights)
        return np.concatenate(pieces)


def top_matches(
    sequences: Iterable[tuple[int, np.ndarray]], queries: Sequence[np.ndarray], idf: np.ndarray, k: int
) -> list[Matches]:
    """Every query's k best sequences, in one pass over (sequence_id, token ids).

    Memory: idf's V, Q scores for a block of sequences, and at most 2 k rows per query.
    """
    best_rows = TopMatches(queries, idf, k)
    stream = iter(sequences)
    while block := list(islice(stream, _BLOCK)):
        ids = np.array([sequence_id for sequence_id, _ in block], np.int64)
        best_rows.add(ids, block_of([tokens for _, tokens in block]))
    return best_rows.result()


class TopMatches:
    """Every query's k best sequences of the blocks that were added.

    known: for each query the last of k rows found elsewhere; what is strictly worse is dropped.
    """

    def __init__(
        self, queries: Sequence[np.ndarray], idf: np.ndarray, k: int, known: Sequence[tuple[float, int] | None] = ()
    ) -> None:
        self._weights = QueryWeights(queries, idf)
        self._kept = [_Best(k) for _ in queries]
        self._known = list(known) or [None] * len(queries)

    def add(self, sequence_ids: np.ndarray, block: TokenBlock) -> None:
        scores_bq = self._weights.score(block)
        for q, rows in enumerate(self._kept):
            ids, scores = sequence_ids, scores_bq[:, q]
            known = self._known[q]
            if known is not None:
                enters = (scores > known[0]) | ((scores == known[0]) & (ids <= known[1]))
                ids, scores = ids[enters], scores[enters]
            rows.add(ids, scores)

    def result(self) -> list[Matches]:
        return [rows.result() for rows in self._kept]


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
