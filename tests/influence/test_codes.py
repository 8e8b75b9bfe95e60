"""Codes of whitened gradients: inner products are unbiased, exact at full width, and the packed ones equal floats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from infscan.influence import packed
from infscan.influence.codes import CodeSettings, Kind, kronecker_whitening, layer_code, random_frame
from infscan.influence.inverse import inverse_core
from infscan.influence.layers import Layer, LayerFactors
from infscan.influence.packed import Bits, QueryCodes, inner_products, store
from infscan.influence.routed import Routed
from tests.influence.factors import WIDE, make_factors, normal

O, I, T, B, Q = 12, 9, 7, 3, 2
LAYER = Layer("blocks.0.mlp", O, I, bias=True, input_of="blocks.0.mlp")
LAM = 0.05
KINDS: tuple[Kind, ...] = ("projected", "sketched")


def tokens() -> tuple[Tensor, Tensor]:
    """s [B, T, O] and a [B, T, I] of a layer with a bias, the second sequence padded."""
    s_bto, a_bti = normal(1, B, T, O), normal(2, B, T, I)
    a_bti[..., -1] = 1.0
    s_bto[1, 4:], a_bti[1, 4:] = 0, 0
    return s_bto, a_bti


def exact_scores(factors: LayerFactors | None) -> tuple[Tensor, Tensor]:
    """The queries' preconditioned cores [Q, O, I], and every sequence's exact score against them, [B, Q]."""
    s_bto, a_bti = tokens()
    g_boi = s_bto.transpose(1, 2) @ a_bti
    V_qoi = normal(3, Q, O, I)
    if factors is None:
        return V_qoi, torch.einsum("qoi,boi->bq", V_qoi, g_boi)
    C_qoi = inverse_core(V_qoi, factors, LAM)
    return C_qoi, torch.einsum("qoi,boi->bq", factors.Q_S @ C_qoi @ factors.Q_A.T, g_boi)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("whitened", [True, False])
def test_at_full_width_a_code_gives_the_exact_score(kind: Kind, blocks: int, whitened: bool) -> None:
    factors = make_factors(5, O, I, blocks=blocks) if whitened else None
    C_qoi, scores_bq = exact_scores(factors)
    code = layer_code(CodeSettings(kind, 64), LAYER, (factors, LAM) if factors else None, "cpu", WIDE)
    s_bto, a_bti = tokens()
    v_qd = code.of_query(C_qoi)
    assert v_qd.shape == (Q, O * I)
    torch.testing.assert_close(code.of_tokens(s_bto, a_bti) @ v_qd.T, scores_bq)
    # The 1 of the bias left out; and an expert's tokens, each sequence's some.
    torch.testing.assert_close(code.of_tokens(s_bto, a_bti[..., :-1]) @ v_qd.T, scores_bq)
    chosen = torch.nonzero((a_bti[..., -1] != 0).flatten()).flatten()
    routed = Routed(chosen, B, T)
    for given in (a_bti, a_bti[..., :-1]):
        u_bd = code.of_tokens(routed.of(s_bto), routed.of(given), routed)
        torch.testing.assert_close(u_bd @ v_qd.T, scores_bq)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_over_seeds(kind: Kind) -> None:
    factors = make_factors(5, O, I)
    C_qoi, scores_bq = exact_scores(factors)
    s_bto, a_bti = tokens()
    found = []
    for seed in range(400):
        settings = CodeSettings(kind, 4, seed=seed)
        code = layer_code(settings, LAYER, (factors, LAM), "cpu", WIDE)
        u_bd = code.of_tokens(s_bto, a_bti)
        assert u_bd.shape == (B, settings.coordinates(LAYER)) == (B, 16)
        found.append(u_bd @ code.of_query(C_qoi).T)
    found_sbq = torch.stack(found)
    error_bq = found_sbq.std(dim=0) / len(found) ** 0.5
    assert ((found_sbq.mean(dim=0) - scores_bq).abs() < 4 * error_bq).all()
    # The spread is real: a code that were exact would make this test empty.
    assert (found_sbq.std(dim=0) > 0.1 * scores_bq.abs().mean()).all()


def test_a_kronecker_lambda_is_whitened_exactly() -> None:
    factors = make_factors(7, O, I, kronecker=True)
    x_o, y_i = kronecker_whitening(factors.Lambda, 0.0)
    torch.testing.assert_close(x_o[:, None] * y_i, factors.Lambda.rsqrt())


def test_a_frame_is_one_everywhere_and_a_rotation_at_full_width() -> None:
    torch.testing.assert_close(
        torch.from_numpy(random_frame(6, 6, "a").T @ random_frame(6, 6, "a")), torch.eye(6).to(WIDE)
    )
    narrow = random_frame(8, 3, "a")
    np.testing.assert_allclose(narrow.T @ narrow, 8 / 3 * np.eye(3), atol=1e-12)
    # Its bits come from a counter and a key, not from a library's way of drawing.
    assert np.sign(narrow[:, 0]).tolist() == [-1, -1, -1, -1, -1, -1, -1, 1]
    assert not np.allclose(narrow, random_frame(8, 3, "b"))


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("D", [24, 37])
def test_packed_inner_products_equal_floats(bits: Bits, D: int) -> None:
    u_nd, v_qd = normal(11, 50, D).float().numpy(), normal(12, 3, D).float().numpy()
    kept, queries = store(u_nd, bits, entries=100), QueryCodes.of(v_qd, bits)
    assert kept.codes.shape == (50, -(-D * bits // 8))
    c_nd = np.where(u_nd >= 0, 1.0, -1.0) if bits == 1 else np.rint(u_nd / kept.scales[:, None])
    wanted = (kept.scales[:, None] * c_nd).astype(np.float64) @ queries.values.T.astype(np.float64)
    np.testing.assert_allclose(inner_products(kept.codes, kept.scales, queries), wanted, rtol=2e-6, atol=1e-5)
    if bits == 8:
        np.testing.assert_allclose(queries.values, v_qd, atol=np.abs(v_qd).max() / 253)
    else:
        # Along itself a query is what it was; what is rounded is a small part of it.
        np.testing.assert_allclose((queries.values * v_qd).sum(axis=1), (v_qd**2).sum(axis=1), rtol=1e-5)
        assert (((queries.values - v_qd) ** 2).sum(axis=1) < 0.02 * (v_qd**2).sum(axis=1)).all()
    # Memory that is used again changes nothing.
    scratch = np.empty((64, 8 * kept.codes.shape[1]), np.uint8)
    again = inner_products(kept.codes, kept.scales, queries, scratch)
    np.testing.assert_array_equal(again, inner_products(kept.codes, kept.scales, queries))


@pytest.mark.parametrize(("bits", "D"), [(1, 2025), (1, 256), (1, 5), (8, 2500)])
@pytest.mark.parametrize("way", ["compiled", "bytes", "float32"])
def test_every_way_to_multiply_gives_the_same_bits(
    bits: Bits, D: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by a compiled loop or by numpy, in bytes or in float32: sums of whole numbers, also at their largest."""
    if way == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(packed, "counter", lambda: None)
    u_nd, v_qd = normal(1, 9, D).float().numpy(), normal(2, 5, D).float().numpy()
    u_nd[0], v_qd[0] = 1, 1
    # A few large coordinates: such weights have eight bits, others four.
    v_qd[3] **= 7
    kept = store(u_nd, bits, entries=100)
    whole = QueryCodes.of(v_qd, bits)
    c = (
        np.unpackbits(kept.codes, axis=1, count=D, bitorder="little") * 2.0 - 1
        if bits == 1
        else kept.codes.view(np.int8)
    )
    w = np.rint(whole.values / whole.steps[:, None]).astype(np.int64)
    wanted = (c.astype(np.int64) @ w.T).astype(np.float32) * (kept.scales[:, None] * whole.steps)
    monkeypatch.setattr(packed, "_multiplies_bytes", lambda: way == "bytes")
    for Q in (1, 3, 5):
        found = inner_products(kept.codes, kept.scales, QueryCodes.of(v_qd[:Q], bits))
        np.testing.assert_array_equal(found, wanted[:, :Q])


