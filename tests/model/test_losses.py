"""Losses made in chunks inside the head: the same numbers and gradients as from all logits, which never exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, PretrainedConfig, set_seed

from infscan.config import Dtype, ModelConfig
from infscan.model import losses
from infscan.model.architecture import describe
from infscan.model.capture import backward, capturing
from infscan.model.load import load
from infscan.model.loaded import LoadedModel, RankContext
from infscan.model.losses import Loss, sequence_losses
from infscan.model.measure import sample_labels, summed_losses, uniforms
from tests.model.families import CONFIGS, save

# Families that do something to their logits after the head: a factor, a divisor.
_AFTERWARDS: dict[str, Callable[..., PretrainedConfig]] = {
    "cohere": lambda **sizes: CohereConfig(**sizes, logit_scale=0.25),
    "granite": lambda **sizes: GraniteConfig(**sizes, logits_scaling=4.0),
}
_B, _T, _V = 3, 7, 40


def loaded(folder: Path, dtype: Dtype = Dtype.float64) -> LoadedModel:
    return load(ModelConfig(str(folder), dtype), RankContext(), sharded=False)


def some_ids() -> Tensor:
    return torch.arange(_B * _T).view(_B, _T) * 11 % _V


def some_loss(seed: int = 0, *, drawn: bool = False) -> Loss:
    generator = torch.Generator().manual_seed(seed)
    labels_bt = torch.randint(0, _V, (_B, _T), generator=generator)
    weights_bt = torch.randint(-1, 2, (_B, _T), generator=generator).float()
    return Loss(labels_bt, weights_bt, torch.from_numpy(uniforms(seed, np.arange(_B), _T)) if drawn else None)


def gradients(model: LoadedModel, forward: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Losses [B], and the gradient at every linear layer that a scan would track."""
    found: list[Tensor] = []
    layers = describe(model.module.name_or_path, "linear").layers
    with capturing(model.module, layers, lambda _layer, _a, s_bto, _routed: found.append(s_bto.clone())):
        losses_b = forward()
        backward(losses_b.sum())
    return losses_b.detach(), found


def whole(model: LoadedModel, loss: Loss) -> tuple[Tensor, list[Tensor]]:
    """By autograd through all logits at once."""
    return gradients(
        model, lambda: summed_losses(model.logits(some_ids()), loss.labels_bt, loss.weights_bt.to(torch.float64))
    )


