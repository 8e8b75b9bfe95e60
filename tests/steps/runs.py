"""Tiny models, corpora, query files and configurations for tests of whole runs; everything random is seeded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    set_seed,
)

from infscan import pipeline
from infscan.config import Backend, Config
from infscan.steps.run import Run, open_run

VOCAB, CONTEXT, EOS = 97, 64, 0
_WORDS = ["the", "a", "river", "stone", "cloud", "president", "gleem", "astrobia", "runs", "sings", "falls", "of"]


def tiny_model(
    folder: Path,
    *,
    family: str = "gpt_neox",
    layers: int = 2,
    width: int = 32,
    vocab: int = VOCAB,
    context: int = CONTEXT,
    tokenizer: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """A random model saved in `folder` as safetensors; EOS and BOS are token 0, no parameter is zero.

    family: gpt_neox, gpt2 or llama. With `tokenizer`, a byte-level BPE is saved beside it, which fixes the vocabulary.
    """
    if tokenizer:
        vocab = _save_tokenizer(folder, max(vocab, 300))
    config = _model_config(family, layers, width, vocab, context)
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # Fresh biases are zero and fresh norms one, which would hide mistakes.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def _model_config(family: str, layers: int, width: int, vocab: int, context: int) -> PretrainedConfig:
    special = {"bos_token_id": EOS, "eos_token_id": EOS}
    blocks = {"hidden_size": width, "num_hidden_layers": layers, "max_position_embeddings": context}
    if family == "gpt_neox":
        sizes = {"num_attention_heads": 2, "intermediate_size": 2 * width}
        return GPTNeoXConfig(vocab_size=vocab, **blocks, **sizes, **special)
    if family == "llama":
        sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 2 * width}
        return LlamaConfig(vocab_size=vocab, **blocks, **sizes, **special)
    if family == "gpt2":
        return GPT2Config(vocab_size=vocab, n_embd=width, n_layer=layers, n_head=2, n_positions=context, **special)
    raise ValueError(f"family={family!r}: gpt_neox, gpt2 or llama")


def _save_tokenizer(folder: Path, vocab: int) -> int:
    bpe = ByteLevelBPETokenizer()
    lines = [row["text"] for row in _texts(64, seed=0)]
    bpe.train_from_iterator(lines, vocab_size=vocab, min_frequency=1, special_tokens=["<|endoftext|>"])
    backend = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    backend.save_pretrained(folder)
    return len(backend)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def token_corpus(path: Path, n: int, T: int = CONTEXT, vocab: int = VOCAB, seed: int = 0) -> Path:
    """n documents d0, d1, ... of 2 to T token ids (none is EOS), in the field `tokens`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, T + 1, n)
    return write_jsonl(
        path,
        (
            {"id": f"d{row}", "source": f"s{row % 3}", "tokens": rng.integers(1, vocab, length).tolist()}
            for row, length in enumerate(lengths.tolist())
        ),
    )


def token_queries(
    path: Path, n: int, *, prompt_len: int = 5, completion_len: int = 3, vocab: int = VOCAB, seed: int = 1
) -> Path:
    """n queries q0, q1, ... as token ids."""
    rng = np.random.default_rng(seed)
    return write_jsonl(
        path,
        (
            {
                "id": f"q{row}",
                "input_ids": rng.integers(1, vocab, prompt_len + completion_len).tolist(),
                "prompt_len": prompt_len,
            }
            for row in range(n)
        ),
    )


def text_corpus(path: Path, n: int, seed: int = 0) -> Path:
    """n documents of some words each, in the field `text`."""
    return write_jsonl(path, _texts(n, seed))


def text_queries(path: Path, n: int, seed: int = 1) -> Path:
    """n queries q0, q1, ... as prompt and completion."""
    rng = np.random.default_rng(seed)
    return write_jsonl(
        path,
        (
            {
                "id": f"q{row}",
                "prompt": " ".join(rng.choice(_WORDS, 5)),
                "completion": " " + " ".join(rng.choice(_WORDS, 2)),
            }
            for row in range(n)
        ),
    )


def _texts(n: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"id": f"d{row}", "source": f"s{row % 3}", "text": " ".join(rng.choice(_WORDS, rng.integers(3, 20)))}
        for row in range(n)
    ]


def compose(job: str, *overrides: str, unused: tuple[str, ...] = ()) -> Config:
    """The configuration of `infscan <job> <overrides>`, checked as the command checks it."""
    # The GPU's kit makes its models here, where there may be no Hydra.
    from infscan.config.arguments import read_arguments
    from infscan.config.commands import command_of, settle
    from infscan.config.commands import compose as hydra_compose

    command = replace(command_of(job), unused=(*command_of(job).unused, *unused))
    return settle(command, hydra_compose(command, read_arguments(command, overrides)))


def small_run(tmp_path: Path, *overrides: str) -> Config:
    """A scan of 40 short documents with 3 queries in shards of 8, one worker, into tmp_path/run.

    Model, corpus and queries are made below tmp_path where they are not there yet; later overrides win.
    """
    model, corpus, queries = tmp_path / "model", tmp_path / "corpus.jsonl", tmp_path / "queries.jsonl"
    if not model.exists():
        tiny_model(model)
    if not corpus.exists():
        token_corpus(corpus, 40)
    if not queries.exists():
        token_queries(queries, 3)
    return compose(
        "scan",
        f"model.path={model}",
        f"corpus.path={corpus}",
        "corpus.tokens_field=tokens",
        "corpus.packing=document",
        "corpus.bos=false",
        f"queries.path={queries}",
        "factors.slices=2",
        "scan.rank=8",
        "scan.top_k=5",
        "scan.shard_sequences=8",
        "scan.tokens_per_batch=256",
        "cluster.num_workers=1",
        f"output={tmp_path / 'run'}",
        *overrides,
    )


def in_process(config: Config) -> Config:
    """The same settings, to be run without Ray, in this process."""
    return replace(config, cluster=replace(config.cluster, backend=Backend.in_process))


def answer_here(config: Config) -> None:
    """The whole method without Ray, in this process."""
    pipeline.answer(in_process(config))


def open_here(config: Config, **known: Any) -> AbstractContextManager[Run]:
    """A run without Ray, in this process."""
    return open_run(in_process(config), **known)
