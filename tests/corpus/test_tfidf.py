"""The TF-IDF filter against its formula (docs/method.md#tf-idf) written out word by word."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.corpus.tfidf import document_frequencies, merge, top_matches, words

V = 12
tokens = st.lists(st.integers(0, V - 1), max_size=10)
corpora = st.lists(tokens, min_size=1, max_size=25)
queries = st.lists(tokens, min_size=1, max_size=4)


def arrays(rows: list[list[int]]) -> list[np.ndarray]:
    return [np.array(row, np.int64) for row in rows]


def by_the_book(corpus: list[list[int]], query: list[int]) -> list[tuple[float, int]]:
    """(-score, sequence_id) of every sequence, best first."""

    def idf(word: int) -> float:
        containing = sum(word in sequence for sequence in corpus)
        return math.log((len(corpus) - containing + 0.5) / (containing + 0.5) + 1)

    return sorted(
        (-sum(idf(word) for word in query if word in sequence), number) for number, sequence in enumerate(corpus)
    )


@given(corpora, queries, st.integers(1, 30))
def test_scores_and_order_are_the_formulas(corpus: list[list[int]], asked: list[list[int]], k: int) -> None:
    idf = document_frequencies(arrays(corpus), V).idf()
    for query, matches in zip(asked, top_matches(enumerate(arrays(corpus)), arrays(asked), idf, k), strict=True):
        expected = by_the_book(corpus, query)
        scores = {number: -score for score, number in expected}
        assert len(matches) == min(k, len(corpus))
        assert matches.scores == pytest.approx([-score for score, _ in expected[:k]])
        assert matches.scores == pytest.approx([scores[int(number)] for number in matches.sequence_ids])
        order = list(zip((-matches.scores).tolist(), matches.sequence_ids.tolist(), strict=True))
        assert order == sorted(order)


@given(corpora, queries, st.integers(1, 6), st.integers(0, 25))
def test_parts_of_a_corpus_merge_to_the_whole(
    corpus: list[list[int]], asked: list[list[int]], k: int, cut: int
) -> None:
    rows = list(enumerate(arrays(corpus)))
    halves = rows[:cut], rows[cut:]
    frequencies = [document_frequencies((tokens for _, tokens in half), V) for half in halves]
    whole = document_frequencies(arrays(corpus), V)
    joined = frequencies[0] + frequencies[1]
    assert joined.sequences == whole.sequences
    assert np.array_equal(joined.counts, whole.counts)

    idf = whole.idf()
    parts = [top_matches(half, arrays(asked), idf, k) for half in reversed(halves)]
    for one, two, all_at_once in zip(*parts, top_matches(rows, arrays(asked), idf, k), strict=True):
        merged = merge([one, two], k)
        assert np.array_equal(merged.sequence_ids, all_at_once.sequence_ids)
        assert np.array_equal(merged.scores, all_at_once.scores)


def test_many_blocks_with_ties_keep_the_lowest_ids_in_any_order_of_arrival() -> None:
    rng = np.random.default_rng(0)
    rows = [(number, rng.integers(0, V, 2)) for number in range(5000)]
    idf = document_frequencies((tokens for _, tokens in rows), V).idf()
    asked = arrays([[1, 2], [3, 3, 4]])
    forward = top_matches(rows, asked, idf, 70)
    backward = top_matches(reversed(rows), asked, idf, 70)
    for one, two in zip(forward, backward, strict=True):
        assert np.array_equal(one.sequence_ids, two.sequence_ids)
        tied = one.sequence_ids[one.scores == one.scores[0]]
        assert np.array_equal(tied, np.sort(tied))


def test_repeated_tokens_of_the_query_count_and_of_the_sequence_do_not() -> None:
    corpus = arrays([[1, 1, 1], [1], [2]])
    idf = document_frequencies(corpus, V).idf()
    once, twice = top_matches(enumerate(corpus), arrays([[1], [1, 1]]), idf, 3)
    assert once.sequence_ids.tolist() == [0, 1, 2]
    assert once.scores[0] == once.scores[1] == pytest.approx(math.log(1.5 / 2.5 + 1))
    assert twice.scores.tolist() == (2 * once.scores).tolist()


def test_a_contrast_adds_the_words_that_are_its_own() -> None:
    """Prompt 1 2 1 with the completion 3 against 4 4: the prompt counts once, and both answers' words do."""
    assert words([np.asarray([1, 2, 1, 3]), np.asarray([1, 2, 1, 4, 4])]).tolist() == [1, 1, 2, 3, 4, 4]
    assert words([np.asarray([1, 2, 1, 3])]).tolist() == [1, 2, 1, 3]
