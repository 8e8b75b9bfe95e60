"""Tiny configurations of the families that docs/families.md speaks of, by transformers' model type.

Each is what a checkpoint of that family is, small: two blocks or one of each kind, some experts, a vocabulary of 40.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, set_seed

from infscan.model.family import auto_class

VOCAB, CONTEXT = 40, 64
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 8}
_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}
_MLA: dict[str, Any] = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "qk_head_dim": 8,
}
_GROUPS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_DELTA: dict[str, Any] = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
_MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_ssm": 32,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 16,
}


def _text(**more: Any) -> dict[str, Any]:
    return {"text_config": _SIZES | more, "vision_config": dict(_VISION)}


# By model type, what its configuration is given; a key that a family does not know stays without meaning.
FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": _SIZES,
    "arcee": _SIZES,
    "bamba": _SIZES | _MAMBA2 | {"attn_layer_indices": [1]},
    "biogpt": _SIZES,
    "bitnet": _SIZES,
    "bloom": {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "codegen": {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 2},
    "cohere": _SIZES,
    "cohere2": _SIZES | _HEADS,
    "cwm": _SIZES | _HEADS | {"sliding_window": 8},
    "dbrx": {
        "vocab_size": VOCAB,
        "d_model": 16,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": CONTEXT,
        "attn_config": {"kv_n_heads": 1, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
    },
    "deepseek_v2": _SIZES | _MOE | _MLA | _GROUPS | {"head_dim": 4},
    "deepseek_v3": _SIZES | _MOE | _MLA | _GROUPS,
    "dots1": _SIZES | _MOE | _GROUPS,
    "ernie4_5": _SIZES | _HEADS,
    "ernie4_5_moe": _SIZES | _MOE | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "exaone4": _SIZES,
    "falcon": {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "falcon_h1": _SIZES | _MAMBA2 | _HEADS,
    "falcon_mamba": _SIZES | {"state_size": 4, "time_step_rank": 4},
    "flex_olmo": _SIZES | _MOE,
    "gemma": _SIZES | _HEADS,
    "gemma2": _SIZES | _HEADS | {"query_pre_attn_scalar": 8},
    "gemma3": _text(**_HEADS, query_pre_attn_scalar=8, sliding_window=8),
    "gemma3_text": _SIZES | _HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3n_text": _SIZES
    | _HEADS
    | {
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": 24,
    },
    "gemma4": _text(
        **_HEADS,
        global_head_dim=8,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
    ),
    "gemma4_text": _SIZES
    | _HEADS
    | {
        "global_head_dim": 8,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "glm": _SIZES | _HEADS,
    "glm4": _SIZES | _HEADS,
    "glm4_moe": _SIZES | _HEADS | _MOE | _GROUPS,
    "glm4_moe_lite": _SIZES | _MOE | _MLA | _GROUPS,
    "exaone_moe": _SIZES
    | _HEADS
    | _MOE
    | _GROUPS
    | {"layer_types": ["full_attention"] * 2, "is_moe_layer": [False, True]},
    "glm4v": _text(**_HEADS, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}),
    "gpt2": {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT},
    "gpt_bigcode": {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT},
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": CONTEXT,
    },
    "gpt_neox": _SIZES,
    "gpt_oss": _SIZES | _HEADS | _MOE,
    "gptj": {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT, "rotary_dim": 4},
    "granite": _SIZES,
    "granitemoe": _SIZES | _MOE,
    "granitemoehybrid": _SIZES
    | _MOE
    | _MAMBA2
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 24},
    "granitemoeshared": _SIZES | _MOE | {"shared_intermediate_size": 24},
    "helium": _SIZES | _HEADS,
    "hunyuan_v1_dense": _SIZES | _HEADS,
    "hunyuan_v1_moe": _SIZES | _HEADS | _MOE | {"moe_topk": 2},
    "internvl": _text(),
    "jamba": _SIZES
    | {
        "num_experts": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "jetmoe": _SIZES | {"kv_channels": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    "lfm2": _SIZES | {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": _SIZES | _MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama": _SIZES,
    "llama4_text": _SIZES
    | _HEADS
    | _MOE
    | {"num_experts_per_tok": 1, "intermediate_size_mlp": 24, "attention_chunk_size": 32},
    "llava": _text(model_type="llama") | {"vision_config": _VISION | {"model_type": "clip_vision_model"}},
    "llama4": _text(**_HEADS, **(_MOE | {"num_experts_per_tok": 1}), intermediate_size_mlp=24, attention_chunk_size=32)
    | {"vision_config": _VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}},
    "longcat_flash": _SIZES
    | _MLA
    | {
        "num_layers": 2,
        "n_routed_experts": 4,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 12,
        "ffn_hidden_size": 24,
        "head_dim": 4,
    },
    "mamba": _SIZES | {"state_size": 4, "time_step_rank": 4},
    "mamba2": _SIZES | {"state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "minimax": _SIZES | _HEADS | _MOE | _HYBRID | {"block_size": 8},
    "minimax_m2": _SIZES | _HEADS | _MOE | {"rotary_dim": 4},
    "ministral": _SIZES | _HEADS,
    "ministral3": _SIZES | _HEADS,
    "mistral": _SIZES | {"sliding_window": 8},
    "mistral3": _text(model_type="mistral", head_dim=8) | {"vision_config": _VISION | {"model_type": "pixtral"}},
    "mixtral": _SIZES | _MOE,
    "mpt": {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": CONTEXT},
    "nanochat": _SIZES,
    "nemotron": _SIZES,
    "nemotron_h": _SIZES
    | _HEADS
    | {
        "hybrid_override_pattern": "M*-",
        "num_hidden_layers": 3,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "olmo": _SIZES,
    "olmo2": _SIZES,
    "olmo3": _SIZES | {"sliding_window": 8},
    "olmo_hybrid": _SIZES | _HYBRID | _DELTA,
    "olmoe": _SIZES | _MOE,
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
        "max_position_embeddings": CONTEXT,
    },
    "persimmon": _SIZES,
    "phi": _SIZES,
    "phi3": _SIZES,
    "phi4_multimodal": _SIZES
    | {
        "vision_config": _VISION | {"crop_size": 28},
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "nemo_conv_channels": 16,
        },
    },
    "phimoe": _SIZES | _MOE,
    "qwen2": _SIZES,
    "qwen2_5_vl": _text(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}),
    "qwen2_moe": _SIZES | _MOE | {"shared_expert_intermediate_size": 24},
    "qwen2_vl": _text(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}),
    "qwen3": _SIZES | _HEADS,
    "qwen3_5": _text(**_HEADS, **_HYBRID, **_DELTA),
    "qwen3_5_moe": _text(**_HEADS, **_HYBRID, **_DELTA, **_MOE, shared_expert_intermediate_size=24),
    "qwen3_moe": _SIZES | _HEADS | _MOE,
    "qwen3_next": _SIZES | _HEADS | _HYBRID | _DELTA | _MOE | {"shared_expert_intermediate_size": 24},
    "qwen3_vl": _text(**_HEADS, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})
    | {"vision_config": _VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 4}},
    "qwen3_vl_moe": _text(**_HEADS, **_MOE, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]})
    | {"vision_config": _VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 4}},
    "recurrent_gemma": _SIZES | _HEADS | {"lru_width": 16, "block_types": ["recurrent", "attention"]},
    "rwkv": _SIZES | {"context_length": CONTEXT, "attention_hidden_size": 16},
    "seed_oss": _SIZES | _HEADS,
    "smollm3": _SIZES,
    "solar_open": _SIZES | _HEADS | _MOE | _GROUPS,
    "stablelm": _SIZES,
    "starcoder2": _SIZES,
    "t5": {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
    "bert": _SIZES,
    "vaultgemma": _SIZES | _HEADS | {"query_pre_attn_scalar": 8},
    "xglm": {
        "vocab_size": VOCAB,
        "d_model": 16,
        "ffn_dim": 24,
        "num_layers": 2,
        "attention_heads": 2,
        "max_position_embeddings": CONTEXT,
    },
    "zamba": _SIZES
    | {
        "num_hidden_layers": 4,
        "attention_hidden_size": 32,
        "attention_head_dim": 16,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
    },
    "zamba2": _SIZES
    | {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_head_dim": 16,
        "mamba_d_state": 4,
        "mamba_headdim": 8,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "adapter_rank": 4,
    },
}


# Families that the table refuses by their configuration alone.
NO_LANGUAGE_MODELS = ("bert", "t5")


def configuration(family: str) -> PretrainedConfig:
    given = {key: dict(value) if isinstance(value, dict) else value for key, value in FAMILIES[family].items()}
    return AutoConfig.for_model(family, **given)


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random checkpoint of the family, no parameter zero or one, nor what it keeps beside parameters."""
    set_seed(0)
    config = configuration(family)
    model: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
    # But for decays, which belong together.
    state = {name: tensor for name, tensor in model.state_dict().items() if not re.search("decay|slope", name)}
    kept = [tensor for tensor in state.values() if tensor.is_floating_point()]
    with torch.no_grad():
        for tensor in {tensor.data_ptr(): tensor for tensor in kept}.values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    model.save_pretrained(folder / family)
    return folder / family
