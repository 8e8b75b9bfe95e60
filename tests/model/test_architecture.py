"""Tracked layers by family, what is refused with which sentence, and the fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config

from infscan.errors import ModelError
from infscan.model.architecture import describe, weight_files
from infscan.model.family import build_on_meta, refuse_encoder
from infscan.model.tracked import tracked_layers
from tests.model.families import CONFIGS, CONTEXT, VOCAB, save
from tests.steps.runs import tiny_model

_GROUPED = (
    "model.layers",
    ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"],
)
# family: (a block's path, its MLP's linears, its attention's linears), in module order
NAMES = {
    "gpt_neox": (
        "gpt_neox.layers",
        ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        ["attention.query_key_value", "attention.dense"],
    ),
    "gpt2": ("transformer.h", ["mlp.c_fc", "mlp.c_proj"], ["attn.c_attn", "attn.c_proj"]),
    "llama": _GROUPED,
    "llama_untied": _GROUPED,
    "opt": (
        "model.decoder.layers",
        ["fc1", "fc2"],
        ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"],
    ),
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "phi3": ("model.layers", ["mlp.gate_up_proj", "mlp.down_proj"], ["self_attn.o_proj", "self_attn.qkv_proj"]),
}
SHARED = {
    **{family: {"up": "gate", "k": "q", "v": "q"} for family in ("llama", "llama_untied", "qwen2", "qwen3")},
    "opt": {"v": "k", "q": "k"},
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save("llama", tmp_path)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_named_choices_find_the_familys_layers_and_never_the_unembedding(family: str) -> None:
    module = build_on_meta(CONFIGS[family])
    prefix, mlp, attention = NAMES[family]
    for tracked, leaves in {"mlp": mlp, "attention": attention}.items():
        names = [layer.name for layer in tracked_layers(module, tracked)]
        assert names == [f"{prefix}.{block}.{leaf}" for block in range(2) for leaf in leaves]
    both = {layer.name for layer in tracked_layers(module, "linear")}
    assert both == {f"{prefix}.{block}.{leaf}" for block in range(2) for leaf in mlp + attention}


@pytest.mark.parametrize("family", list(CONFIGS))
def test_shapes_are_the_weights_and_siblings_share_an_input(family: str) -> None:
    module = build_on_meta(CONFIGS[family])
    modules = dict(module.named_modules())
    for layer in tracked_layers(module, "linear"):
        child = modules[layer.name]
        shape = tuple(child.weight.T.shape if family == "gpt2" else child.weight.shape)
        assert (layer.outputs, layer.inputs - layer.bias) == shape
        assert layer.bias == (child.bias is not None)
        assert layer.size == layer.outputs * layer.inputs
        leaf = layer.name.rpartition(".")[2].removesuffix("_proj")
        leader = SHARED.get(family, {}).get(leaf, leaf)
        assert layer.input_of.rpartition(".")[2].removesuffix("_proj") == leader


def test_a_regex_chooses_by_module_path_and_may_name_the_unembedding() -> None:
    module = build_on_meta(CONFIGS["llama"])
    assert [layer.name for layer in tracked_layers(module, r"layers\.1\..*(k|v)_proj$")] == [
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    k, v = tracked_layers(module, r"layers\.1\..*(k|v)_proj$")
    assert (k.input_of, v.input_of) == (k.name, k.name)
    assert [layer.name for layer in tracked_layers(module, "lm_head")] == ["lm_head"]
    with pytest.raises(
        ModelError, match=r"model.tracked='no_such' matches no linear layer; the model has model\.layers\.0"
    ):
        tracked_layers(module, "no_such")


def test_description(llama: Path) -> None:
    found = describe(str(llama), "linear")
    assert (found.vocab_size, found.context, found.eos_id, found.bos_id) == (VOCAB, CONTEXT, 2, None)
    assert found.folder == str(llama)
    assert found.parameters == sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())
    assert [layer.name.rpartition(".")[2] for layer in found.inputs[:4]] == [
        "q_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
    ]
    assert found.sequence_length(None) == CONTEXT
    assert found.sequence_length(8) == 8
    with pytest.raises(ModelError, match="sequence_length=33 is longer than the model's context of 32"):
        found.sequence_length(33)


def test_the_fingerprint_is_of_the_content_not_of_the_folder(llama: Path, tmp_path: Path) -> None:
    before = describe(str(llama), "mlp").fingerprint
    moved = shutil.copytree(llama, tmp_path / "elsewhere")
    (moved / "README.md").write_text("more")
    assert describe(str(moved), "mlp").fingerprint == before
    weights = load_file(moved / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] += 1e-6
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert describe(str(moved), "mlp").fingerprint != before


def test_large_weights_are_sampled_with_their_ends(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infscan.model.architecture._WHOLE_BYTES", 100)
    monkeypatch.setattr("infscan.model.architecture._SAMPLE_BYTES", 16)
    before = describe(str(llama), "mlp").fingerprint
    assert describe(str(llama), "mlp").fingerprint == before
    path = llama / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert describe(str(llama), "mlp").fingerprint != before


def test_a_sharded_checkpoint_is_read_by_its_index_alone(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for part, keys in parts.items():
        save_file({key: weights[key] for key in keys}, llama / part, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {key: part for part, keys in parts.items() for key in keys}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"x": torch.zeros(1)}, llama / "consolidated.safetensors")
    assert [path.name for path in weight_files(llama)] == sorted(parts)
    (llama / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"names model-00002-of-00002\.safetensors, which is not there \(1 of 2"):
        weight_files(llama)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_are_no_model_are_refused(llama: Path, tmp_path: Path) -> None:
    def refusal(path: Path | str) -> str:
        with pytest.raises(ModelError) as caught:
            describe(str(path), "mlp")
        return str(caught.value)

    assert "there is no such folder" in refusal("/no/such/folder")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")

    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    assert "only pytorch_model.bin, a pickle, which is never opened" in refusal(llama)
    (llama / "pytorch_model.bin").unlink()
    assert "no model.safetensors (nor an index of it)" in refusal(llama)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "asks for code of its own"),
        ({"model_type": "no-such-family"}, "cannot be used"),
        ({"hidden_size": "many"}, "cannot be used"),
        (T5Config().to_dict(), "t5 is an encoder with a decoder"),
    ],
)
def test_configurations_that_cannot_be_used_are_refused(llama: Path, changes: dict, sentence: str) -> None:
    edit_config(llama, **changes)
    with pytest.raises(ModelError, match=sentence):
        describe(str(llama), "mlp")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "bert"}, "^bert attends both ways"),
        ({"model_type": "roberta", "is_decoder": False}, "^roberta attends both ways"),
        ({"model_type": "xlnet"}, "^xlnet attends both ways"),
        ({"model_type": "t5"}, "^t5 is an encoder with a decoder"),
        ({"model_type": "bart"}, "^bart is an encoder with a decoder"),
    ],
)
def test_models_that_are_not_read_from_left_to_right_are_refused_by_name(
    llama: Path, changes: dict, sentence: str
) -> None:
    """By config.json alone: the weights beside it are another model's and are never read."""
    (llama / "config.json").write_text(json.dumps(changes))
    with pytest.raises(ModelError, match=sentence):
        describe(str(llama), "mlp")


