"""Block-diagonal matrices: products with the dense matrix, cuts that cover, and one block that changes no bit."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from infscan.influence.blocks import BlockDiagonal, block_sizes
from infscan.influence.eigenbasis import add_squared_gradients, eigenbasis
from infscan.influence.inverse import from_core, inverse_core
from infscan.influence.layers import LayerFactors
from tests.influence.factors import covariance, diagonal_blocks, make_factors, normal

_CUTS = st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
TIGHT = {"rtol": 1e-8, "atol": 1e-8}


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_sizes_cover_in_near_equal_parts(cut: tuple[int, int]) -> None:
    n, blocks = cut
    sizes = block_sizes(n, blocks)
    assert len(sizes) == blocks
    assert sum(sizes) == n
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert sizes == [len(part) for part in torch.arange(n).tensor_split(blocks)]


@given(_CUTS, st.integers(0, 9))
def test_products_are_those_of_the_dense_matrix(cut: tuple[int, int], seed: int) -> None:
    n, blocks = cut
    M = diagonal_blocks(normal(seed, n, n), blocks)
    x, y = normal(seed + 1, 2, 3, n), normal(seed + 2, 2, n, 3)
    torch.testing.assert_close(x @ M, x @ M.dense())
    torch.testing.assert_close(M @ y, M.dense() @ y)
    assert torch.equal(M.T.dense(), M.dense().T)
    assert M.sizes == block_sizes(n, blocks)


@given(_CUTS, _CUTS, st.integers(0, 9))
def test_rotating_there_and_back_is_the_identity(O_cut: tuple[int, int], I_cut: tuple[int, int], seed: int) -> None:
    """Q_S^T V Q_A, then Q_S C Q_A^T: no entry of V is lost, whichever pair of blocks it lies in."""
    (O, O_blocks), (I, I_blocks) = O_cut, I_cut
    _, Q_S = eigenbasis(diagonal_blocks(covariance(seed, O), O_blocks), "S")
    _, Q_A = eigenbasis(diagonal_blocks(covariance(seed + 1, I), I_blocks), "A")
    V_qoi = normal(seed + 2, 2, O, I)
    torch.testing.assert_close(Q_S @ (Q_S.T @ V_qoi @ Q_A) @ Q_A.T, V_qoi)


def test_one_block_is_the_block_bit_for_bit() -> None:
    Q, x_btn, M_qnm = normal(0, 33, 33).float(), normal(1, 3, 50, 33).float(), normal(2, 4, 33, 20).float()
    one = BlockDiagonal((Q,))
    for ours, plain in ((x_btn @ one, x_btn @ Q), (one @ M_qnm, Q @ M_qnm), (one.T @ M_qnm, Q.T @ M_qnm)):
        assert torch.equal(ours, plain)
        assert ours.stride() == plain.stride()


def test_several_blocks_are_the_dense_algebra_of_masked_moments() -> None:
    """A whole fit from tokens, against the eigenvectors of dense masked A and S and the explicit inverse of G."""
    O, I, N, T, lam = 5, 7, 60, 3, 0.01
    s_bto, a_bti = normal(1, N, T, O), normal(2, N, T, I)
    ours = make_factors(0, O, I, blocks=2)
    Lambda = torch.zeros(O, I, dtype=torch.float64)
    add_squared_gradients(Lambda, s_bto, a_bti, ours.Q_S, ours.Q_A)
    ours = LayerFactors(**vars(ours) | {"Lambda": Lambda / N})

    S_values, Q_S = torch.linalg.eigh(ours.S.dense())
    A_values, Q_A = torch.linalg.eigh(ours.A.dense())
    torch.testing.assert_close(ours.S_eigenvalues.sort().values, S_values, **TIGHT)
    torch.testing.assert_close(ours.A_eigenvalues.sort().values, A_values, **TIGHT)
    g_noi = s_bto.transpose(1, 2) @ a_bti
    basis = torch.kron(Q_S, Q_A)
    squares = (g_noi.flatten(1) @ basis).square().mean(dim=0)
    G = (basis * (squares + lam)) @ basis.T
    V_qoi = normal(3, 2, O, I)
    dense = torch.linalg.solve(G, V_qoi.flatten(1).T).T.view(2, O, I)
    torch.testing.assert_close(from_core(inverse_core(V_qoi, ours, lam), ours), dense, **TIGHT)