def agree(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], **tolerance: float) -> None:
    torch.testing.assert_close(found[0], expected[0], check_dtype=False, **tolerance)
    assert len(found[1]) == len(expected[1]) > 0
    for mine, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.fixture(params=[1, 2, 20, 21, 1000])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Positions per chunk: one, a few, all but one, all, more than there are."""
    monkeypatch.setattr(losses, "_CHUNK_ROWS", request.param)
    monkeypatch.setattr(losses, "_CHUNK_BYTES", 0)
    return request.param


@pytest.mark.parametrize("family", list(CONFIGS))
def test_every_family_gives_what_all_its_logits_give(family: str, tmp_path: Path) -> None:
    model, loss = loaded(save(family, tmp_path)), some_loss()
    assert model.head_is_last
    agree(
        gradients(model, lambda: sequence_losses(model, some_ids(), None, loss)),
        whole(model, loss),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("family", list(_AFTERWARDS))
def test_what_a_family_does_to_its_logits_is_not_lost(family: str, tmp_path: Path) -> None:
    set_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": _V,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    module = AutoModelForCausalLM.from_config(_AFTERWARDS[family](**sizes), dtype=torch.float64)
    nn.init.normal_(module.get_output_embeddings().weight)
    module.save_pretrained(tmp_path)
    model, loss = loaded(tmp_path), some_loss()
    assert not model.head_is_last
    agree(
        gradients(model, lambda: sequence_losses(model, some_ids(), None, loss)),
        whole(model, loss),
        rtol=1e-10,
        atol=1e-12,
    )


def test_the_chunks_change_nothing_and_bound_the_logits(rows: int, tmp_path: Path) -> None:
    model, loss = loaded(save("gpt_neox", tmp_path)), some_loss()
    head: Any = model.module.get_output_embeddings()
    seen: list[int] = []
    # The product itself: hooks on the head see what stands in for it.
    head.forward = lambda h: seen.append(len(h)) or nn.functional.linear(h, head.weight)
    found = gradients(model, lambda: sequence_losses(model, some_ids(), None, loss))
    del head.forward
    assert sum(seen) == _B * _T
    assert max(seen) <= rows
    agree(found, whole(model, loss), rtol=1e-10, atol=1e-12)


def test_drawn_labels_are_those_of_the_whole_distribution_and_their_loss_is_taken(rows: int, tmp_path: Path) -> None:
    model, loss = loaded(save("gpt2", tmp_path)), some_loss(drawn=True)
    assert loss.uniforms_bt is not None
    with torch.no_grad():
        p_mv = model.logits(some_ids()).flatten(0, 1).softmax(-1)
    expected = sample_labels(p_mv, loss.uniforms_bt.flatten()).view(_B, _T)
    before = loss.labels_bt.clone()
    found = gradients(model, lambda: sequence_losses(model, some_ids(), None, loss))
    assert torch.equal(loss.labels_bt, expected)
    assert not torch.equal(loss.labels_bt, before)
    agree(found, whole(model, Loss(expected, loss.weights_bt)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_a_narrow_model_has_wide_losses(dtype: Dtype, tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    model, loss = loaded(folder, dtype), some_loss()
    found = gradients(model, lambda: sequence_losses(model, some_ids(), None, loss))
    assert found[0].dtype is torch.float32
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype is Dtype.float32 else {"rtol": 2e-2, "atol": 2e-2}
    by_autograd = gradients(model, lambda: summed_losses(model.logits(some_ids()), loss.labels_bt, loss.weights_bt))
    agree(found, by_autograd, **close)


def test_the_head_is_its_own_again_afterwards_also_when_the_forward_fails(tmp_path: Path) -> None:
    model = loaded(save("gpt_neox", tmp_path))
    before = model.logits(some_ids())
    with pytest.raises(IndexError):
        sequence_losses(model, some_ids() + _V, None, some_loss())
    sequence_losses(model, some_ids(), None, some_loss())
    assert "forward" not in model.module.get_output_embeddings().__dict__
    assert torch.equal(model.logits(some_ids()), before)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(2, 50), st.integers(0, 1000))
def test_the_gradient_of_each_sequences_loss_is_its_own(rows: int, length: int, vocabulary: int, seed: int) -> None:
    """Weighted anew by what comes from above, as any loss is: not only for a plain sum."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(2, length, 3, dtype=torch.float64, generator=generator).requires_grad_()
    W = torch.randn(vocabulary, 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, vocabulary, (2, length), generator=generator)
    weights = torch.randn(2, length, dtype=torch.float64, generator=generator)
    above = torch.tensor([0.5, -2.0], dtype=torch.float64)
    found_bt = losses._PositionLosses.apply(h, lambda x: x @ W.T, Loss(labels, weights), rows)
    (found,) = torch.autograd.grad((found_bt.sum(dim=1) * above).sum(), h)
    (expected,) = torch.autograd.grad((summed_losses(h @ W.T, labels, weights) * above).sum(), h)
    torch.testing.assert_close(found, expected)


def test_a_gpu_takes_more_positions_at_once_and_none_fewer_than_a_product_needs() -> None:
    rows = {V: [losses.rows_at_once(V, on_gpu=on_gpu) for on_gpu in (False, True)] for V in (1000, 50_304, 128_256)}
    assert rows == {1000: [2097, 134_217], 50_304: [512, 2668], 128_256: [512, 1046]}
    assert losses.rows_at_once(10**7, on_gpu=True) == 512
