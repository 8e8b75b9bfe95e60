"""Loading: every weight arrives, in the dtype asked for, and what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig

from infscan.config import AttentionImplementation, Dtype, ModelConfig
from infscan.errors import ModelError
from infscan.model.architecture import describe, load_config
from infscan.model.checkpoint import Checkpoint
from infscan.model.experts import run_by_expert
from infscan.model.family import build_on_meta
from infscan.model.load import load, load_onto, resolve_dtype
from infscan.model.loaded import LoadedModel, RankContext
from tests.model import zoo
from tests.model.families import CONFIGS, save


def loaded(folder: Path, dtype: Dtype = Dtype.float64, **settings: bool) -> LoadedModel:
    return load(ModelConfig(str(folder), dtype, **settings), RankContext(), sharded=False)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_a_loaded_model_is_the_saved_one_in_eval_mode(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path)
    model = loaded(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids_bt = torch.arange(12).view(2, 6)
    torch.testing.assert_close(model.logits(ids_bt), reference(ids_bt).logits, rtol=1e-12, atol=1e-12)
    assert not any(module.training for module in model.module.modules())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert model.parameters == model.shard_parameters == sum(p.numel() for p in reference.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Beside the dense ones: a table of angles, a bias that stays in float32, experts that are stored one by one.
@pytest.mark.parametrize("family", [*CONFIGS, "gptj", "deepseek_v3", "mixtral"])
def test_what_is_loaded_onto_a_gpu_is_what_is_loaded_whole(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensor by tensor, here onto a CPU: the same weights and buffers, and the same bits of what they give."""
    folder = save(family, tmp_path) if family in CONFIGS else zoo.save(family, tmp_path)
    ours = load_onto(folder, load_config(folder), dtype, "cpu")
    whole = loaded(folder, Dtype(str(dtype).removeprefix("torch."))).module
    for mine, other in (
        (ours.named_parameters(), whole.named_parameters()),
        (ours.named_buffers(), whole.named_buffers()),
    ):
        found, expected = dict(mine), dict(other)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (found[name].dtype, found[name].requires_grad) == (tensor.dtype, False)
            assert torch.equal(found[name], tensor), name
    ids_bt = torch.arange(12).view(2, 6)
    run_by_expert(ours)
    assert torch.equal(ours(ids_bt).logits, whole(ids_bt).logits)
    assert not any(module.training for module in ours.modules())


def test_what_does_not_fit_is_not_loaded_onto_a_gpu(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    for changed, said in (({lost: torch.zeros(2, 3)}, f"{lost} has shape"), ({"extra": torch.zeros(2)}, "unexpected")):
        save_file(weights | changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=said):
            load_onto(folder, load_config(folder), torch.float32, "cpu")


def test_checkpointing_trains_no_dropout(tmp_path: Path) -> None:
    model = loaded(save("opt", tmp_path), gradient_checkpointing=True)
    ids_bt = torch.arange(12).view(2, 6)
    assert torch.equal(model.logits(ids_bt), model.logits(ids_bt))


def test_dtypes(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    for asked, expected in {
        Dtype.auto: torch.float32,
        Dtype.bfloat16: torch.bfloat16,
        Dtype.float64: torch.float64,
    }.items():
        model = loaded(folder, asked)
        assert {parameter.dtype for parameter in model.module.parameters()} == {expected}
        assert model.dtype == expected


@pytest.mark.parametrize("declared", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_auto_is_the_checkpoints_dtype_on_a_gpu_alone(declared: object) -> None:
    config = PretrainedConfig()
    config.dtype = declared
    assert resolve_dtype(Dtype.auto, config, "cuda:0") == torch.bfloat16
    assert resolve_dtype(Dtype.auto, config, "cpu") == torch.float32
    assert resolve_dtype(Dtype.float32, config, "cuda:0") == torch.float32


def test_float16_is_run_in_a_dtype_that_gradients_do_not_overflow() -> None:
    config = PretrainedConfig()
    config.dtype = torch.float16
    assert resolve_dtype(Dtype.auto, config, "cuda:0") == torch.bfloat16
    assert resolve_dtype(Dtype.auto, config, "cpu") == torch.float32


def test_the_dtype_of_a_wrapper_is_its_text_towers() -> None:
    config = zoo.configuration("gemma3")
    config.dtype, config.text_config.dtype = None, torch.bfloat16
    assert resolve_dtype(Dtype.auto, config, "cuda:0") == torch.bfloat16


def test_attention_is_fused_where_the_family_has_it_and_plain_elsewhere(tmp_path: Path) -> None:
    def implementation(family: str, asked: AttentionImplementation) -> str:
        settings = ModelConfig(str(tmp_path / family), attention_implementation=asked)
        return load(settings, RankContext(), sharded=False).module.config._attn_implementation

    zoo.save("llama", tmp_path)
    zoo.save("bloom", tmp_path)
    auto, sdpa, eager = AttentionImplementation
    assert [implementation("llama", asked) for asked in (auto, sdpa, eager)] == ["sdpa", "sdpa", "eager"]
    assert [implementation("bloom", asked) for asked in (auto, eager)] == ["eager", "eager"]
    with pytest.raises(ModelError, match=r"bloom cannot be run with .*model\.attention_implementation=auto or eager"):
        implementation("bloom", sdpa)
    with pytest.raises(ModelError, match=r"bloom cannot be run with"):
        describe(str(tmp_path / "bloom"), "mlp", attention=sdpa)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path)

    def refusal(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ModelError) as caught:
            loaded(folder)
        return str(caught.value)

    lost = "model.layers.1.mlp.up_proj.weight"
    assert f"missing ['{lost}'] (1)" in refusal({name: tensor for name, tensor in weights.items() if name != lost})
    assert "unexpected ['extra.weight'] (1)" in refusal(weights | {"extra.weight": torch.zeros(2)})
    assert "cannot be loaded" in refusal(weights | {lost: torch.zeros(2, 3)})


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="the weights cannot be loaded"):
        loaded(folder)


def test_rotary_tables_of_old_checkpoints_are_not_missed(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    path = folder / "model.safetensors"
    weights = load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    save_file(weights, path, metadata={"format": "pt"})
    assert loaded(folder).parameters > 0


def test_a_pickle_beside_safetensors_is_never_opened(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert loaded(folder).parameters > 0


@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_sharded_loader_sees_every_tensor_under_its_module_path(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path)
    module = build_on_meta(load_config(folder))
    found = dict(Checkpoint.of(folder, module).tensors())
    parameters = dict(module.named_parameters())
    assert found.keys() == parameters.keys()
    assert all(found[name].shape == parameter.shape for name, parameter in parameters.items())


def test_the_unembedding_of_an_older_checkpoint_is_found(tmp_path: Path) -> None:
    """GPT-NeoX called it embed_out; without the renaming the head would be garbage."""
    folder = save("gpt_neox", tmp_path)
    before = loaded(folder).logits(torch.arange(6).view(1, 6))
    path = folder / "model.safetensors"
    weights = load_file(path)
    head = next(name for name in ("embed_out.weight", "lm_head.weight") if name in weights)
    weights["embed_out.weight"] = weights.pop(head)
    save_file(weights, path, metadata={"format": "pt"})
    assert torch.equal(loaded(folder).logits(torch.arange(6).view(1, 6)), before)
    assert "lm_head.weight" in Checkpoint.of(folder, build_on_meta(load_config(folder))).sources
