"""What a removal takes away: the strongest tokens or documents, no more, and the rest keeps its loss."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from infscan_studies.token_removal import (
    DOCUMENTS,
    RANDOM_DOCUMENTS,
    RANDOM_TOKENS,
    TOKENS,
    removed,
    summary,
    without_documents,
    without_tokens,
)


def test_the_strongest_tokens_lose_their_loss_and_the_first_has_none_to_lose() -> None:
    influence = [np.asarray([9.0, 1.0, 5.0]), np.asarray([9.0, 4.0]), np.asarray([9.0, 5.0, -7.0, 0.0])]
    losses = without_tokens(influence, 3)
    assert [one.tolist() for one in losses] == [[True, True, False], [True, False], [True, False, True, True]]
    assert removed(losses) == 3


def test_the_strongest_documents_lose_all_their_losses() -> None:
    losses = without_documents(np.asarray([1.0, 3.0, 2.0]), [3, 2, 4], 2)
    assert [one.tolist() for one in losses] == [[True] * 3, [True, False], [True, False, False, False]]
    assert removed(losses) == 4


def test_the_ratio_is_of_falls_beyond_a_random_removal_per_removed_token() -> None:
    def rows(name: str, tokens: int, fall: float) -> list[dict[str, object]]:
        return [
            {"removed": name, "share": 0.01, "seed": seed, "tokens": tokens, "fall": [fall, fall]} for seed in range(2)
        ]

    table = pa.Table.from_pylist(
        rows(TOKENS, 10, 3.0)
        + rows(DOCUMENTS, 20, 2.0)
        + rows(RANDOM_TOKENS, 10, 1.0)
        + rows(RANDOM_DOCUMENTS, 20, 1.0)
    )
    (line,) = summary(table, 50)
    # 2 nats by 10 tokens against 1 nat by 20.
    assert "per token 4.0 times as much, at least 4.0" in line
    assert "tokens (10): +2.000 nats" in line


@pytest.mark.parametrize("count", [0, 6])
def test_counts_add_up(count: int) -> None:
    influence = [np.arange(4.0), np.arange(5.0)]
    assert removed(without_tokens(influence, count)) == count
