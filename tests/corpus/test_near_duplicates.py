"""Near-duplicates: what is shared counts wherever it stands, and what is not does not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infscan.corpus.near_duplicates import carrying, near_duplicates
from infscan.errors import ConfigError


def drawn(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, length)


def by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """The similarity, span by span."""

    def covered(mine: np.ndarray, other: np.ndarray) -> int:
        spans = {tuple(other[start : start + 5]) for start in range(len(other) - 4)}
        inside = [start for start in range(len(mine) - 4) if tuple(mine[start : start + 5]) in spans]
        return len({start + offset for start in inside for offset in range(5)})

    shorter, longer = sorted((len(x), len(y)))
    return min(covered(x, y), covered(y, x)) / min(longer, max(shorter, 50))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), threshold=st.sampled_from([0.3, 0.8, 1.0]), vocabulary=st.sampled_from([2, 1000]))
def test_every_text_goes_to_the_first_lead_that_it_is_like(seed: int, threshold: float, vocabulary: int) -> None:
    draw = np.random.default_rng(seed)
    texts = [draw.integers(0, vocabulary, draw.integers(5, 90)) for _ in range(5)]
    for original in range(3):
        # From a few tokens changed to most of them, and moved.
        changed = 4 + 25 * original
        texts += [np.concatenate([draw.integers(0, vocabulary, changed), texts[original][changed // 2 :]])]
    expected: list[int] = []
    for number, text in enumerate(texts):
        leads = [lead for lead in range(number) if expected[lead] == lead]
        expected.append(next((lead for lead in leads if by_hand(texts[lead], text) >= threshold), number))
    assert near_duplicates(texts, threshold) == expected


@pytest.mark.parametrize("shift", [40, 64, 100])
def test_the_same_text_cut_elsewhere_is_folded(shift: int) -> None:
    stream = drawn(0, 700)
    assert near_duplicates([stream[:512], stream[shift : shift + 512]]) == [0, 0]


def test_one_document_at_two_offsets_of_packed_sequences_is_folded() -> None:
    """By the document that the influence comes from: the sequences have little more than half in common."""
    document = drawn(0, 300)
    first = np.concatenate([drawn(1, 100), document, drawn(2, 112)])
    second = np.concatenate([drawn(3, 12), document, drawn(4, 200)])
    assert near_duplicates([first, second]) == [0, 1]

    def piece(sequence: np.ndarray, start: int) -> np.ndarray:
        bounds = [0, start, start + 300, 512]
        documents = [{"start": low, "end": high} for low, high in pairwise(bounds)]
        scores = np.full(512, 0.01, np.float32)
        scores[start : start + 300] = -0.5
        return sequence[carrying(documents, scores)]

    assert near_duplicates([piece(first, 100), piece(second, 12)]) == [0, 0]
    # Its beginning alone, where the other sequence has all of it.
    assert near_duplicates([piece(first, 100), document[:90]]) == [0, 0]


def test_a_short_quotation_is_no_copy_of_what_it_stands_in() -> None:
    quoted = drawn(0, 30)
    assert near_duplicates([np.concatenate([drawn(1, 200), quoted]), quoted, quoted.copy()]) == [0, 1, 1]


def test_a_repeated_token_shares_as_many_as_the_other_has() -> None:
    blank = np.full(100, 7)
    assert near_duplicates([np.concatenate([drawn(0, 94), blank[:6]]), blank]) == [0, 1]


def test_texts_shorter_than_a_span_are_alike_where_they_are_equal() -> None:
    short = [np.asarray(ids, np.int64) for ids in ([1, 2], [1, 2], [2, 1], [1, 2, 3])]
    assert near_duplicates(short) == [0, 0, 2, 3]
    assert near_duplicates([]) == []


def test_without_documents_all_tokens_carry_the_influence() -> None:
    assert carrying([], np.ones(3, np.float32)) == slice(None)


@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_a_similarity_that_is_none_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"above 0 and up to 1"):
        near_duplicates([], threshold)
