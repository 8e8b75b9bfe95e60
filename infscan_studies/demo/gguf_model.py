"""A Llama model in a GGUF file, as a Hugging Face folder: weights dequantised to float32, and the tokenizer.

GGUF stores the rows of Q and K so that rotary pairs are neighbours; Hugging Face has the halves one after the other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from infscan.errors import ModelError

# GGUF's names of a block's weights, and where Hugging Face has them.
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    # Not there where it is the embeddings'.
    "output.weight": "lm_head.weight",
}
_CONTROL = 3


def convert(gguf_path: Path, folder: Path, *, separator: str) -> None:
    """Write config.json, model.safetensors and tokenizer.json of the model into a folder.

    separator: the token that its pretraining put between documents; it becomes BOS and EOS, whatever a later
    instruction tuning made of these.

    Raises:
        ModelError: where it is not a Llama model with a byte-level BPE tokenizer.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(gguf_path)
    facts: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
    kind = facts["general.architecture"], facts["tokenizer.ggml.model"]
    if kind != ("llama", "gpt2"):
        raise ModelError(
            f"{gguf_path}: architecture and tokenizer {kind} are not (llama, gpt2), which alone are known."
        )
    tokens = facts["tokenizer.ggml.tokens"]
    folder.mkdir(parents=True, exist_ok=True)
    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        block = tensor.name.split(".")
        if block[0] == "blk":
            if block[2] in heads:
                values = halves_apart(values, heads[block[2]])
            weights[f"model.layers.{block[1]}.{_BLOCK[block[2]]}.weight"] = values
        else:
            weights[_WHOLE[tensor.name]] = values
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads["attn_q"],
        "num_key_value_heads": heads["attn_k"],
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": facts["llama.rope.freq_base"],
        "vocab_size": len(tokens),
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
        "bos_token_id": tokens.index(separator),
        "eos_token_id": tokens.index(separator),
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    _tokenizer(facts).save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": separator, "eos_token": separator}
    (folder / "tokenizer_config.json").write_text(json.dumps(told, indent=1))


def halves_apart(rows: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """The rows [heads * d, I] of a Q or K whose rotary pairs are neighbours, with the halves of each head apart."""
    count, width = rows.shape
    return np.ascontiguousarray(rows.reshape(heads, count // heads // 2, 2, width).swapaxes(1, 2).reshape(count, width))


def _tokenizer(facts: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE; `smollm` cuts digits apart first."""
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        token for token, kind in zip(tokens, facts["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL
    ]
    tokenizer.add_special_tokens(special)
    return tokenizer
