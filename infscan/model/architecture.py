"""What a model is, found without loading its weights: its tracked layers, vocabulary, context and fingerprint."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from infscan.errors import ModelError
from infscan.influence.layers import Layer
from infscan.model.folder import WEIGHTS, WEIGHTS_INDEX, commit_of, indexed_files
from infscan.model.folder import model_folder as model_folder
from infscan.storage import LFS_POINTER, Store, is_lfs_pointer, look_up

DEFAULT_LENGTH = 512
# Of a large weight file these many spread samples enter the fingerprint; files up to one chunk enter whole.
_SAMPLES, _SAMPLE_BYTES, _WHOLE_BYTES = 256, 1 << 16, 256 << 20

_ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|self_attention)([._]|$)")
_ROUTER = re.compile(r"(^|[._])router([._]|$)|(^|\.)(gate|shared_expert_gate)$")
# Model types that transformers builds with a causal head too: encoders, unless `is_decoder` makes them causal,
_ENCODERS = frozenset(
    {"bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"}
    | {"reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer"}
    | {"xlm-roberta", "xlm-roberta-xl", "xmod"}
)
# those that see ahead whatever their configuration says, and decoders that are half of a model.
_BOTH_WAYS = frozenset({"xlm", "xlnet"})
_ENCODER_DECODERS = frozenset(
    {"bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"}
    | {"prophetnet", "t5", "whisper"}
)
# Linear layers that a block applies to one input tensor, by the names that model families give them.
_SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


@dataclass(frozen=True)
class Architecture:
    """A causal language model as the driver knows it: no weights, no GPU.

    folder: local folder of the checkpoint. context: the longest sequence. eos_id: joins documents (None: unknown).
    shapes: of every parameter, by name, the two embeddings apart (a fine-tuned model's may have tokens more).
    revision: the commit of a model of the hub.
    takes_positions: whether it is told positions, without which documents of a sequence cannot be kept apart.
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
    revision: str | None = None

    @property
    def inputs(self) -> tuple[Layer, ...]:
        """The layers whose A is their own; the others share one of these."""
        return tuple(layer for layer in self.layers if layer.input_of == layer.name)

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


def describe(path: str, tracked: str, *, weights: bool = True, revision: str | None = None) -> Architecture:
    """Read a model's configuration and module tree (on the meta device: no weight is loaded).

    weights: they must be there, and are in the fingerprint; else config.json is enough, and it is the configuration's.

    Raises:
        ModelError: for a folder that is not a causal language model in safetensors, or where `tracked` finds no layer.
    """
    folder = model_folder(path, weights=weights, revision=revision)
    config = load_config(folder)
    files = weight_files(folder) if weights else []
    _check_whole(files)
    refuse_encoder(config)
    module = build_on_meta(config)
    layers = tracked_layers(module, tracked)
    context = getattr(config, "max_position_embeddings", None) or DEFAULT_LENGTH
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
        revision=commit_of(folder),
        takes_positions="position_ids" in signature(module.forward).parameters,
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
    elif one.layers != other.layers:
        pairs = zip_longest(one.layers, other.layers)
        difference = "the tracked layers are {} and {}".format(*next(pair for pair in pairs if pair[0] != pair[1]))
    if difference:
        raise ModelError(
            f"{one_key} ({one.folder}) and {other_key} ({other.folder}) are not of one architecture: {difference}; "
            "give checkpoints of one model's training, a LoRA adapter merged into its weights."
        )


def _token_id(config: PretrainedConfig, name: str) -> int | None:
    value = getattr(config, name, None)
    return int(value[0] if isinstance(value, list) else value) if value is not None else None


def load_config(folder: Path) -> PretrainedConfig:
    """The model's config.json, never with code of its own (trust_remote_code stays off)."""
    if Store(str(folder)).exists("adapter_config.json") and not Store(str(folder)).exists(WEIGHTS):
        raise ModelError(
            f"{folder} is a LoRA adapter, not a model; merge it into the model that it adapts: "
            f"python jobs/merge.py adapter={folder} output=<folder>, or peft's merge_and_unload and save_pretrained."
        )
    if not Store(str(folder)).exists("config.json"):
        raise ModelError(f"{folder} has no config.json: it is not an HF-layout model folder; give one that has.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError) as error:
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


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The module tree with the shapes of its parameters, and no storage behind them.

    dtype: of a model that is to be run on shapes alone, as a rank runs it; None where it is only looked at.
    """
    given: dict[str, Any] = {} if dtype is None else {"dtype": dtype, "attn_implementation": "sdpa"}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **given)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ArithmeticError, ImportError) as error:
        raise ModelError(
            f"{config.model_type}: not a causal language model ({first_line(error)}); give one, or mend its "
            "config.json."
        ) from None


def refuse_encoder(config: PretrainedConfig) -> None:
    """Refuse what is no left-to-right language model, though transformers may give it a causal head.

    Raises:
        ModelError: for an encoder and decoder, or for a model whose positions see the tokens that they are to predict.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False) or kind in _ENCODER_DECODERS:
        raise ModelError(
            f"{kind} is an encoder with a decoder, and sequences of one text are not what it is trained on; give a "
            "decoder-only language model (GPT-2, GPT-NeoX, Llama, OPT, Qwen, ...)."
        )
    if kind in _BOTH_WAYS or (kind in _ENCODERS and not getattr(config, "is_decoder", False)):
        raise ModelError(
            f"{kind} attends both ways, so a position sees the token that it is to predict, and log p(x_t | x_<t) "
            "means nothing; give a decoder-only language model (GPT-2, GPT-NeoX, Llama, OPT, Qwen, ...)."
        )


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


def _check_whole(files: list[Path]) -> None:
    """Refuse a file whose header does not fit its size, before a worker tries to load it."""
    for path in files:
        if (file := look_up(str(path))) is not None and is_lfs_pointer(file):
            raise ModelError(f"{path} {LFS_POINTER}.")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} cannot be read ({first_line(error)}): it is cut off or damaged; copy or download it again."
            ) from None


