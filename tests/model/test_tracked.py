"""What is tracked, by the structure of the module tree and by what a forward over text really runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infscan.config import Dtype, ModelConfig
from infscan.errors import ModelError
from infscan.influence.layers import Layer
from infscan.model import family
from infscan.model.architecture import describe
from infscan.model.family import build_on_meta
from infscan.model.load import load
from infscan.model.loaded import RankContext
from infscan.model.probe import check_tracked
from infscan.model.tracked import by_block, tracked_layers
from infscan.model.worker import ModelWorker, WorkerSettings
from tests.model import zoo

EXPERTS = 4


def leaves(family: str, tracked: str) -> set[str]:
    """Of all tracked layers, the paths below their blocks."""
    module = build_on_meta(zoo.configuration(family))
    return {re.split(r"\.\d+\.", layer.name, maxsplit=1)[1] for layer in tracked_layers(module, tracked)}


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "olmoe", "mixtral", "gpt_oss", "glm4_moe", "deepseek_v3", "llama4_text"]
)
def test_every_expert_is_a_layer_and_no_router_is(family: str) -> None:
    module = build_on_meta(zoo.configuration(family))
    layers = tracked_layers(module, "mlp")
    parameters = dict(module.named_parameters())
    experts = [layer for layer in layers if layer.stack]
    assert len({layer.name for layer in experts}) == len(experts)
    for stack in {layer.stack for layer in experts}:
        mine = [layer for layer in experts if layer.stack == stack]
        assert [layer.name for layer in mine] == [f"{stack}.{number}" for number in range(EXPERTS)]
        assert sum(layer.size for layer in mine) == parameters[stack].numel() + (
            parameters[f"{stack}_bias"].numel() if mine[0].bias else 0
        )
        assert all(layer.share == pytest.approx((1 if family == "llama4_text" else 2) / EXPERTS) for layer in mine)
    assert not [layer.name for layer in layers if "router" in layer.name or layer.name.endswith("gate")]


def test_nearly_all_of_a_gpt_oss_is_tracked() -> None:
    """The shape of gpt-oss-20b, embeddings and head apart: experts are 97 % and more of its blocks."""
    config = zoo.configuration("gpt_oss")
    sizes = {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_attention_heads": 64}
    for name, value in (sizes | {"num_key_value_heads": 8, "head_dim": 64, "num_hidden_layers": 2}).items():
        setattr(config, name, value)
    module = build_on_meta(config)
    tracked = sum(layer.size for layer in tracked_layers(module, "linear"))
    blocks = sum(p.numel() for name, p in module.named_parameters() if ".layers." in name)
    assert tracked > 0.97 * blocks


def test_a_wrappers_text_tower_is_tracked_alone() -> None:
    module = build_on_meta(zoo.configuration("gemma3"))
    vision = [name for name, _ in module.named_modules() if "vision_tower" in name and name.endswith("fc1")]
    assert vision
    for tracked in ("mlp", "attention", "linear"):
        assert all(layer.name.startswith("model.language_model.") for layer in tracked_layers(module, tracked))


def test_a_tower_that_text_does_not_reach_is_no_state_beside_attention(tmp_path: Path) -> None:
    """Phi-4's audio encoder convolves, and stands among the text's own modules."""
    found = describe(str(zoo.save("phi4_multimodal", tmp_path)), "mlp")
    assert found.recurrent == ""
    assert len(found.left_out) > 1
    assert all("embed_tokens_extend" in name for name in found.left_out)
    assert not any("embed_tokens_extend" in layer.name for layer in found.layers)


def test_a_wrappers_context_and_separators_are_its_text_towers(tmp_path: Path) -> None:
    found = describe(str(zoo.save("gemma3", tmp_path)), "mlp")
    assert (found.context, found.eos_id, found.bos_id) == (zoo.CONTEXT, 2, 1)
    assert found.sequence_length(zoo.CONTEXT) == zoo.CONTEXT


@pytest.mark.parametrize("family", ["nemotron_h", "recurrent_gemma"])
def test_attention_is_known_by_its_class_where_its_name_says_nothing(family: str) -> None:
    """Nemotron-H calls everything a mixer, RecurrentGemma calls attention a temporal block."""
    attention, mlp = leaves(family, "attention"), leaves(family, "mlp")
    assert {leaf.rpartition(".")[2] for leaf in attention} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert not attention & mlp


def test_a_layer_that_is_used_by_its_weight_alone_is_left_out_with_a_word(tmp_path: Path) -> None:
    found = describe(str(zoo.save("jamba", tmp_path)), "mlp")
    assert found.left_out == ("model.layers.0.mamba.dt_proj",)
    assert not set(found.left_out) & {layer.name for layer in found.layers}
    [warning] = found.warnings
    assert warning.startswith("model.layers.0.mamba.dt_proj are not tracked")
    with pytest.raises(ModelError, match="none of which the model runs on text"):
        describe(str(tmp_path / "jamba"), "dt_proj")


def test_a_rank_refuses_a_layer_that_its_model_does_not_run(tmp_path: Path) -> None:
    """Where the driver could not tell: a family whose code does not run on shapes alone."""
    path = zoo.save("jamba", tmp_path)
    idle = Layer("model.layers.0.mamba.dt_proj", 32, 5, True, "model.layers.0.mamba.dt_proj")
    layers = (*describe(str(path), "mlp").layers, idle)
    with pytest.raises(
        ModelError, match=r"dt_proj is seen 0 times in one forward and backward.*model\.tracked=<regex>"
    ):
        ModelWorker(WorkerSettings(ModelConfig(str(path)), layers, sharded=False), RankContext())


def test_a_layer_that_runs_twice_is_refused(tmp_path: Path) -> None:
    path = zoo.save("llama", tmp_path)
    model = load(ModelConfig(str(path), Dtype.float32), RankContext(), sharded=False)
    block = model.module.model.layers[0].mlp
    forward = block.forward
    block.forward = lambda h: forward(h) + forward(h)
    with pytest.raises(ModelError, match="is seen 2 times"):
        check_tracked(model.module, describe(str(path), "mlp").layers, "cpu")


@pytest.mark.parametrize("tracked", ["mlp", "attention"])
def test_a_weight_that_blocks_share_is_refused_by_both_names(tracked: str) -> None:
    module = build_on_meta(zoo.configuration("zamba"))
    with pytest.raises(ModelError, match=r"layers\.3\S+ and model\.layers\.1\S+ are one weight"):
        tracked_layers(module, tracked)


def test_choices_can_be_joined_and_the_head_chosen() -> None:
    module = build_on_meta(zoo.configuration("llama"))
    names = {
        tracked: [layer.name for layer in tracked_layers(module, tracked)]
        for tracked in ("mlp", "attention", "linear", "head", "mlp+head")
    }
    assert names["head"] == ["lm_head"]
    assert names["mlp+head"] == [*names["mlp"], "lm_head"]
    assert set(names["linear"]) == {*names["mlp"], *names["attention"]}


def test_a_tied_head_is_tracked_with_a_word(tmp_path: Path) -> None:
    assert describe(str(zoo.save("gemma", tmp_path)), "head").warnings == [
        "the output embeddings are tied to the input's, and are tracked as the head alone"
    ]
    assert not describe(str(zoo.save("llama", tmp_path)), "head").warnings


def test_layers_are_listed_by_their_place_in_a_block() -> None:
    module = build_on_meta(zoo.configuration("qwen3_moe"))
    assert by_block(tracked_layers(module, "mlp")) == [
        "model.layers.*.mlp.experts.gate_up_proj.*: 8 of 24 x 16",
        "model.layers.*.mlp.experts.down_proj.*: 8 of 16 x 12",
    ]


def test_projections_of_different_inputs_do_not_share_one(tmp_path: Path) -> None:
    """RWKV mixes every projection's input by itself, under names that elsewhere mean one input."""
    layers = describe(str(zoo.save("rwkv", tmp_path)), "linear").layers
    assert {"key", "value"} <= {layer.name.rpartition(".")[2] for layer in layers}
    assert all(layer.input_of == layer.name for layer in layers)


def test_a_library_that_a_family_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers says of Gemma 3n's tower for images, without timm; its sentence begins with an empty line."""

    class Needs:
        @staticmethod
        def from_config(*_: object, **__: object) -> None:
            raise ImportError("\nTimmWrapperModel requires the timm library but it was not found.\nInstall it.")

    monkeypatch.setattr(family, "auto_class", lambda _: Needs)
    with pytest.raises(
        ModelError, match=r"llama: .* not installed \(TimmWrapperModel requires the timm library .*install"
    ):
        build_on_meta(zoo.configuration("llama"))
