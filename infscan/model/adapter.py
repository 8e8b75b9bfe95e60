"""A LoRA adapter merged into the weights that it adapts: W + s B A (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from infscan.errors import ConfigError, ModelError
from infscan.model.architecture import load_config, weight_files
from infscan.model.family import build_on_meta, first_line
from infscan.model.folder import model_folder
from infscan.storage import MissingError, Store

_PREFIX = "base_model.model."
# What an adapter may ask for beyond W + s B A, and the value with which it does not.
_PLAIN = {"bias": ("none",), "use_dora": (False,), "rank_pattern": ({},), "alpha_pattern": ({},), "lora_bias": (False,)}
# Keys that are nothing where they are empty: layers or tokens of their own, other products, uses of only some tokens.
_EMPTY = (
    *("modules_to_save", "layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora"),
    *("use_qalora", "arrow_config", "kasa_config", "monteclora_config", "alora_invocation_tokens"),
)
# Ways to begin with B A = 0, so that the model which the adapter changes is the one that it names. The others (PiSSA,
# OLoRA, CorDA, LoftQ, LoRA-GA) begin by taking something off it.
_FROM_ZERO = (None, True, False, "gaussian", "eva", "orthogonal")


def merge(adapter: str, model: str | None, output: str) -> str:
    """Write the model folder `output`: `model` with the adapter in its weights; returns its address.

    model: a folder, URI or hub id; None is the one that adapter_config.json names. config.json is written last, so a
    folder that is not whole is no model.

    Raises:
        ModelError: where the adapter or the model cannot be used, or do not belong together.
        ConfigError: where `output` is there already, or nothing says what the adapter adapts.
    """
    target, folder = Store(output), model_folder(adapter, key="adapter")
    if target.list():
        raise ConfigError(f"output={target.uri} is there already; give a folder that is not.")
    config = read_adapter_config(folder)
    named, revision = (model, None) if model else (config.get("base_model_name_or_path"), config.get("revision"))
    if not named:
        raise ConfigError(f"{adapter} does not name the model that it adapts; give model=<folder or hub id>.")
    base = model_folder(str(named), revision=revision, key="model")
    with target.removed_unless_used():
        target.check_writable()
        for name, tensors in merged_files(base, folder):
            target.write(name, save(tensors, metadata={"format": "pt"}))
        weights = {path.name for path in weight_files(base)}
        source = Store(str(base))
        names = [entry.name for entry in source.list() if "/" not in entry.name and entry.name not in weights]
        for name in sorted(names, key=lambda name: name == "config.json"):
            if name.endswith((".json", ".txt", ".model")):
                target.write(name, source.read(name))
    return target.uri


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA adapter.

    Raises:
        ModelError: where there is none, or where it asks for more than W + s B A.
    """
    try:
        config: dict[str, Any] = Store(str(folder)).read_json("adapter_config.json")
    except MissingError:
        raise ModelError(f"{folder} has no adapter_config.json: it is not an adapter; give peft's folder.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{folder}/adapter_config.json is not what peft writes; copy the adapter again.")
    odd = [key for key, plain in _PLAIN.items() if config.get(key) not in (None, *plain)]
    odd += [key for key in _EMPTY if config.get(key)]
    # What peft learnt since; rsLoRA is another scale.
    odd += [key for key in config if key.startswith("use_") and config[key] is True and key != "use_rslora"]
    if config.get("peft_type") != "LORA" or odd:
        what = f"{odd[0]}={json.dumps(config[odd[0]])}" if odd else f"peft_type={config.get('peft_type')}"
        raise ModelError(f"{folder}: {what} is more than W + s B A; merge it with peft's merge_and_unload instead.")
    begun = config.get("init_lora_weights")
    if begun not in _FROM_ZERO:
        raise ModelError(
            f"{folder}: init_lora_weights={json.dumps(begun)} changes the model's own weights before training, so "
            "W + s B A of the plain model is another one; save the adapter with peft's "
            "path_initial_model_for_weight_conversion, or merge it with merge_and_unload where it was trained."
        )
    for key, kinds in (("r", int), ("lora_alpha", int | float)):
        value = config.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ModelError(f"{folder}: {key}={json.dumps(value)} is not a number above 0; copy the adapter again.")
    return config