def first_line(error: Exception) -> str:
    """What a library's error says, for a sentence of ours; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def tracked_layers(module: PreTrainedModel, tracked: str) -> tuple[Layer, ...]:
    """The linear layers that take part, in module order.

    `mlp`: linears of the blocks that are not attention; `attention`: the blocks' attention linears; `linear`: both;
    anything else is a regular expression searched in module paths. Never a router or the unembedding, unless a regular
    expression names it.

    Raises:
        ModelError: where no layer matches, or where a mixture's experts are fused into one parameter.
    """
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)}
    output = module.get_output_embeddings()
    in_blocks = [
        name
        for name, child in linears.items()
        if child is not output and re.search(r"\.\d+\.", name) and not _ROUTER.search(name)
    ]
    attention = [name for name in in_blocks if _ATTENTION.search(name)]
    mlp = [name for name in in_blocks if not _ATTENTION.search(name)]
    named = {"mlp": mlp, "attention": attention, "linear": in_blocks}
    if tracked in named:
        _refuse_fused_experts(module, tracked)
    chosen = named.get(tracked)
    if chosen is None:
        chosen = [name for name in linears if re.search(tracked, name)]
    if not chosen:
        raise ModelError(
            f"model.tracked={tracked!r} matches no linear layer; the model has "
            f"{', '.join(list(linears)[:4])}, ... ({len(linears)} in all)."
        )
    layers: list[Layer] = []
    for name in chosen:
        child = linears[name]
        O, I = _shape(child)
        bias = child.bias is not None
        layers.append(Layer(name, O, I + bias, bias, _input_of(name, bias, layers)))
    return tuple(layers)


def _shape(linear: nn.Module) -> tuple[int, int]:
    weight: Any = linear.weight
    # DeepSpeed leaves a partitioned parameter empty and keeps its shape beside it.
    first, second = getattr(weight, "ds_shape", weight.shape)
    return (second, first) if isinstance(linear, Conv1D) else (first, second)


def _input_of(name: str, bias: bool, before: list[Layer]) -> str:
    """The first tracked layer with the same input: a sibling that the model's family feeds the same tensor."""
    parent, _, leaf = name.rpartition(".")
    for group in _SHARED_INPUTS:
        if leaf in group:
            for layer in before:
                sibling_parent, _, sibling = layer.name.rpartition(".")
                if sibling_parent == parent and sibling in group and layer.bias == bias:
                    return layer.input_of
    return name


def _refuse_fused_experts(module: nn.Module, tracked: str) -> None:
    """Some families say `experts` in the path (Mixtral), some in the class alone (JetMoE); some stack them in rows."""
    for path, owner in module.named_modules():
        if isinstance(owner, nn.Linear | Conv1D) or "expert" not in f"{path} {type(owner).__name__}".lower():
            continue
        in_attention = bool(_ATTENTION.search(path))
        among = ("attention", "linear") if in_attention else ("mlp", "linear")
        if tracked in among and any(parameter.dim() >= 2 for parameter in owner.parameters(recurse=False)):
            other = "<regex>" if in_attention else "attention or a regex"
            raise ModelError(
                f"{path} holds its experts fused in one parameter, whose inputs and gradients are not seen per expert; "
                f"leave the mixture out with model.tracked={other}."
            )


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
