"""Captured inputs and output gradients rebuild autograd's weight gradients, in every family."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from infscan.config import Dtype, ModelConfig
from infscan.corpus.batches import pad
from infscan.errors import ModelError
from infscan.influence.covariance import with_ones
from infscan.influence.layers import Layer
from infscan.model.architecture import Architecture, describe
from infscan.model.capture import backward, capturing
from infscan.model.load import load
from infscan.model.loaded import LoadedModel, RankContext
from infscan.model.measure import next_tokens, summed_losses
from tests.model.families import CONFIGS, VOCAB, save

RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, VOCAB, length) for length in (9, 5, 12)]


@dataclass
class Subject:
    folder: Path
    model: LoadedModel

    def layers(self, tracked: str) -> Architecture:
        return describe(str(self.folder), tracked)


@pytest.fixture(scope="module", params=list(CONFIGS))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = save(request.param, tmp_path_factory.mktemp("models"))
    return Subject(folder, load(ModelConfig(str(folder), Dtype.float64), RankContext(), sharded=False))


def batch(sequences: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    ids, mask = pad(sequences)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def captured(
    model: LoadedModel, layers: tuple[Layer, ...], sequences: list[np.ndarray]
) -> dict[str, tuple[Tensor, Tensor]]:
    """(a, s) by layer, a as the module sees it; each layer must be seen exactly once."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def consume(layer: Layer, a_bti: Tensor, s_bto: Tensor, _routed: object) -> None:
        assert layer.name not in found
        found[layer.name] = (a_bti, s_bto)

    ids_bt, mask_bt = batch(sequences)
    with capturing(model.module, layers, consume):
        backward(summed_losses(model.logits(ids_bt), *next_tokens(ids_bt, mask_bt)).sum())
    return found


def gradients(
    model: LoadedModel, layers: tuple[Layer, ...], sequences: list[np.ndarray]
) -> dict[str, tuple[Tensor, Tensor | None]]:
    """autograd's own gradients of weight [O, I] and bias [O]."""
    ids_bt, mask_bt = batch(sequences)
    modules = dict(model.module.named_modules())
    weights = [modules[layer.name].weight.requires_grad_(True) for layer in layers]
    biases = [modules[layer.name].bias.requires_grad_(True) for layer in layers if layer.bias]
    loss = summed_losses(model.logits(ids_bt), *next_tokens(ids_bt, mask_bt)).sum()
    grads = torch.autograd.grad(loss, [*weights, *biases])
    model.module.requires_grad_(False)
    of_bias = iter(grads[len(weights) :])
    return {
        layer.name: (
            grad.T if isinstance(modules[layer.name], Conv1D) else grad,
            next(of_bias) if layer.bias else None,
        )
        for layer, grad in zip(layers, grads, strict=False)
    }


@pytest.mark.parametrize("tracked", ["mlp", "attention", "linear"])
def test_outer_products_add_up_to_autograds_gradients(subject: Subject, tracked: str) -> None:
    layers = subject.layers(tracked).layers
    found = captured(subject.model, layers, SEQUENCES)
    mask_bt = batch(SEQUENCES)[1]
    expected = gradients(subject.model, layers, SEQUENCES)
    assert set(found) == {layer.name for layer in layers}
    for layer in layers:
        a_bti, s_bto = found[layer.name]
        assert a_bti.shape == (*mask_bt.shape, layer.inputs - layer.bias)
        assert s_bto.shape == (*mask_bt.shape, layer.outputs)
        g_oi = torch.einsum("bto,bti->oi", s_bto, with_ones(a_bti, mask_bt, bias=layer.bias))
        weight, bias = expected[layer.name]
        torch.testing.assert_close(g_oi[:, : weight.shape[1]], weight, rtol=1e-9, atol=1e-12)
        if bias is not None:
            torch.testing.assert_close(g_oi[:, -1], bias, rtol=1e-9, atol=1e-12)


def test_layers_of_one_input_are_fed_the_same_values(subject: Subject) -> None:
    layers = subject.layers("linear").layers
    found = captured(subject.model, layers, SEQUENCES)
    for layer in layers:
        assert torch.equal(found[layer.name][0], found[layer.input_of][0])


def test_gradient_checkpointing_gives_the_same(subject: Subject) -> None:
    settings = ModelConfig(str(subject.folder), Dtype.float64, gradient_checkpointing=True)
    checkpointed = load(settings, RankContext(), sharded=False)
    layers = subject.layers("linear").layers
    plain, found = (captured(model, layers, SEQUENCES) for model in (subject.model, checkpointed))
    assert plain.keys() == found.keys()
    for name in plain:
        for before, after in zip(plain[name], found[name], strict=True):
            torch.testing.assert_close(before, after, rtol=1e-12, atol=1e-14)


def test_padding_on_the_right_changes_nothing(subject: Subject) -> None:
    layers = subject.layers("linear").layers
    together = captured(subject.model, layers, SEQUENCES)
    for row, sequence in enumerate(SEQUENCES):
        alone = captured(subject.model, layers, [sequence])
        for name, (a_bti, s_bto) in together.items():
            torch.testing.assert_close(a_bti[row, : len(sequence)], alone[name][0][0], rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(s_bto[row, : len(sequence)], alone[name][1][0], rtol=1e-10, atol=1e-13)
            assert not s_bto[row, len(sequence) :].any()


def test_nothing_is_left_behind(subject: Subject) -> None:
    captured(subject.model, subject.layers("linear").layers, SEQUENCES)
    ids_bt, mask_bt = batch(SEQUENCES)
    with capturing(subject.model.module, subject.layers("mlp").layers, _fail):
        loss = summed_losses(subject.model.logits(ids_bt), *next_tokens(ids_bt, mask_bt)).sum()
        with pytest.raises(RuntimeError, match="a consumer's own"):
            backward(loss)
    for module in subject.model.module.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
        assert not module._forward_pre_hooks
    for parameter in subject.model.module.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def _fail(_layer: Layer, _a_bti: Tensor, _s_bto: Tensor, _routed: object) -> None:
    raise RuntimeError("a consumer's own error")


def test_one_context_serves_several_batches(subject: Subject) -> None:
    layers = subject.layers("linear").layers
    seen: list[str] = []
    with capturing(subject.model.module, layers, lambda layer, a_bti, s_bto, _routed: seen.append(layer.name)):
        for sequence in SEQUENCES:
            ids_bt, mask_bt = batch([sequence])
            backward(summed_losses(subject.model.logits(ids_bt), *next_tokens(ids_bt, mask_bt)).sum())
    assert len(seen) == len(SEQUENCES) * len(layers)


def test_a_layer_wrongly_said_to_share_an_input_is_refused(subject: Subject) -> None:
    first, *_, last = subject.layers("mlp").layers
    liar = Layer(last.name, last.outputs, last.inputs, last.bias, first.name)
    with pytest.raises(ModelError, match="was taken to have the same input"):
        captured(subject.model, (first, liar), SEQUENCES)
