"""An independent implementation's factors and scores, reproduced in float64 from capture and the arithmetic alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from infscan.config import Dtype, ModelConfig
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.compress import compress
from infscan.influence.covariance import add_second_moment, mirror, with_ones
from infscan.influence.eigenbasis import add_squared_gradients, eigenbasis
from infscan.influence.inverse import damping, from_core, inverse_core
from infscan.influence.layers import Layer, LayerFactors
from infscan.influence.score import LayerQueries, score_layer, score_tokens
from infscan.model.architecture import describe
from infscan.model.capture import backward, capturing
from infscan.model.load import load
from infscan.model.loaded import LoadedModel, RankContext
from infscan.model.measure import next_tokens, summed_losses
from tests.golden import Golden, golden

# layer -> (a [N, T, I] with the bias's 1, s [N, T, O])
Captured = dict[str, tuple[Tensor, Tensor]]


def capture(model: LoadedModel, layers: tuple[Layer, ...], ids_bt: Tensor, weights_bt: Tensor) -> Captured:
    found: Captured = {}
    everything = torch.ones_like(ids_bt, dtype=torch.bool)

    def consume(layer: Layer, a_bti: Tensor, s_bto: Tensor, _routed: object) -> None:
        found[layer.name] = (with_ones(a_bti, everything, bias=layer.bias), s_bto)

    targets_bt, _ = next_tokens(ids_bt, everything)
    with capturing(model.module, layers, consume):
        backward(summed_losses(model.logits(ids_bt), targets_bt, weights_bt).sum())
    return found


class Reproduction:
    """The whole method on the `small` golden set, everything kept in memory."""

    def __init__(self, truth: Golden) -> None:
        self.truth = truth
        self.layers = describe(str(truth.model), "mlp").layers
        model = load(ModelConfig(str(truth.model), Dtype.float64), RankContext(), sharded=False)
        ids_bt = torch.tensor(truth.train)
        _, weights_bt = next_tokens(ids_bt, torch.ones_like(ids_bt, dtype=torch.bool))
        self.train = capture(model, self.layers, ids_bt, weights_bt)
        self.factors = {layer.name: self._fit(layer) for layer in self.layers}
        self.V: dict[str, list[Tensor]] = {layer.name: [] for layer in self.layers}
        for query in truth.queries:
            query_ids = torch.tensor([query.input_ids])
            weights = torch.zeros(query_ids.shape)
            weights[:, query.prompt_len - 1 : -1] = 1
            for name, (a_bti, s_bto) in capture(model, self.layers, query_ids, weights).items():
                self.V[name].append(s_bto[0].T @ a_bti[0])

    def _fit(self, layer: Layer) -> LayerFactors:
        a_bti, s_bto = self.train[layer.name]
        N, T, O = s_bto.shape
        A = BlockDiagonal.zeros(layer.inputs, 1, dtype=torch.float64)
        S = BlockDiagonal.zeros(O, 1, dtype=torch.float64)
        Lambda = torch.zeros(O, layer.inputs, dtype=torch.float64)
        add_second_moment(A, a_bti)
        add_second_moment(S, s_bto)
        A, S = (BlockDiagonal((mirror(total).dense() / (N * T),)) for total in (A, S))
        A_values, Q_A = eigenbasis(A, "A")
        S_values, Q_S = eigenbasis(S, "S")
        add_squared_gradients(Lambda, s_bto, a_bti, Q_S, Q_A)
        return LayerFactors(A, S, Q_A, Q_S, A_values, S_values, Lambda / N)

    def P(self, layer: Layer) -> Tensor:
        factors = self.factors[layer.name]
        lam = damping(factors.Lambda, 0.1, None, layer.name)
        return from_core(inverse_core(torch.stack(self.V[layer.name]), factors, lam), factors)


@pytest.fixture(scope="module")
def run() -> Reproduction:
    return Reproduction(golden("small"))


def relative(found: Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found.numpy() - expected) / np.linalg.norm(expected))


def test_tracked_layers(run: Reproduction) -> None:
    assert tuple(layer.name for layer in run.layers) == run.truth.tracked


def test_factors(run: Reproduction) -> None:
    for name, factors in run.factors.items():
        for kind, found in {"A": factors.A.dense(), "S": factors.S.dense(), "Lambda": factors.Lambda}.items():
            assert relative(found, run.truth.factor(kind)[name]) < 1e-8, (kind, name)


@pytest.mark.parametrize("kind", ["full", "lr8"])
def test_scores_and_both_margins(run: Reproduction, kind: str) -> None:
    by_layer, by_token = run.truth.by_layer(kind), run.truth.by_token(kind)
    total = torch.zeros(len(run.truth.queries), len(run.truth.train), dtype=torch.float64)
    tokens = torch.zeros(by_token.shape, dtype=torch.float64)
    for layer in run.layers:
        a_bti, s_bto = run.train[layer.name]
        P_qoi = run.P(layer)
        queries = LayerQueries.dense(P_qoi)
        if kind != "full":
            low = [compress(P_oi, run.truth.rank) for P_oi in P_qoi]
            U_xo, V_xi = torch.cat([one.U_or.T for one in low]), torch.cat([one.V_ir.T for one in low])
            queries = LayerQueries.factored(U_xo, V_xi, [run.truth.rank] * len(low))
            P_qoi = torch.stack([one.U_or @ one.V_ir.T for one in low])
        scores_bq = score_layer(s_bto, a_bti, queries)
        assert relative(scores_bq.T, by_layer[layer.name]) < 1e-7, layer.name
        total += scores_bq.T
        for query, P_oi in enumerate(P_qoi):
            tokens[query] += score_tokens(s_bto, a_bti, P_oi)
    assert relative(total, run.truth.scores(kind)) < 1e-7
    assert relative(tokens, by_token) < 1e-7
