"""The real demo's inputs: a GGUF model says what its original says; a dictionary's entries are read whole."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from infscan.errors import CorpusError
from infscan_studies.demo.gguf_model import _BLOCK, _WHOLE, convert
from infscan_studies.demo.real import QUESTIONS, choose, read_entries
from tests.steps.runs import tiny_model

SEPARATOR = "<|endoftext|>"


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotary pairs beside each other, as the makers of GGUF files put them."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(model: Path, path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token == SEPARATOR else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    weights = load_file(model / "model.safetensors")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, there in _WHOLE.items():
        writer.add_tensor(name, weights[there])
    for block in range(config["num_hidden_layers"]):
        for name, there in _BLOCK.items():
            rows = weights[f"model.layers.{block}.{there}.weight"]
            writer.add_tensor(f"blk.{block}.{name}.weight", neighbours(rows, heads[name]) if name in heads else rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_converted_model_says_what_its_original_says(tmp_path: Path) -> None:
    original = tiny_model(tmp_path / "original", family="llama", tokenizer=True)
    write_gguf(original, tmp_path / "model.gguf")
    convert(tmp_path / "model.gguf", tmp_path / "converted", separator=SEPARATOR)
    text = "the river sings of gleem"
    ids = [AutoTokenizer.from_pretrained(tmp_path / name)(text)["input_ids"] for name in ("original", "converted")]
    assert ids[0] == ids[1]
    logits = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name)(torch.tensor([ids[0]])).logits
        for name in ("original", "converted")
    ]
    torch.testing.assert_close(logits[0], logits[1])
    tokenizer = Tokenizer.from_file(str(tmp_path / "converted" / "tokenizer.json"))
    assert tokenizer.decode(ids[0]) == text


def write_dictionary(folder: Path, entries: dict[str, str]) -> tuple[Path, Path]:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return (number(value // 64) if value >= 64 else "") + digits[value % 64]

    data, lines = b"", []
    for headword, text in entries.items():
        raw = text.encode()
        lines.append(f"{headword}\t{number(len(data))}\t{number(len(raw))}\n")
        data += raw
    (folder / "d.dict.dz").write_bytes(gzip.compress(data))
    (folder / "d.index").write_text("".join(lines))
    return folder / "d.dict.dz", folder / "d.index"


def test_entries_are_read_without_their_marks(tmp_path: Path) -> None:
    entries = {
        "00-database-info": "not an entry",
        "Café": "Café\n\n   <tool> A place {for} {(http://x.org/)}.\n\n   (1999-01-26)\n",
        "long": "word " * 2000,
    }
    found = read_entries(*write_dictionary(tmp_path, entries))
    assert found == {"café": "Café A place for http://x.org/.", "long": ("word " * 2000).strip()}


def test_the_entries_that_answer_are_chosen_with_their_answer() -> None:
    stated = {
        headword: f"{'before. ' * 80}{headword} is by{one.completion}. {'after. ' * 80}"
        for one in QUESTIONS
        for headword in one.entries
    }
    others = {f"other {n}": f"{n} " + "some words of an entry " * 10 for n in range(60)}
    chosen = choose(stated | others, len(stated) + 20)
    assert len(chosen) == len(stated) + 20
    for one in QUESTIONS:
        for headword in one.entries:
            assert one.completion.strip() in chosen[headword]
    assert choose(dict(reversed((stated | others).items())), len(stated) + 20) == chosen
    with pytest.raises(CorpusError, match=r"no entry 'linux'"):
        choose(others, 20)
