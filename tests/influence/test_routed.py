"""An expert's tokens, some of each sequence's, give what a grid gives that is zero where a token went elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infscan.influence.blocks import BlockDiagonal
from infscan.influence.eigenbasis import add_squared_gradients
from infscan.influence.routed import Routed
from infscan.influence.score import LayerQueries, score_layer, score_routed_tokens, score_tokens
from tests.influence.factors import normal

O, I, Q = 5, 4, 3


def case(reached: list[list[bool]]) -> tuple[Routed, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(routed, its tokens' s and a, the grid's s and a): a token that is not reached is zero in the grid."""
    reached_bt = torch.tensor(reached)
    B, T = reached_bt.shape
    s_bto, a_bti = normal(0, B, T, O) * reached_bt[..., None], normal(1, B, T, I) * reached_bt[..., None]
    routed = Routed(reached_bt.flatten().nonzero().squeeze(1), B, T)
    return routed, (routed.of(s_bto), routed.of(a_bti)), (s_bto, a_bti)


grids = st.integers(1, 4).flatmap(
    lambda T: st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=1, max_size=4)
)


def ways() -> dict[str, LayerQueries]:
    U_xo, V_xi = normal(2, 2 * Q, O), normal(3, 2 * Q, I)
    P_qoi, K_qmn = normal(4, Q, O, I), normal(5, Q, 2, 3)
    return {
        "columns": LayerQueries.factored(U_xo, V_xi, (2,) * Q),
        "ragged columns": LayerQueries.factored(U_xo, V_xi, (1, 3, 2)),
        "matrices": LayerQueries.dense(P_qoi),
        "shared basis": LayerQueries.shared_basis(K_qmn, normal(6, 2, O), normal(7, 3, I)),
    }


@pytest.mark.parametrize("way", list(ways()))
@given(grids)
@settings(deadline=None, max_examples=30)
def test_scores_are_the_grids(way: str, reached: list[list[bool]]) -> None:
    routed, (s_mo, a_mi), (s_bto, a_bti) = case(reached)
    queries = ways()[way]
    torch.testing.assert_close(score_layer(s_mo, a_mi, queries, routed), score_layer(s_bto, a_bti, queries))


@pytest.mark.parametrize("way", ["columns", "matrices"])
@given(grids)
@settings(deadline=None, max_examples=30)
def test_a_biass_one_may_be_left_out(way: str, reached: list[list[bool]]) -> None:
    routed, (s_mo, a_mi), _ = case(reached)
    queries = ways()["columns"] if way == "columns" else LayerQueries.dense(normal(4, Q, O, I), bias=True)
    with_one = torch.cat([a_mi[:, :-1], torch.ones(len(a_mi), 1, dtype=a_mi.dtype)], dim=1)
    torch.testing.assert_close(
        score_layer(s_mo, a_mi[:, :-1], queries, routed), score_layer(s_mo, with_one, queries, routed)
    )


@given(grids, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_scores_of_tokens_are_the_grids_at_the_sequences_asked_for(reached: list[list[bool]], chance: object) -> None:
    routed, (s_mo, a_mi), (s_bto, a_bti) = case(reached)
    rows = chance.sample(range(routed.B), chance.randint(1, routed.B))  # type: ignore[attr-defined]
    rows_n, P_oi = torch.tensor(rows), normal(4, O, I)
    found = score_routed_tokens(s_mo, a_mi, P_oi, routed, rows_n)
    torch.testing.assert_close(found, score_tokens(s_bto[rows_n], a_bti[rows_n], P_oi))


@given(grids)
@settings(deadline=None, max_examples=30)
def test_each_sequences_gradient_is_of_its_own_tokens(reached: list[list[bool]]) -> None:
    routed, (s_mo, a_mi), (s_bto, a_bti) = case(reached)
    g_boi = s_bto.transpose(1, 2) @ a_bti
    torch.testing.assert_close(routed.gradients(s_mo, a_mi), g_boi)
    Q_S, Q_A = (BlockDiagonal((torch.linalg.qr(normal(8, n, n))[0],)) for n in (O, I))
    Lambda_oi = torch.zeros(O, I, dtype=torch.float64)
    for _, mine in routed.segments():
        add_squared_gradients(Lambda_oi, s_mo[None, mine], a_mi[None, mine], Q_S, Q_A)
    torch.testing.assert_close(Lambda_oi, (Q_S.T @ g_boi @ Q_A).square().sum(dim=0))
