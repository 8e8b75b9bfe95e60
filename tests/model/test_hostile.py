"""A model folder from a stranger: nothing in it is executed, unpickled or fetched, and each refusal names the file."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from infscan.config import ModelConfig
from infscan.corpus.tokenizer import load_tokenizer
from infscan.errors import InfscanError, ModelError
from infscan.model.architecture import describe, weight_files
from infscan.model.load import load
from infscan.model.loaded import RankContext
from tests.steps.runs import tiny_model


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), tokenizer=True)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def refused(folder: Path) -> str:
    """What the driver says, and that a rank says no less."""
    with pytest.raises(ModelError) as caught:
        describe(str(folder), "mlp")
    with pytest.raises(ModelError):
        load(ModelConfig(path=str(folder)), RankContext(), sharded=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_beside_no_safetensors_is_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "owned")))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    assert name in refused(folder)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
def test_a_pickle_in_a_safetensors_name_is_refused(folder: Path, tmp_path: Path, form: str) -> None:
    path = folder / "model.safetensors"
    if form == "pickle":
        path.write_bytes(pickle.dumps(Trap(tmp_path / "owned")))
    else:
        torch.save(Trap(tmp_path / "owned"), path)
    assert "model.safetensors" in refused(folder)
    assert not (tmp_path / "owned").exists()


def test_a_pickle_beside_good_weights_is_left_alone(folder: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "owned")))
    describe(str(folder), "mlp")
    load(ModelConfig(path=str(folder)), RankContext(), sharded=False)
    assert load_tokenizer(str(folder)) is not None
    assert not (tmp_path / "owned").exists()


INDEXES = {
    "a pickle": {"weight_map": {"w": "pytorch_model.bin"}},
    "a path above": {"weight_map": {"w": "../../model.safetensors"}},
    "an absolute path": {"weight_map": {"w": "/etc/passwd"}},
    "a path below": {"weight_map": {"w": "sub/model.safetensors"}},
    "a number": {"weight_map": {"w": 7}},
    "no map": {"metadata": {}},
    "an empty map": {"weight_map": {}},
    "a list": [1],
    "a file that is not there": {"weight_map": {"w": "gone.safetensors"}},
}


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_names_only_safetensors_files_beside_it(folder: Path, tmp_path: Path, case: str) -> None:
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "owned")))
    (folder / "model.safetensors.index.json").write_text(json.dumps(INDEXES[case]))
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        weight_files(folder)
    refused(folder)
    assert not (tmp_path / "owned").exists()


def own_code(folder: Path, owned: Path) -> None:
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(owned)!r}).touch()\nclass Evil: pass\n")


@pytest.mark.parametrize("family", ["known", "unknown"])
def test_a_model_with_code_of_its_own_is_refused(folder: Path, tmp_path: Path, family: str) -> None:
    own_code(folder, tmp_path / "owned")
    names = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    change(folder / "config.json", auto_map=names, **({"model_type": "evil"} if family == "unknown" else {}))
    assert str(folder) in refused(folder)
    assert not (tmp_path / "owned").exists()


def test_a_tokenizers_own_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    own_code(folder, tmp_path / "owned")
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        tokenizer_class="Evil",
        chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}{% for x in range(10**9) %}{% endfor %}",
    )
    try:
        tokenizer = load_tokenizer(str(folder))
    except ModelError as error:
        assert str(folder) in str(error)  # noqa: PT017 (refusing it is right, and so is reading its vocabulary only)
    else:
        assert tokenizer is not None
        assert len(tokenizer.encode("the river")) > 0
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_code_from_a_hub_is_refused(folder: Path, key: str) -> None:
    change(folder / "config.json", **{key: "kernels-community/evil"})
    said = refused(folder)
    assert "kernels-community/evil" in said
    assert "never run" in said


def test_an_adapter_is_refused_as_it_would_load_another_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "evil/base", "peft_type": "LORA"})
    )
    assert "adapter_config.json" in refused(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": -1},
        {"num_hidden_layers": "many"},
        {"num_attention_heads": 0},
        {"hidden_act": 7},
        {"dtype": "__class__"},
        {"dtype": [1]},
        {"torch_dtype": "Tensor"},
        {"text_config": {"dtype": 8}},
        {"num_hidden_layers": 20_000},
        {"eos_token_id": "</s>"},
        {"bos_token_id": -1},
    ],
    ids=str,
)
def test_impossible_sizes_are_refused_without_a_traceback(folder: Path, values: dict[str, Any]) -> None:
    change(folder / "config.json", **values)
    with pytest.raises(ModelError):
        describe(str(folder), "mlp")


def test_a_list_without_an_end_of_sequence_names_none(folder: Path) -> None:
    change(folder / "config.json", eos_token_id=[])
    assert describe(str(folder), "mlp").eos_id is None


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": ' * 50_000, '{"model_type": "\\ud800"}', "null"], ids=len)
def test_a_config_that_is_no_object_is_refused_by_its_name(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(InfscanError, match=r"config\.json"):
        describe(str(folder), "mlp")
