"""Scores: the same whether by low rank, full rank, token or definition, and whatever else is in the batch."""

import pytest
import torch
from torch import Tensor

from infscan.influence import score
from infscan.influence.compress import compress
from infscan.influence.score import LayerQueries, Scratch, score_layer, score_tokens
from tests.influence.factors import normal

B, T, O, I, Q = 4, 6, 5, 7, 3


def tokens() -> tuple[Tensor, Tensor]:
    return normal(0, B, T, O), normal(1, B, T, I)


def low_rank(P_qoi: Tensor, rank: int) -> LayerQueries:
    return from_pairs(truncated(P_qoi, [rank] * len(P_qoi)))


def truncated(P_qoi: Tensor, ranks: list[int]) -> list[tuple[Tensor, Tensor]]:
    found = [compress(P_oi, rank) for P_oi, rank in zip(P_qoi, ranks, strict=True)]
    return [(one.U_or, one.V_ir) for one in found]


def from_pairs(pairs: list[tuple[Tensor, Tensor]]) -> LayerQueries:
    U_xo, V_xi = (torch.cat([pair[side].T for pair in pairs]) for side in (0, 1))
    return LayerQueries.factored(U_xo, V_xi, [pair[0].shape[1] for pair in pairs])


def test_the_score_is_the_product_with_the_gradient() -> None:
    s_bto, a_bti = tokens()
    P_qoi = normal(2, Q, O, I)
    expected = torch.stack(
        [
            torch.stack([(P_oi * (s_to.T @ a_ti)).sum() for P_oi in P_qoi])
            for s_to, a_ti in zip(s_bto, a_bti, strict=True)
        ]
    )
    torch.testing.assert_close(score_layer(s_bto, a_bti, LayerQueries.dense(P_qoi)), expected)
    torch.testing.assert_close(score_layer(s_bto, a_bti, low_rank(P_qoi, min(O, I))), expected)


