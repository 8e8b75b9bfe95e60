"""Tiny random models of several families, saved as a user's would be; dropout stays at each family's default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

VOCAB, CONTEXT = 40, 32
_GROUPED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": CONTEXT,
}

CONFIGS: dict[str, PretrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT, bos_token_id=0, eos_token_id=1
    ),
    # Grouped queries, no bias, the unembedding tied.
    "llama": LlamaConfig(**_GROUPED, tie_word_embeddings=True, bos_token_id=None, eos_token_id=[2, 3]),
    "llama_untied": LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    # An embedding narrower than the blocks, functional dropout inside the block, an MLP that flattens the batch.
    "opt": OPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        word_embed_proj_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=24,
        max_position_embeddings=CONTEXT,
        pad_token_id=1,
    ),
    # A bias on q, k and v, and none elsewhere.
    "qwen2": Qwen2Config(**_GROUPED),
    # Norms between q, k and attention; heads wider than the hidden size shared among them.
    "qwen3": Qwen3Config(**_GROUPED, head_dim=8),
    # q, k, v in one weight, and gate and up in one, without bias.
    "phi3": Phi3Config(**_GROUPED, pad_token_id=0, bos_token_id=1, eos_token_id=2),
}


def save(family: str, folder: Path, seed: int = 0) -> Path:
    """A random model in float64 as safetensors below `folder`; biases and norms are random too, none is zero."""
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / family)
    return folder / family
