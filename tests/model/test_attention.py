"""Documents that share a sequence and do not see each other come out as they do alone, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, MambaConfig, PretrainedConfig
from transformers.integrations import sdpa_attention

from infscan.config import Attention, CorpusConfig, Dtype, ModelConfig
from infscan.corpus.batches import pad, pad_positions
from infscan.errors import ModelError
from infscan.influence.layers import Layer
from infscan.model import attention as attention_module
from infscan.model.architecture import describe
from infscan.model.attention import document_mask, fused_shares_heads, repeat_grouped_heads
from infscan.model.capture import backward, capturing
from infscan.model.load import load
from infscan.model.loaded import LoadedModel, RankContext, check_document_mask
from infscan.model.measure import next_tokens, summed_losses
from infscan.steps.corpus_inputs import settings_for
from tests.model import families, zoo
from tests.model.families import CONFIGS, VOCAB, save

# Of each row, how long its documents are: one token, one document, padding after the last.
ROWS = ((5, 1, 9), (7,), (2, 3, 1, 1, 4))
# RMSNorm and rotary tables round in float32 whatever the model's dtype.
CLOSE = 1e-6
WINDOWED = {
    "phi3 with a window": type(CONFIGS["phi3"])(**CONFIGS["phi3"].to_dict() | {"sliding_window": 3}),
    "qwen2 with a window": type(CONFIGS["qwen2"])(
        **CONFIGS["qwen2"].to_dict()
        | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "layer_types": None}
    ),
}


def tokens(rows: tuple[tuple[int, ...], ...]) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [[rng.integers(1, VOCAB, length) for length in lengths] for lengths in rows]


def starts_of(lengths: tuple[int, ...]) -> np.ndarray:
    return np.cumsum([0, *lengths[:-1]])


def captured(
    model: LoadedModel, layers: tuple[Layer, ...], sequences: list[np.ndarray], positions: np.ndarray | None = None
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Losses [B], and (a, s) by layer."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def consume(layer: Layer, a_bti: Tensor, s_bto: Tensor, _routed: object) -> None:
        found[layer.name] = (a_bti, s_bto)

    ids, mask = (torch.from_numpy(array) for array in pad(sequences))
    with capturing(model.module, layers, consume):
        logits_btv = model.logits(ids, None if positions is None else torch.from_numpy(positions))
        losses_b = summed_losses(logits_btv, *next_tokens(ids, mask))
        backward(losses_b.sum())
    return losses_b.detach(), found


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [*((family, False) for family in (*CONFIGS, *WINDOWED)), ("llama", True), ("opt", True)],
)
def test_documents_of_a_sequence_are_as_if_alone(
    family: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is run alone with the token after it to predict; their losses add up to the sequence's, and a_t and s_t are
    the sequence's own."""
    monkeypatch.setattr(families, "CONFIGS", CONFIGS | WINDOWED)
    path = str(save(family, tmp_path))
    settings = ModelConfig(path, dtype=Dtype.float64, gradient_checkpointing=checkpointing)
    model = load(settings, RankContext(), sharded=False)
    check_document_mask(model)
    layers = describe(path, "linear").layers
    rows = tokens(ROWS)
    sequences = [np.concatenate(row) for row in rows]
    longest = max(map(len, sequences))
    positions = pad_positions([starts_of(lengths) for lengths in ROWS], longest)
    assert positions is not None
    losses_b, found = captured(model, layers, sequences, positions)
    across_b, _ = captured(model, layers, sequences)
    for row, lengths in enumerate(ROWS):
        ends = np.cumsum(lengths)
        total = 0.0
        for start, end in zip(starts_of(lengths), ends, strict=True):
            alone, own = captured(model, layers, [sequences[row][start : end + 1]])
            total += float(alone)
            for layer in layers:
                for together, apart in zip(found[layer.name], own[layer.name], strict=True):
                    torch.testing.assert_close(
                        together[row, start:end], apart[0, : end - start], rtol=CLOSE, atol=CLOSE
                    )
        assert float(losses_b[row]) == pytest.approx(total, rel=CLOSE)
        assert (float(across_b[row]) == pytest.approx(total, rel=10 * CLOSE)) == (len(lengths) == 1)