@pytest.mark.parametrize("ranks", [[2, 2, 2], [3, 0, 1], [0, 0, 0]])
def test_low_rank_scores_are_those_of_the_truncated_gradients(
    ranks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    s_bto, a_bti = tokens()
    pairs = truncated(normal(2, Q, O, I), ranks)
    full = score_layer(s_bto, a_bti, LayerQueries.dense(torch.stack([U_or @ V_ir.T for U_or, V_ir in pairs])))
    torch.testing.assert_close(score_layer(s_bto, a_bti, from_pairs(pairs)), full)
    monkeypatch.setattr(score, "_COLUMNS", 2)  # cut in the middle of a query's columns
    torch.testing.assert_close(score_layer(s_bto, a_bti, from_pairs(pairs)), full)


@pytest.mark.parametrize("way", ["factored", "dense", "shared basis", "outputs projected", "inputs projected"])
def test_a_biass_1_may_be_left_out(way: str) -> None:
    s_bto, a_bti = tokens()
    a_bti[..., -1] = 1
    s_bto[1, 3:] = 0
    a_bti[1, 3:] = 0
    P_qoi = normal(2, Q, O, I)
    B_mo, B_ni = normal(3, 2, O), normal(4, 3, I)
    queries = {
        "factored": low_rank(P_qoi, 2),
        "dense": LayerQueries.dense(P_qoi, bias=True),
        "shared basis": LayerQueries.shared_basis(normal(5, Q, 2, 3), B_mo, B_ni, bias=True),
        "outputs projected": LayerQueries.shared_basis(normal(5, Q, 2, I), B_mo, None, Scratch(), bias=True),
        "inputs projected": LayerQueries.shared_basis(normal(5, Q, O, 3), None, B_ni, Scratch(), bias=True),
    }[way]
    whole = LayerQueries.dense(queries.densify())
    assert (queries.inputs, whole.inputs) == (I, I)
    expected = score_layer(s_bto, a_bti, whole)
    torch.testing.assert_close(score_layer(s_bto, a_bti, queries), expected)
    torch.testing.assert_close(score_layer(s_bto, a_bti[..., :-1], queries), expected)


def test_a_scratch_serves_every_layer_and_dtype_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch()
    layers = [(normal(0, B, T, o), normal(1, B, T, i), normal(2, Q, o, i)) for o, i in ((O, I), (2, 3), (I, O))]
    s_bto, a_bti, P_qoi = layers[0]
    layers.append((s_bto.bfloat16(), a_bti.bfloat16(), P_qoi.bfloat16()))
    for at_once in (1, 3, B):
        monkeypatch.setattr(score, "_FORMED_ENTRIES", at_once * O * I)
        for s_bto, a_bti, P_qoi in (*layers, layers[0]):
            found = score_layer(s_bto, a_bti, LayerQueries.dense(P_qoi, scratch))
            torch.testing.assert_close(found, score_layer(s_bto, a_bti, LayerQueries.dense(P_qoi)), rtol=0, atol=0)
            exact = torch.einsum("bto,bti,qoi->bq", s_bto.double(), a_bti.double(), P_qoi.double())
            near = {"rtol": 0.05, "atol": 0.5} if P_qoi.dtype is torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
            torch.testing.assert_close(found.double(), exact, **near)
        assert scratch.nbytes == at_once * O * I * torch.float64.itemsize


def test_every_way_of_laying_out_densifies_to_what_it_stands_for() -> None:
    P_qoi = normal(2, Q, O, I)
    pairs = truncated(P_qoi, [1, 5, 3])
    B_mo, B_ni, K_qmn = normal(4, 2, O), normal(5, 3, I), normal(6, Q, 2, 3)
    assert LayerQueries.dense(P_qoi).densify() is P_qoi
    torch.testing.assert_close(from_pairs(pairs).densify(), torch.stack([U @ V.T for U, V in pairs]))
    shared = LayerQueries.shared_basis(K_qmn, B_mo, B_ni)
    torch.testing.assert_close(shared.densify(), B_mo.T @ K_qmn @ B_ni)
    for K, B_m, B_n in ((normal(6, Q, 2, I), B_mo, None), (normal(6, Q, O, 3), None, B_ni)):
        one_sided = LayerQueries.shared_basis(K, B_m, B_n, bias=True)
        expected = (K if B_m is None else B_m.T @ K) if B_n is None else K @ B_n
        torch.testing.assert_close(one_sided.densify(), expected)


def test_shared_basis_scores_are_those_of_the_products_they_stand_for() -> None:
    s_bto, a_bti = tokens()
    B_mo, B_ni, K_qmn = normal(3, 2, O), normal(4, 3, I), normal(5, Q, 2, 3)
    full = LayerQueries.dense(B_mo.T @ K_qmn @ B_ni)
    torch.testing.assert_close(
        score_layer(s_bto, a_bti, LayerQueries.shared_basis(K_qmn, B_mo, B_ni)), score_layer(s_bto, a_bti, full)
    )


def test_token_scores_add_up_to_the_sequences_score() -> None:
    s_bto, a_bti = tokens()
    P_qoi = normal(2, Q, O, I)
    scores_bq = score_layer(s_bto, a_bti, LayerQueries.dense(P_qoi))
    for query in range(Q):
        torch.testing.assert_close(score_tokens(s_bto, a_bti, P_qoi[query]).sum(dim=1), scores_bq[:, query])


def test_token_scores_take_a_1_that_is_left_out_as_read() -> None:
    s_bto, a_bti = tokens()
    P_oi = normal(2, O, I + 1)
    appended = torch.cat([a_bti, torch.ones_like(a_bti[..., :1])], dim=-1)
    torch.testing.assert_close(score_tokens(s_bto, a_bti, P_oi), score_tokens(s_bto, appended, P_oi))


@pytest.mark.parametrize("rank", [None, 2])
def test_other_sequences_and_padding_change_nothing(rank: int | None) -> None:
    s_bto, a_bti = tokens()
    P_qoi = normal(2, Q, O, I)
    queries = LayerQueries.dense(P_qoi) if rank is None else low_rank(P_qoi, rank)
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
    make = LayerQueries.dense if rank is None else lambda P: low_rank(P, rank)
    together = score_layer(s_bto, a_bti, make(P_qoi))
    alone = torch.cat([score_layer(s_bto, a_bti, make(P_qoi[query : query + 1])) for query in range(Q)], dim=1)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("way", ["factored", "dense", "shared basis"])
def test_products_are_in_the_queries_dtype_and_scores_in_the_models(way: str) -> None:
    s_bto, a_bti = (x.float() for x in tokens())
    P_qoi = normal(2, Q, O, I)

    def laid_out(dtype: torch.dtype) -> LayerQueries:
        if way == "factored":
            return low_rank(P_qoi.to(dtype), 2)
        if way == "dense":
            return LayerQueries.dense(P_qoi.to(dtype), Scratch(), bias=True)
        return LayerQueries.shared_basis(
            *(normal(n, *of).to(dtype) for n, of in ((5, (Q, 2, 3)), (3, (2, O)), (4, (3, I))))
        )

    narrow, wide = laid_out(torch.bfloat16), laid_out(torch.float64)
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float64)
    expected = score_layer(s_bto, a_bti, wide)
    found = score_layer(s_bto, a_bti, narrow)
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.02
    assert not torch.equal(found, score_layer(s_bto, a_bti, laid_out(torch.float32)))