def test_an_encoder_that_is_made_causal_passes() -> None:
    refuse_encoder(BertConfig(is_decoder=True))


@pytest.mark.parametrize(
    ("asked", "method"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_quantised_weights_are_refused_by_their_method(llama: Path, asked: dict, method: str) -> None:
    edit_config(llama, quantization_config=asked)
    with pytest.raises(ModelError, match=rf"quantised \({method}\).*save_pretrained"):
        describe(str(llama), "mlp")


@pytest.mark.parametrize("key", ["compression_config", "quantization"])
def test_other_tools_names_for_quantisation_are_known(llama: Path, key: str) -> None:
    edit_config(llama, **{key: {"bits": 4, "group_size": 64}})
    with pytest.raises(ModelError, match=rf"quantised \({key}\)"):
        describe(str(llama), "mlp")


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The model with other tensors in its one file."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.contiguous().clone() for name, tensor in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, value: {name: value.to(torch.int8)}, r"quantised \(.*down_proj\.weight is I8\)"),
        (lambda name, value: {name: value.to(torch.float8_e4m3fn)}, r"quantised \(.*down_proj\.weight is F8_E4M3\)"),
        (lambda name, value: {f"{name}_scale_inv": value[:1], name: value}, r"quantised \(.*weight_scale_inv\)"),
        (lambda name, value: {name.replace("weight", "qweight"): value}, r"quantised \(.*qweight\)"),
        (lambda name, value: {name: value, name.removeprefix("model."): value * 2}, "are one weight by two names"),
    ],
)
def test_weights_that_are_quantised_or_there_twice_are_refused_by_their_tensors(
    tmp_path: Path, change: Callable[[str, torch.Tensor], dict[str, torch.Tensor]], said: str
) -> None:
    folder = with_tensors(
        tiny_model(tmp_path / "model", family="llama"),
        lambda tensors: {
            new: made
            for name, value in tensors.items()
            for new, made in (change(name, value) if "layers.0.mlp.down_proj" in name else {name: value}).items()
        },
    )
    with pytest.raises(ModelError, match=said):
        describe(str(folder), "mlp")


def test_a_tensor_that_two_files_bring_is_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first = min(tensors)
    save_file(tensors, folder / "a.safetensors")
    save_file({first: tensors[first] * 2}, folder / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {first: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=rf"b\.safetensors and another of the model's files both bring {first}"):
        describe(str(folder), "mlp")


def test_a_broken_config_file_is_refused(llama: Path) -> None:
    (llama / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be used"):
        describe(str(llama), "mlp")


def test_a_truncated_checkpoint_is_refused_before_any_worker_loads_it(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read .* cut off or damaged"):
        describe(str(folder), "mlp")