def merged_files(base: Path, adapter: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The base's weight files by name, every adapted W replaced by W + s B A, in W's dtype (summed in float32).

    W: [O, I] ([I, O] of a Conv1D, as GPT-2's are); B: [O, r]; A: [r, I]; s = lora_alpha / r, or / sqrt(r) with
    use_rslora.

    Raises:
        ModelError: before the first file, where the adapter has a part that is none, or that the base has no weight
            for.
    """
    config = read_adapter_config(adapter)
    rank = int(config["r"])
    scale = float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    module = build_on_meta(load_config(base))
    name_of = _names(module)
    pairs = {name_of(name): pair for name, pair in _pairs(adapter).items()}
    _check_pairs(adapter, base, pairs, rank, {name_of(key) for path in weight_files(base) for key in _keys(path)})
    for path in weight_files(base):
        tensors = _read(path)
        for name in sorted(key for key in tensors if name_of(key) in pairs):
            A_ri, B_or = pairs[name_of(name)]
            weight = tensors[name]
            change = scale * (B_or.float() @ A_ri.float())
            change = change.T if _is_transposed(module, name_of(name), bool(config.get("fan_in_fan_out"))) else change
            if change.shape != weight.shape:
                raise ModelError(
                    f"{adapter}: {name} is adapted as {tuple(change.shape)}, and {base} has {tuple(weight.shape)}; "
                    "give the model that it adapts."
                )
            tensors[name] = (weight.float() + change).to(weight.dtype)
        yield path.name, tensors


def _check_pairs(
    adapter: Path, base: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], rank: int, there: set[str]
) -> None:
    if not pairs:
        raise ModelError(f"{adapter}: its file has no lora_A and lora_B, so there is nothing to merge; copy it again.")
    for name, (A_ri, B_or) in pairs.items():
        if B_or.ndim != 2 or A_ri.ndim != 2 or B_or.shape[1] != A_ri.shape[0]:
            raise ModelError(
                f"{adapter}: {name} has B of {tuple(B_or.shape)} and A of {tuple(A_ri.shape)}, which have no product; "
                "copy the adapter again."
            )
        if len(A_ri) != rank:
            raise ModelError(
                f"{adapter}: {name} has rank {len(A_ri)}, and adapter_config.json says r={rank}, which is in the "
                "scale; copy the adapter again, both its files."
            )
        if not all(part.is_floating_point() and bool(part.isfinite().all()) for part in (A_ri, B_or)):
            raise ModelError(f"{adapter}: {name} has values that are no finite floats; train or copy it again.")
    if missing := pairs.keys() - there:
        raise ModelError(f"{adapter} adapts {min(missing)}, which {base} does not have; give the model that it adapts.")


def _is_transposed(module: PreTrainedModel, name: str, said: bool) -> bool:
    """Whether a weight is [I, O]: by its module's kind, as peft has it, and by what the adapter says of any other."""
    try:
        holder = module.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return said
    return isinstance(holder, Conv1D) if isinstance(holder, Conv1D | nn.Linear) else said


def _keys(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _names(module: PreTrainedModel) -> Callable[[str], str]:
    """From a name in a file to the weight's own, whatever transformers wrote the file (gpt2's lack `transformer.`)."""
    mapping = get_model_conversion_mapping(module)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    names, prefix = module.state_dict(), module.base_model_prefix

    def name_of(key: str) -> str:
        found = str(rename_source_key(key, renamings, [], prefix, names)[0])
        return found if found in names else key

    return name_of


def _pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by the name of the weight that they change."""
    path = folder / "adapter_model.safetensors"
    if not Store(str(folder)).exists(path.name):
        raise ModelError(f"{folder} has no {path.name}; save the adapter as safetensors (pickles are never opened).")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in _read(path).items():
        name, _, kind = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if kind not in ("lora_A", "lora_B"):
            raise ModelError(f"{path}: {key} is no part of W + s B A; merge it with peft's merge_and_unload instead.")
        parts.setdefault(f"{name}.weight", {})[kind] = tensor
    half = [name for name, both in parts.items() if len(both) < 2]
    if half:
        raise ModelError(f"{path}: {half[0]} has only one of lora_A and lora_B; copy the adapter again.")
    return {name: (both["lora_A"], both["lora_B"]) for name, both in parts.items()}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a safetensors handle is no dict)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}); copy it again.") from None