def test_positions_begin_anew_with_documents_and_go_on_in_padding() -> None:
    positions = pad_positions([np.array([0, 2, 3]), None, np.array([0])], 5)
    assert positions is not None
    assert positions.tolist() == [[0, 1, 0, 0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert pad_positions([np.array([0]), None], 5) is None


def test_a_mask_shows_a_token_its_own_document_up_to_itself() -> None:
    mask_b1tt = document_mask(torch.tensor([[0, 1, 0, 0, 1]]))
    assert mask_b1tt[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2),
        MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4),
    ],
    ids=["bloom", "mamba"],
)
def test_a_family_that_is_told_no_positions_is_refused_before_it_is_loaded(
    config: PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "CONFIGS", {"other": config})
    architecture = describe(str(save("other", tmp_path)), r"\.\d+\..*proj|dense")
    corpus = CorpusConfig(path="corpus", eos_id=1, sequence_length=8)
    settings_for(corpus, architecture, None)
    corpus.attention = Attention.within
    with pytest.raises(ModelError, match=rf"within: {config.model_type}.* does not keep.*packing=document"):
        settings_for(corpus, architecture, None)


@pytest.mark.parametrize("family", ["falcon_h1", "lfm2", "recurrent_gemma", "zamba", "qwen3_next", "minimax"])
def test_a_state_beside_attention_is_refused_before_it_is_loaded(family: str, tmp_path: Path) -> None:
    architecture = describe(str(zoo.save(family, tmp_path)), "head")
    corpus = CorpusConfig(path="corpus", eos_id=1, sequence_length=8, attention=Attention.within)
    with pytest.raises(ModelError, match=rf"within: {family}, whose \w+ carries a state from token to token"):
        settings_for(corpus, architecture, None)


def small_leak(family: str, folder: Path, dtype: Dtype) -> LoadedModel:
    """A model in which documents see a hundredth of what they do without a boundary."""
    model = load(ModelConfig(str(zoo.save(family, folder)), dtype), RankContext(), sharded=False)
    forward = model.module.forward

    def leaking(input_ids: Tensor, use_cache: bool, position_ids: Tensor | None = None) -> Any:
        across = forward(input_ids=input_ids, use_cache=use_cache)
        if position_ids is None:
            return across
        within = forward(input_ids=input_ids, use_cache=use_cache, position_ids=position_ids)
        within.logits = within.logits + 0.01 * (across.logits - within.logits)
        return within

    model.module.forward = leaking
    return model


@pytest.mark.parametrize("dtype", [Dtype.float32, Dtype.bfloat16])
def test_a_hundredth_of_a_leak_is_found_in_any_dtype(dtype: Dtype, tmp_path: Path) -> None:
    sound = load(ModelConfig(str(zoo.save("llama", tmp_path)), dtype), RankContext(), sharded=False)
    before = {name: tensor.clone() for name, tensor in sound.module.state_dict(keep_vars=False).items()}
    check_document_mask(sound)
    after = sound.module.state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    with pytest.raises(ModelError, match="within: llama does not keep"):
        check_document_mask(small_leak("llama", tmp_path / "again", dtype))


def test_a_model_that_sees_through_the_boundary_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(ModelConfig(str(save("gpt_neox", tmp_path)), Dtype.float64), RankContext(), sharded=False)
    forward = model.module.forward
    monkeypatch.setattr(
        model.module, "forward", lambda input_ids, use_cache, **_: forward(input_ids=input_ids, use_cache=use_cache)
    )
    with pytest.raises(ModelError, match=r"within: gpt_neox does not keep the documents of a sequence apart"):
        check_document_mask(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_grouped_heads_repeated_are_grouped_heads_shared(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's fused attention shares keys and values among heads in two bytes alone; in more they are repeated."""
    asked: list[tuple[bool, bool]] = []
    own = torch.nn.functional.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, *rest: Any, **given: Any) -> Tensor:
        asked.append((bool(given.get("enable_gqa")), q.shape[1] == k.shape[1]))
        return own(q, k, *rest, **given)

    config = type(CONFIGS["llama"])(**CONFIGS["llama"].to_dict() | {"num_key_value_heads": 1})
    monkeypatch.setattr(families, "CONFIGS", CONFIGS | {"llama": config})
    path = str(save("llama", tmp_path))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    settings = ModelConfig(path, dtype=Dtype.float64, gradient_checkpointing=checkpointing)
    model, layers = load(settings, RankContext(), sharded=False), describe(path, "mlp").layers
    sequences = [np.arange(1, 9), np.arange(3, 9)]
    found = []
    for device_shares in (True, False):
        repeat_grouped_heads()
        monkeypatch.setattr(attention_module, "fused_shares_heads", lambda key, shares=device_shares: shares)
        asked.clear()
        found.append(captured(model, layers, sequences))
        assert set(asked) == {(device_shares, not device_shares)}
        assert len(asked) == 2 * (1 + checkpointing)
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_a_cpu_and_two_bytes_share_grouped_heads() -> None:
    class OnGpu:
        is_cuda = True

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    shared = {dtype: fused_shares_heads(OnGpu(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)}  # type: ignore[arg-type]
    assert shared == {torch.bfloat16: True, torch.float32: False, torch.float64: False}
    assert fused_shares_heads(torch.zeros(1))
