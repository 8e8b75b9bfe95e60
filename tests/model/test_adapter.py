"""A merged adapter is W + s B A, computed by hand, and a model that loads; what is more than that is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infscan.cli import main
from infscan.config.commands import commands
from infscan.errors import ConfigError, ModelError, StorageError
from infscan.model.adapter import merge, merged_files
from infscan.model.architecture import describe
from infscan.model.folder import WEIGHTS
from infscan.storage import Store
from tests.conftest import Bucket
from tests.model.test_hostile import Trap
from tests.steps.runs import tiny_model

RANK, ALPHA = 4, 6.0
NAMES = ("gpt_neox.layers.0.mlp.dense_h_to_4h", "gpt_neox.layers.1.attention.dense")


def adapter(folder: Path, base: Path, **changes: Any) -> Path:
    folder.mkdir()
    weights = load_file(base / "model.safetensors")
    tensors = {}
    for number, name in enumerate(NAMES):
        O, I = weights[f"{name}.weight"].shape
        draw = torch.Generator().manual_seed(number)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, I, generator=draw)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(O, RANK, generator=draw)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "modules_to_save": None, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "base")


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / RANK**0.5),
        ({"init_lora_weights": "gaussian"}, ALPHA / RANK),
        ({"init_lora_weights": True}, ALPHA / RANK),
    ],
)
def test_a_merged_model_has_the_adapted_weights_and_no_others(
    base: Path, tmp_path: Path, changes: dict[str, Any], scale: float
) -> None:
    folder = adapter(tmp_path / "adapter", base, **changes)
    merge(str(folder), str(base), str(tmp_path / "merged"))
    parts = load_file(folder / "adapter_model.safetensors")
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (base, tmp_path / "merged"))
    for key, weight in after.items():
        expected = before[key]
        if (name := key.removesuffix(".weight")) in NAMES and key.endswith(".weight"):
            A_ri, B_or = (parts[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
            expected = expected + scale * torch.einsum("or,ri->oi", B_or, A_ri)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-6)
    assert describe(str(tmp_path / "merged"), "mlp").layers == describe(str(base), "mlp").layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"use_dora": True}, "use_dora=true"),
        ({"bias": "all"}, 'bias="all"'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"x": 2}}, "rank_pattern"),
        ({"use_what_comes_next": True}, "use_what_comes_next=true"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa" changes the model'),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    ],
)
def test_what_is_more_than_a_product_is_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=f"{message}.*merge_and_unload"):
        list(merged_files(base, adapter(tmp_path / "adapter", base, **changes)))


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
@pytest.mark.parametrize("value", [0, -1, "x", None, True, [], float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(base: Path, tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"{key}=.* is not a number above 0"):
        list(merged_files(base, adapter(tmp_path / "adapter", base, **{key: value})))


@pytest.mark.parametrize("content", ["[]", "7", "{", "null"])
def test_a_configuration_that_is_none_is_refused(base: Path, tmp_path: Path, content: str) -> None:
    folder = adapter(tmp_path / "adapter", base)
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises((ModelError, StorageError), match=r"adapter_config\.json"):
        list(merged_files(base, folder))


def test_parts_without_a_product_are_refused(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base)
    parts = load_file(folder / "adapter_model.safetensors")
    parts = {key: part[:3].clone() if "lora_A" in key else part for key, part in parts.items()}
    save_file(parts, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="which have no product"):
        list(merged_files(base, folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda part, kind: part[:3] if kind == "A" else part[:, :3], "has rank 3, and adapter_config.json says r=4"),
        (lambda part, kind: part * float("nan"), "no finite floats"),
        (lambda part, kind: part.to(torch.int8), "no finite floats"),
        (lambda part, kind: None, "nothing to merge"),
    ],
)
def test_parts_that_would_merge_into_something_else_are_refused_and_leave_no_folder(
    base: Path, tmp_path: Path, change: Callable[[torch.Tensor, str], torch.Tensor | None], said: str
) -> None:
    folder = adapter(tmp_path / "adapter", base)
    parts = load_file(folder / "adapter_model.safetensors")
    changed = {key: change(part, key.rpartition("lora_")[2][0]) for key, part in parts.items()}
    kept = {key: part.contiguous().clone() for key, part in changed.items() if part is not None}
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=said):
        merge(str(folder), str(base), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("said", [True, False])
def test_how_a_weight_lies_is_its_modules_kind_whatever_the_adapter_says(tmp_path: Path, said: bool) -> None:
    base = tiny_model(tmp_path / "base", family="gpt2")
    name = "transformer.h.0.attn.c_proj"  # a square Conv1D
    A_ri, B_or = torch.randn(RANK, 32), torch.randn(32, RANK)
    folder = adapter(tmp_path / "adapter", tiny_model(tmp_path / "other"), fan_in_fan_out=said)
    parts = {f"base_model.model.{name}.lora_A.weight": A_ri, f"base_model.model.{name}.lora_B.weight": B_or}
    save_file(parts, folder / "adapter_model.safetensors")
    [(_, merged)] = merged_files(base, folder)
    before = load_file(base / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(merged[f"{name}.weight"], before + ALPHA / RANK * (B_or @ A_ri).T)


def test_a_pickled_adapter_is_never_opened(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "owned")))
    with pytest.raises(ModelError, match="pickles are never opened"):
        list(merged_files(base, folder))
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        list(merged_files(base, folder))
    assert not (tmp_path / "owned").exists()


def test_another_models_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base)
    with pytest.raises(ModelError, match=r"layers\.1\.attention\.dense\.weight, which .* does not have"):
        list(merged_files(tiny_model(tmp_path / "shallow", layers=1), folder))
    with pytest.raises(ModelError, match=r"is adapted as \(64, 32\)"):
        list(merged_files(tiny_model(tmp_path / "narrow", width=16), folder))


def test_nothing_is_overwritten(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there already"):
        merge(str(adapter(tmp_path / "adapter", base)), str(base), str(base))


def hub_layout(folder: Path) -> Path:
    """A GPT-2 as the hub has it: an old file, without the prefix `transformer.`."""
    tiny_model(folder, family="gpt2")
    weights = {key.removeprefix("transformer."): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_an_adapter_finds_its_weights_in_the_hubs_own_gpt2(tmp_path: Path) -> None:
    base, folder = hub_layout(tmp_path / "base"), tmp_path / "adapter"
    name = "h.0.attn.c_attn"
    A_ri, B_or = torch.randn(RANK, 32), torch.randn(96, RANK)
    parts = {"lora_A": A_ri, "lora_B": B_or}
    folder.mkdir()
    save_file(
        {f"base_model.model.transformer.{name}.{kind}.weight": part for kind, part in parts.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "fan_in_fan_out": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    merge(str(folder), str(base), str(tmp_path / "merged"))
    before, after = load_file(base / WEIGHTS), load_file(tmp_path / "merged" / WEIGHTS)
    expected = before.pop(f"{name}.weight") + ALPHA / RANK * (B_or @ A_ri).T
    torch.testing.assert_close(after.pop(f"{name}.weight"), expected)
    assert all(torch.equal(after[key], before[key]) for key in before)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_the_command_is_told_the_model_and_writes_to_a_store(
    base: Path, tmp_path: Path, moto_s3: Bucket, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    away = Store(moto_s3.uri())
    for path in adapter(tmp_path / "adapter", base, base_model_name_or_path="elsewhere").iterdir():
        away.write(path.name, path.read_bytes())
    target = moto_s3.uri()
    main("merge", [f"adapter={away.uri}", f"model={base}", f"output={target}"])
    assert target in capsys.readouterr().out
    assert {"config.json", WEIGHTS} <= {entry.name for entry in Store(target).list()}
    assert not (tmp_path / "s3:").exists()
    with pytest.raises(SystemExit):
        main("merge", [f"adapter={tmp_path / 'adapter'}", f"model={tmp_path / 'gone'}", f"output={tmp_path / 'out'}"])
    assert f"model={tmp_path / 'gone'}: there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(commands()))
def test_a_key_has_no_groups_name_unless_the_group_is_the_commands(name: str) -> None:
    command = commands()[name]
    groups = {path.name for path in Path(command.folder).iterdir() if path.is_dir()} - set(command.groups)
    texts = {key for key, setting in command.all_settings.items() if setting.is_text}
    assert not groups & texts
