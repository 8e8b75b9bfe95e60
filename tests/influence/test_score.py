"""Scores: the same whether by low rank, full rank, token or definition, and whatever else is in the batch."""

import pytest
import torch
from torch import Tensor

from infscan.influence.compress import truncate
from infscan.influence.score import LayerQueries, score_layer, score_tokens
from tests.influence.factors import normal

B, T, O, I, Q = 4, 6, 5, 7, 3


def tokens() -> tuple[Tensor, Tensor]:
    return normal(0, B, T, O), normal(1, B, T, I)


def low_rank(P_qoi: Tensor, rank: int) -> LayerQueries:
    return LayerQueries.low_rank(*truncate(P_qoi, rank))


def test_the_score_is_the_product_with_the_gradient() -> None:
    s_bto, a_bti = tokens()
    P_qoi = normal(2, Q, O, I)
    expected = torch.stack(
        [
            torch.stack([(P_oi * (s_to.T @ a_ti)).sum() for P_oi in P_qoi])
            for s_to, a_ti in zip(s_bto, a_bti, strict=True)
        ]
    )
    torch.testing.assert_close(score_layer(s_bto, a_bti, LayerQueries.full(P_qoi)), expected)
    torch.testing.assert_close(score_layer(s_bto, a_bti, low_rank(P_qoi, min(O, I))), expected)


def test_low_rank_scores_are_those_of_the_truncated_gradients() -> None:
    s_bto, a_bti = tokens()
    U_qor, V_qir = truncate(normal(2, Q, O, I), 2)
    full = LayerQueries.full(U_qor @ V_qir.transpose(1, 2))
    torch.testing.assert_close(
        score_layer(s_bto, a_bti, LayerQueries.low_rank(U_qor, V_qir)), score_layer(s_bto, a_bti, full)
    )


def test_token_scores_add_up_to_the_sequences_score() -> None:
    s_bto, a_bti = tokens()
    P_qoi = normal(2, Q, O, I)
    scores_bq = score_layer(s_bto, a_bti, LayerQueries.full(P_qoi))
    for query in range(Q):
        torch.testing.assert_close(score_tokens(s_bto, a_bti, P_qoi[query]).sum(dim=1), scores_bq[:, query])


@pytest.mark.parametrize("rank", [None, 2])
def test_other_sequences_and_padding_change_nothing(rank: int | None) -> None:
    s_bto, a_bti = tokens()
    P_qoi = normal(2, Q, O, I)
    queries = LayerQueries.full(P_qoi) if rank is None else low_rank(P_qoi, rank)
    together = score_layer(s_bto, a_bti, queries)
    alone = torch.cat([score_layer(s_bto[row : row + 1], a_bti[row : row + 1], queries) for row in range(B)])
    padded = score_layer(
        torch.cat([s_bto, torch.zeros(B, 4, O, dtype=s_bto.dtype)], dim=1),
        torch.cat([a_bti, torch.zeros(B, 4, I, dtype=a_bti.dtype)], dim=1),
        queries,
    )
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together, padded)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_querys_score_does_not_depend_on_the_other_queries(rank: int | None) -> None:
    s_bto, a_bti = tokens()
    P_qoi = normal(2, Q, O, I)
    make = LayerQueries.full if rank is None else lambda P: low_rank(P, rank)
    together = score_layer(s_bto, a_bti, make(P_qoi))
    alone = torch.cat([score_layer(s_bto, a_bti, make(P_qoi[query : query + 1])) for query in range(Q)], dim=1)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("rank", [None, 2])
def test_low_precision_inputs_give_wide_scores(rank: int | None) -> None:
    s_bto, a_bti = (x.to(torch.bfloat16) for x in tokens())
    P_qoi = normal(2, Q, O, I, dtype=torch.bfloat16)
    queries = LayerQueries.full(P_qoi) if rank is None else low_rank(P_qoi, rank)
    wide = LayerQueries.full(P_qoi.double()) if rank is None else low_rank(P_qoi.double(), rank)
    scores = score_layer(s_bto, a_bti, queries)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), score_layer(s_bto.double(), a_bti.double(), wide), rtol=0.05, atol=0.5)
    assert score_tokens(s_bto, a_bti, P_qoi[0]).dtype == torch.float32
