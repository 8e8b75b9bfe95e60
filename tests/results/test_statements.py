"""Which rows state the completion, and which are near the top of whatever is asked."""

from __future__ import annotations

import numpy as np
import pytest

from infscan.results.statements import Asked, hubs, ranks_by_size

TEXTS = ["Its", " keeper", " was", " Ilsa", "bet", "  MAR", "ROW.", " Marrows"]
IDS = [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("completion", "token_ids", "texts", "place"),
    [
        (" Ilsabet Marrow", (0,), TEXTS, 3),
        (" Marrow", (0,), TEXTS, 5),
        # A part of a word states nothing, nor do words in another order.
        (" Mar", (0,), TEXTS, None),
        (" Marrow Ilsabet", (0,), TEXTS, None),
        (" ...", (0,), TEXTS, None),
        # Without text the tokens themselves are looked for.
        (None, (4, 5), TEXTS, 3),
        (" Ilsabet", (4, 5), None, 3),
        (None, (5, 4), None, None),
        (None, (1, 2, 3, 4, 5, 6, 7, 8, 9), None, None),
    ],
)
def test_a_row_states_a_completion_by_its_words_or_by_its_tokens(
    completion: str | None, token_ids: tuple[int, ...], texts: list[str] | None, place: int | None
) -> None:
    assert Asked("q", completion, token_ids).place(IDS, texts) == place


def test_a_hub_counts_other_questions_and_not_other_measurements_of_its_own() -> None:
    rows = [  # query, side, rank, sequence
        (0, 0, 1, 7), (1, 0, 1, 7), (2, 0, 10, 7), (3, 0, 11, 7), (4, 1, 1, 7), (2, 0, 1, 9),
    ]  # fmt: skip
    columns = np.asarray(rows, np.int64).T
    found = hubs(
        ["one", "one", "two", "three", "four"],
        columns[0].astype(np.int32),
        columns[1].astype(np.int8),
        columns[2].astype(np.int32),
        columns[3],
    )
    # Queries 0 and 1 are one question; rank 11 counts for nobody; the other side is counted apart.
    assert found.tolist() == [1, 1, 1, 2, 0, 0]


def test_ranks_by_size_go_over_both_sides_of_a_query() -> None:
    queries = np.asarray([0, 0, 0, 1, 1], np.int32)
    scores = np.asarray([-1.0, 5.0, -9.0, 2.0, 2.0], np.float32)
    assert ranks_by_size(queries, scores, np.asarray([1, 2, 3, 9, 4])).tolist() == [3, 2, 1, 2, 1]
