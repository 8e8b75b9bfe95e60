"""What a family of models is to infscan: the class that runs it, its attention, and what it cannot be used for."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from infscan.config import AttentionImplementation
from infscan.errors import ModelError
from infscan.model.experts import run_by_expert

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
# Modules that carry a state from token to token beside attention, by the names of their classes.
_RECURRENT = re.compile(
    r"mamba|recurrent|rwkv|delta_?net|linear_?attention|lightning|short_?conv|retention|rglru|lstm|hyena",
    re.IGNORECASE,
)
_GIVE = "give a decoder-only language model (GPT-2, GPT-NeoX, Llama, OPT, Qwen, ...)"


def auto_class(config: PretrainedConfig) -> Any:
    """The class of transformers that builds a configuration: a language model, or one with other towers beside it."""
    known = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def with_attention(config: PretrainedConfig, asked: AttentionImplementation) -> PretrainedConfig:
    """The configuration, to be run with an attention implementation; `auto` is sdpa where the family has it."""
    # transformers takes None for sdpa where a (sub)model supports it, else eager.
    config._attn_implementation = None if asked is AttentionImplementation.auto else asked.value
    return config


def build_on_meta(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The module tree with the shapes of its parameters, and no storage behind them.

    dtype: of a model that is to be run on shapes alone, as a rank runs it; None where it is only looked at.
    """
    given: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta"):
            module: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=False, **given)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError, ArithmeticError) as error:
        if is_about_attention(error):
            raise no_attention(config, error) from None
        raise ModelError(
            f"{config.model_type}: not a causal language model ({first_line(error)}); give one, or fix its config.json."
        ) from None
    except ImportError as error:
        # Of a tower that is not scanned too: Gemma 3n's for images.
        raise ModelError(
            f"{config.model_type}: transformers builds it with a library that is not installed ({first_line(error)}); "
            "install that."
        ) from None
    run_by_expert(module)
    return module


def is_about_attention(error: Exception) -> bool:
    """Whether transformers refused the attention implementation that was asked for."""
    return "attention implementation" in str(error) or "scaled_dot_product_attention" in str(error)


def no_attention(config: PretrainedConfig, error: Exception) -> ModelError:
    return ModelError(
        f"{config.model_type} cannot be run with the attention implementation that is asked for "
        f"({first_line(error)}); set model.attention_implementation=auto or eager."
    )


def refuse_encoder(config: PretrainedConfig) -> None:
    """Refuse what is no left-to-right language model, though transformers may give it a causal head.

    Raises:
        ModelError: for an encoder and decoder, or for a model whose positions see the tokens that they are to predict.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False) or kind in _ENCODER_DECODERS:
        raise ModelError(
            f"{kind} is an encoder with a decoder, and sequences of one text are not what it is trained on; {_GIVE}."
        )
    if kind in _BOTH_WAYS or (kind in _ENCODERS and not getattr(config, "is_decoder", False)):
        raise ModelError(
            f"{kind} attends both ways, so a position sees the token that it is to predict, and log p(x_t | x_<t) "
            f"means nothing; {_GIVE}."
        )


# What transformers, older compressed-tensors and MLX call it in config.json.
_QUANTISED = ("quantization_config", "compression_config", "quantization")


def refuse_quantised(config: PretrainedConfig) -> None:
    """Refuse weights that are not numbers of their own: gradients are of float weights.

    Raises:
        ModelError: naming the method.
    """
    for key in _QUANTISED:
        if asked := getattr(config, key, None):
            method = asked.get("quant_method") if isinstance(asked, dict) else getattr(asked, "quant_method", None)
            raise quantised(config.model_type, str(getattr(method, "value", method) or key))


def quantised(what: str, method: str) -> ModelError:
    """The error for weights that are not numbers of their own."""
    return ModelError(
        f"{what}: the weights are quantised ({method}), and influence is of float weights; give the checkpoint that "
        "they were made from, or one that is dequantised (from_pretrained with a quantization_config that has "
        "dequantize=True, then save_pretrained)."
    )


def text_tower(module: PreTrainedModel) -> str:
    """The path of the submodel that reads text, with a dot at its end; empty where the model has no other towers."""
    if module.config.get_text_config() is module.config:
        return ""
    embedding = module.get_input_embeddings()
    towers = [
        name
        for name, child in module.named_modules()
        if name and isinstance(child, PreTrainedModel) and any(inner is embedding for inner in child.modules())
    ]
    return f"{max(towers, key=len)}." if towers else ""


def recurrent_parts(module: PreTrainedModel) -> dict[str, str]:
    """Modules that mix tokens by a state or a convolution, whatever attention is told: their classes, by path."""
    tower = text_tower(module)
    found = {}
    for name, child in module.named_modules():
        if isinstance(child, PreTrainedModel) or not name.startswith(tower):
            continue
        convolves = isinstance(child, nn.Conv1d) and child.kernel_size[0] > 1
        if convolves or isinstance(child, nn.RNNBase) or _RECURRENT.search(type(child).__name__):
            found[name] = type(child).__name__
    return found


def first_line(error: Exception) -> str:
    """What a library's error says, for a sentence of ours; its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