def test_signs_estimate_inner_products_without_bias_over_rotations() -> None:
    D = 32
    u_d, v_d = normal(13, D), normal(14, D)
    v_d = 0.5 * u_d + v_d
    found = []
    for seed in range(600):
        R = torch.from_numpy(random_frame(D, D, f"rotation {seed}"))
        u_1d, v_1d = ((R.T @ one)[None].float().numpy() for one in (u_d, v_d))
        kept = store(u_1d, 1, D)
        found.append(kept.scales[0] * (np.where(u_1d >= 0, 1, -1) * v_1d).sum())
    error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - float(u_d @ v_d)) < 4 * error


@pytest.mark.parametrize("bits", [1, 8])
def test_norms_are_those_of_the_code_and_of_what_it_leaves_out(bits: Bits) -> None:
    u_nd = normal(15, 20, 64).float().numpy()
    kept = store(u_nd, bits, entries=400)
    norms = np.linalg.norm(u_nd, axis=1)
    np.testing.assert_allclose(kept.rms, norms / 20, rtol=1e-3)
    c_nd = np.where(u_nd >= 0, 1, -1) if bits == 1 else np.rint(u_nd / kept.scales[:, None])
    left = np.linalg.norm(u_nd - kept.scales[:, None] * c_nd, axis=1) / norms
    np.testing.assert_allclose(kept.left_out, left, rtol=2e-3, atol=1e-4)
    assert left.mean() < (0.8 if bits == 1 else 0.02)


@pytest.mark.parametrize("bits", [1, 8])
def test_a_row_that_is_not_finite_or_zero_scores_nothing(bits: Bits) -> None:
    u_nd = normal(16, 4, 16).float().numpy()
    u_nd[1, 3], u_nd[2, 0], u_nd[3] = np.nan, np.inf, 0
    kept = store(u_nd, bits, entries=16)
    scores = inner_products(kept.codes, kept.scales, QueryCodes.of(u_nd[:1], bits))
    assert scores[0, 0] > 0
    assert (scores[1:] == 0).all()
    assert np.isfinite(kept.left_out).all()
    assert (kept.rms[1:] == 0).all()


def test_a_layer_narrower_than_the_width_is_not_projected() -> None:
    settings = CodeSettings(width=64, bits=8)
    assert settings.coordinates(LAYER) == O * I
    assert settings.code_bytes(LAYER) == O * I
    assert replace(settings, bits=1).code_bytes(LAYER) == -(-O * I // 8)
    assert CodeSettings("sketched", 5).coordinates(LAYER) == 25
