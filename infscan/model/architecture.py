"""What a model is, found without loading its weights: its tracked layers, vocabulary, context and fingerprint."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import zip_longest
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from infscan.config import AttentionImplementation
from infscan.errors import ModelError
from infscan.influence.layers import Layer
from infscan.model.family import (
    build_on_meta,
    first_line,
    quantised,
    recurrent_parts,
    refuse_encoder,
    refuse_quantised,
    with_attention,
)
from infscan.model.folder import WEIGHTS, WEIGHTS_INDEX, hub_commit, indexed_files, model_folder
from infscan.model.gathered import largest_block
from infscan.model.probe import run_on_shapes, runs
from infscan.model.tracked import head_path, left_out, linear_names, tied_head, tracked_layers
from infscan.storage import LFS_POINTER, Store, is_lfs_pointer, look_up
from infscan.storage.foreign import BadJsonError, parse_json

DEFAULT_LENGTH = 512
_MOST_LAYERS = 1024
# What transformers raises for a configuration that it cannot use.
_UNUSABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StrictDataclassError)
# Of a large weight file these many spread samples enter the fingerprint; files up to one chunk enter whole.
_SAMPLES, _SAMPLE_BYTES, _WHOLE_BYTES = 256, 1 << 16, 256 << 20


@dataclass(frozen=True)
class Architecture:
    """A causal language model as the driver knows it: no weights, no GPU.

    folder: local folder of the checkpoint. context: the longest sequence. eos_id: joins documents (None: unknown).
    shapes: of every parameter, by name, the two embeddings apart (a fine-tuned model's may have tokens more).
    revision: the commit that a hub id was resolved to.
    takes_positions: whether it takes position ids, without which documents of a sequence cannot be kept apart.
    recurrent: the class of a part that carries a state from token to token, which keeps none apart either; else empty.
    left_out: linears of the chosen kinds that the model does not run on text. tied_head: whether the output embeddings
    are tracked, and are the input's too. block: parameters of the largest decoder block (0: unknown). head: the path of
    the output embeddings (empty: unknown).
    """

    folder: str
    fingerprint: str
    vocab_size: int
    context: int
    eos_id: int | None
    bos_id: int | None
    layers: tuple[Layer, ...]
    parameters: int
    family: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    takes_positions: bool = True
    recurrent: str = ""
    left_out: tuple[str, ...] = ()
    tied_head: bool = False
    revision: str | None = None
    block: int = 0
    head: str = ""

    def with_span(self, span: int, above: int) -> Architecture:
        """The same, where the output embeddings keep so many eigenvectors of S if they have more rows than `above`."""
        layers = tuple(
            replace(layer, span=min(span, layer.outputs))
            if layer.name == self.head and layer.outputs > above
            else layer
            for layer in self.layers
        )
        return replace(self, layers=layers)

    @property
    def inputs(self) -> tuple[Layer, ...]:
        """The layers whose A is their own; the others share one of these."""
        return tuple(layer for layer in self.layers if layer.input_of == layer.name)

    @property
    def warnings(self) -> list[str]:
        """What is tracked otherwise than one may think."""
        found = []
        if self.left_out:
            found.append(
                f"{self.left_out[0]}{f' and {len(self.left_out) - 1} more' if self.left_out[1:] else ''} are not "
                "tracked: the model does not run them as layers on text"
            )
        if self.tied_head:
            found.append("the output embeddings are tied to the input's, and are tracked as the head alone")
        return found

    def sequence_length(self, asked: int | None) -> int:
        """T: what was asked for, else the context, at most 512 (docs/method.md#notation).

        Raises:
            ModelError: where more is asked for than the model's context.
        """
        if asked is not None and asked > self.context:
            raise ModelError(
                f"corpus.sequence_length={asked} is longer than the model's context of {self.context} tokens; "
                f"give at most {self.context}."
            )
        return asked or min(self.context, DEFAULT_LENGTH)


def describe(
    path: str,
    tracked: str,
    *,
    weights: bool = True,
    attention: AttentionImplementation = AttentionImplementation.auto,
    revision: str | None = None,
) -> Architecture:
    """Read a model's configuration and module tree (on the meta device: no weight is loaded).

    weights: they must be there, and are in the fingerprint; else config.json is enough, and it is the configuration's.
    revision: of a hub id (`model_folder`).

    Raises:
        ModelError: for a folder that is not a causal language model in safetensors, or where `tracked` finds no layer.
    """
    folder = model_folder(path, weights=weights, revision=revision)
    config = load_config(folder)
    files = weight_files(folder) if weights else []
    kinds = _check_whole(files)
    refuse_encoder(config)
    refuse_quantised(config)
    module = build_on_meta(with_attention(config, attention))
    _check_tensors(folder, kinds, module.base_model_prefix)
    text = config.get_text_config()
    states = recurrent_parts(module)
    # A convolution may be used by its weight: it runs where the module around it does.
    around = {name: name.rpartition(".")[0] for name in states}
    ran = run_on_shapes(module, [*linear_names(module), *states, *around.values()])
    layers = tracked_layers(module, tracked, ran)
    context = getattr(text, "max_position_embeddings", None) or DEFAULT_LENGTH
    return Architecture(
        folder=str(folder),
        fingerprint=_fingerprint(folder, files),
        vocab_size=module.get_input_embeddings().weight.shape[0],
        context=int(context),
        eos_id=_token_id(config, "eos_token_id"),
        bos_id=_token_id(config, "bos_token_id"),
        layers=layers,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        family=str(config.model_type),
        shapes=_inner_shapes(module),
        revision=hub_commit(path, str(folder)),
        takes_positions="position_ids" in signature(module.forward).parameters,
        recurrent=next((kind for name, kind in states.items() if runs(ran, name) or runs(ran, around[name])), ""),
        left_out=left_out(module, tracked, ran),
        tied_head=any(layer.name == tied_head(module) for layer in layers),
        block=largest_block(module),
        head=head_path(module) or "",
    )


def _inner_shapes(module: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    ends = [end for end in (module.get_input_embeddings(), module.get_output_embeddings()) if end is not None]
    outer = {id(parameter) for end in ends for parameter in end.parameters()}
    return {name: tuple(value.shape) for name, value in module.named_parameters() if id(value) not in outer}


def check_agree(one: Architecture, other: Architecture, one_key: str, other_key: str) -> None:
    """Refuse two stages of training that are not of one architecture: influence passes from weight to weight.

    Vocabularies may differ: the embeddings are not tracked, unless model.tracked names them. The keys are for people.

    Raises:
        ModelError: naming the first difference.
    """
    difference = ""
    if one.family != other.family:
        difference = f"{one.family} and {other.family}"
    elif changed := sorted(
        name for name in one.shapes.keys() | other.shapes.keys() if one.shapes.get(name) != other.shapes.get(name)
    ):
        name = changed[0]
        first, second = (str(each.shapes.get(name, "missing")) for each in (one, other))
        difference = f"{name} is {first} and {second}, one of {len(changed)} parameters that differ"
    elif (layers := _shapes(one)) != (others := _shapes(other)):
        pairs = zip_longest(layers, others)
        difference = "the tracked layers are {} and {}".format(*next(pair for pair in pairs if pair[0] != pair[1]))
    if difference:
        raise ModelError(
            f"{one_key} ({one.folder}) and {other_key} ({other.folder}) are not of one architecture: {difference}; "
            "give checkpoints of one model's training, a LoRA adapter merged into its weights."
        )


def _shapes(architecture: Architecture) -> list[Layer]:
    """The tracked layers, however much is kept of their factors."""
    return [replace(layer, span=0) for layer in architecture.layers]


def _token_id(config: PretrainedConfig, name: str) -> int | None:
    """Of the configuration, or of the part of it that is of text."""
    values = (getattr(each, name, None) for each in (config, config.get_text_config()))
    value = next((each for each in values if each is not None), None)
    if isinstance(value, list):
        value = value[0] if value else None
    if value is not None and (type(value) is not int or value < 0):
        raise ModelError(f"config.json: {name}={str(value)[:80]!r} is no token id; give a whole number, or null.")
    return value


def _check_values(value: object, where: str) -> None:
    """Refuse what transformers would only notice with a traceback, or after minutes.

    Raises:
        ModelError: for a config.json that is no object, a dtype that torch does not have, layers without an end.
    """
    if not isinstance(value, dict):
        raise ModelError(f"{where} holds no JSON object; copy it from the model again.")
    for key, item in value.items():
        if isinstance(item, dict):
            _check_values(item, where)
        elif key in ("dtype", "torch_dtype") and item is not None:
            name = item.removeprefix("torch.") if isinstance(item, str) else ""
            if not isinstance(getattr(torch, name, None) if name.isidentifier() else None, torch.dtype):
                raise ModelError(f"{where}: {key}={str(item)[:80]!r} is no dtype of torch; write float32 or bfloat16.")
        elif "layer" in key and isinstance(item, int) and item > _MOST_LAYERS:
            raise ModelError(f"{where}: {key}={str(item)[:20]} is above {_MOST_LAYERS}: no model has as many.")


def load_config(folder: Path) -> PretrainedConfig:
    """The model's config.json, never with code of its own (trust_remote_code stays off)."""
    if Store(str(folder)).exists("adapter_config.json") and not Store(str(folder)).exists(WEIGHTS):
        raise ModelError(
            f"{folder} is a LoRA adapter, not a model; merge it into the model that it adapts: "
            f"infscan merge adapter={folder} output=<folder>, or peft's merge_and_unload and save_pretrained."
        )
    if not Store(str(folder)).exists("config.json"):
        raise ModelError(f"{folder} has no config.json: it is not an HF-layout model folder; give one that has.")
    try:
        values = parse_json(Store(str(folder)).read("config.json"))
    except BadJsonError as error:
        raise ModelError(f"{folder}/config.json cannot be used ({error}); copy it from the model again.") from None
    _check_values(values, f"{folder}/config.json")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except _UNUSABLE as error:
        raise ModelError(
            f"{folder}/config.json cannot be used ({first_line(error)}); give a causal language model of a "
            "family that the installed transformers knows (models that bring their own code are refused)."
        ) from None
    if getattr(config, "auto_map", None):
        raise ModelError(f"{folder} asks for code of its own (auto_map), which is never run; give a known family.")
    asked = str(getattr(config, "_attn_implementation", None) or "")
    if "/" in asked or "|" in asked:
        # transformers would fetch and run it from the hub.
        raise ModelError(
            f"{folder}/config.json asks for attention code from a hub ({asked[:80]!r}), which is never run; remove "
            "attn_implementation from it."
        )
    if Store(str(folder)).exists("adapter_config.json"):
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json), which would load another model's weights; merge it into "
            "its model and save that."
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: model.safetensors, or those its index names, in name order.

    Other safetensors files beside them (the same weights in another layout, adapters) are not the model's.

    Raises:
        ModelError: where there are none (a pickle checkpoint is refused by name), or one of the index is missing.
    """
    store = Store(str(folder))
    there = {entry.name for entry in store.list() if "/" not in entry.name}
    if WEIGHTS in there:
        return [folder / WEIGHTS]
    if WEIGHTS_INDEX in there:
        wanted = indexed_files(store.read_json(WEIGHTS_INDEX), str(folder))
        missing = [name for name in wanted if name not in there]
        if missing:
            raise ModelError(
                f"{folder}: {WEIGHTS_INDEX} names {missing[0]}, which is not there ({len(missing)} of {len(wanted)} "
                "missing); complete the download or the copy."
            )
        return [folder / name for name in wanted]
    pickles = sorted(name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    found = f"only {pickles[0]}, a pickle, which is never opened" if pickles else "nor an index of it"
    raise ModelError(f"{folder}: no {WEIGHTS} ({found}); save the model with save_pretrained of transformers 5.")


def _check_whole(files: list[Path]) -> dict[str, str]:
    """Refuse a file whose header does not fit its size, before a worker tries to load it; the dtypes by tensor.

    Raises:
        ModelError: also for a tensor that two of the files bring.
    """
    kinds: dict[str, str] = {}
    for path in files:
        if (file := look_up(str(path))) is not None and is_lfs_pointer(file):
            raise ModelError(f"{path} {LFS_POINTER}.")
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: str(file.get_slice(key).get_dtype()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} cannot be read ({first_line(error)}): it is cut off or damaged; copy or download it again."
            ) from None
        if twice := kinds.keys() & found.keys():
            raise ModelError(
                f"{path} and another of the model's files both bring {min(twice)}; copy or save the model again."
            )
        kinds |= found
    return kinds


# How libraries call the parts of a quantised weight, and the dtypes that no float weight has.
_PARTS = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".scb", ".absmax", "_blocks")
_NO_FLOATS = ("I8", "U8", "I16", "U16", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")


def _check_tensors(folder: Path, kinds: dict[str, str], prefix: str) -> None:
    """Refuse weights that are quantised though config.json does not say so, and a tensor that is there by two names.

    kinds: dtypes by tensor, as safetensors calls them. prefix: what the base model's names may begin with, or not.
    """
    for key, kind in kinds.items():
        if key.lower().endswith(_PARTS):
            raise quantised(str(folder), key)
        if key.endswith("weight") and kind in _NO_FLOATS:
            raise quantised(str(folder), f"{key} is {kind}")
        if (other := f"{prefix}.{key}") in kinds:
            raise ModelError(f"{folder}: {key} and {other} are one weight by two names; save the model again.")


def fingerprint_of(path: str, revision: str | None = None) -> str:
    """A model's fingerprint, as `describe` gives it: of what is at a path now."""
    folder = model_folder(path, revision=revision)
    return _fingerprint(folder, weight_files(folder))


def _fingerprint(folder: Path, files: list[Path]) -> str:
    """SHA-256 over config.json and the weights: whole files where they are small, header and samples where large."""
    digest = hashlib.sha256()
    store = Store(str(folder))
    for name in ["config.json", *(path.name for path in files)]:
        with store.open(name) as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            digest.update(f"{name}:{size}:".encode())
            if size <= _WHOLE_BYTES:
                digest.update(stream.read())
                continue
            for index in range(_SAMPLES):
                stream.seek(index * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