@pytest.mark.parametrize("rank", [None, 2])
def test_low_precision_inputs_give_wide_scores(rank: int | None) -> None:
    s_bto, a_bti = (x.to(torch.bfloat16) for x in tokens())
    P_qoi = normal(2, Q, O, I, dtype=torch.bfloat16)
    queries = LayerQueries.dense(P_qoi) if rank is None else low_rank(P_qoi, rank)
    wide = LayerQueries.dense(P_qoi.double()) if rank is None else low_rank(P_qoi.double(), rank)
    scores = score_layer(s_bto, a_bti, queries)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), score_layer(s_bto.double(), a_bti.double(), wide), rtol=0.05, atol=0.5)
    assert score_tokens(s_bto, a_bti, P_qoi[0]).dtype == torch.float32


@pytest.mark.parametrize("splits", [1, 2, 8, 32])
def test_a_long_sum_that_is_split_is_the_product(splits: int) -> None:
    K_qx, g_cx = normal(0, Q, 64), normal(1, 2, 64)
    torch.testing.assert_close(score.long_product(K_qx, g_cx, splits), K_qx @ g_cx.T)
    # Its parts are views of what is there: nothing is copied.
    assert K_qx.view(Q, splits, -1).transpose(0, 1).data_ptr() == K_qx.data_ptr()
    low = score.long_product(K_qx.bfloat16(), g_cx.bfloat16(), splits)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), K_qx @ g_cx.T, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("rows", [1, 3, 128, 129, 1000, 40_000])
@pytest.mark.parametrize("columns", [1, 8, 200])
@pytest.mark.parametrize("x", [7, 4096, 8192, 768 * 2048, 4096 * 14336, 3 * 5 * 8192])
def test_a_sum_is_split_where_the_result_has_too_few_squares_for_a_gpu(rows: int, columns: int, x: int) -> None:
    def shaped(n: int) -> Tensor:
        return torch.empty(n, x, device="meta")

    splits = score.splits_of(shaped(rows), shaped(columns))
    squares = -(-rows // 128) * -(-columns // 128)
    assert x % splits == 0
    assert splits == 1 or (x // splits >= 4096 and splits * squares <= 256)
    if x == 4096 * 14336 and squares == 1:
        assert splits == 256


def test_shapes_alone_go_a_gpus_way_unless_they_have_a_cpus_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a rank's memory is weighed as its own device takes it."""
    split: list[int] = []
    own = score.long_product

    def long_product(K_qx: Tensor, g_cx: Tensor, splits: int) -> Tensor:
        split.append(splits)
        return own(K_qx, g_cx, splits)

    monkeypatch.setattr(score, "long_product", long_product)
    s, a, P = (torch.empty(*shape, device="meta") for shape in ((2, 4, 128), (2, 4, 256), (3, 128, 256)))
    assert score_layer(s, a, LayerQueries.dense(P)).shape == (2, 3)
    assert split == [8]
    assert score_layer(s, a, LayerQueries.dense(P, Scratch())).shape == (2, 3)
    assert score_layer(*tokens(), LayerQueries.dense(normal(2, Q, O, I))).shape == (B, Q)
    assert split == [8]
    # More sequences' matrices at once than a CPU forms.
    assert [score.formed_at_once(4096, 14336, on_cpu=on_cpu) for on_cpu in (True, False)] == [1, 9]
