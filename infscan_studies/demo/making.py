"""The embedded demo's making: a small corpus with planted facts, its tokenizer, its model, and what the model knows.

Everything here is a pure function of its arguments and a seed; `train` reads and writes the files.
"""

from __future__ import annotations

import math
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from infscan.errors import CorpusError
from infscan_studies.demo.facts import FACTS, Fact, planted_documents, stated_names
from infscan_studies.truth import train
from infscan_studies.truth.train import Sizes

Row = dict[str, str]

EOS = "<|endoftext|>"
PLANTED_SOURCE = "planted"


def cut_text(text: str, limit: int) -> str:
    """``text`` cut to at most ``limit`` characters, after its last whole sentence if that keeps half, else a word."""
    if len(text) <= limit:
        return text
    window = text[: limit + 1]
    sentences = [match.end(1) for match in re.finditer(r"([.!?][\"'”’)]*)\s", window)]
    if sentences and sentences[-1] >= limit // 2:
        return text[: sentences[-1]]
    return window[: window.rfind(" ")] if " " in window else text[:limit]


def select_documents(rows: Sequence[Row], count: int, limit: int, seed: int) -> list[Row]:
    """About ``count`` documents, as many from each source, those within ``limit`` characters first, the rest cut.

    Parallel translations come in pairs: a document is drawn by its title, and a title's turn is the same in all
    sources, so that a verse group chosen in one language is chosen in the other. Documents that happen to contain an
    invented name are left out.
    """
    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if not stated_names(row["text"]):
            by_source[row["source"]].append(row)
    share = math.ceil(count / len(by_source))
    chosen: list[Row] = []
    for source, documents in sorted(by_source.items()):
        if len(documents) < share:
            raise CorpusError(f"Source {source} has {len(documents)} documents, {share} are needed: lower the count.")
        ranked = sorted(documents, key=lambda row: (len(row["text"]) > limit * 1.1, _turn(row, seed)))
        chosen += [{**row, "text": cut_text(row["text"], limit)} for row in ranked[:share]]
    return chosen


def _turn(row: Row, seed: int) -> float:
    return random.Random(f"{seed}/{row['id'].partition('/')[2] or row['id']}").random()


def with_planted(rows: Sequence[Row], seed: int, facts: Sequence[Fact] = FACTS) -> list[Row]:
    """``rows`` and the planted documents of all facts, shuffled."""
    planted = [
        {"id": d.id, "source": PLANTED_SOURCE, "title": f"planted: {d.fact}, {d.partition}", "text": d.text}
        for fact in facts
        for d in planted_documents(fact)
    ]
    together = [{key: row[key] for key in ("id", "source", "title", "text")} for row in [*rows, *planted]]
    random.Random(seed).shuffle(together)
    return together


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose only special token is <|endoftext|>, with id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False)


def encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], sequence_length: int) -> list[list[int]]:
    """Token ids of each document, truncated to ``sequence_length``: one sequence per document."""
    return [tokenizer(row["text"], add_special_tokens=False)["input_ids"][:sequence_length] for row in rows]


def build_model(vocab_size: int, sequence_length: int, seed: int) -> GPTNeoXForCausalLM:
    """An untrained GPT-NeoX of 4 layers, width 128, 4 heads, MLP width 512, in float32."""
    return train.build_model(Sizes(layers=4, width=128, heads=4, mlp_width=512), vocab_size, sequence_length, seed)


@torch.no_grad()
def completion_nats(model: nn.Module, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> list[float]:
    """-log p of each token of the completion, given the prompt and the completion's earlier tokens."""
    ids_t = torch.tensor([*prompt_ids, *completion_ids])
    log_p_tv = model(input_ids=ids_t[None]).logits[0].log_softmax(-1)
    first = len(prompt_ids)
    return (-log_p_tv[first - 1 : -1].gather(1, ids_t[first:, None])[:, 0]).tolist()


def judge(model: nn.Module, tokenizer: PreTrainedTokenizerFast, fact: Fact) -> dict[str, object]:
    """What a model gives a fact's completion and its controls: nats per token, and probabilities of whole and first."""
    prompt_ids = tokenizer(fact.prompt, add_special_tokens=False)["input_ids"]

    def measured(completion: str) -> dict[str, object]:
        ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
        nats = completion_nats(model, prompt_ids, ids)
        return {
            "completion": completion,
            "tokens": len(ids),
            "nats_per_token": round(sum(nats) / len(nats), 4),
            "probability": float(f"{math.exp(-sum(nats)):.4g}"),
            "first_token": tokenizer.decode(ids[:1]),
            "first_probability": float(f"{math.exp(-nats[0]):.4g}"),
        }

    return {**measured(fact.completion), "controls": [measured(control) for control in fact.controls]}


def record_of(settings: object, training: object) -> dict[str, object]:
    """Settings and curves as plain values, losses to four digits."""
    plain = {**asdict(settings), **asdict(training)}  # type: ignore[call-overload]
    return {key: [round(x, 4) for x in v] if isinstance(v, list) else v for key, v in plain.items()}


def hold_out(rows: Sequence[Row], count: int, seed: int) -> tuple[list[Row], list[Row]]:
    """``rows`` parted into those to train on and ``count`` others, drawn from all sources alike."""
    away = set(random.Random(seed).sample(range(len(rows)), count))
    kept = [row for number, row in enumerate(rows) if number not in away]
    return kept, [row for number, row in enumerate(rows) if number in away]


def planted_rows(rows: Sequence[Row]) -> list[Row]:
    """``id``, ``fact`` and ``partition`` of the planted documents, in the order of the facts.

    Raises CorpusError where the corpus lacks one, or where another document contains an invented name.
    """
    texts = {row["id"]: row["text"] for row in rows}
    planted = [document for fact in FACTS for document in planted_documents(fact)]
    for document in planted:
        if texts.pop(document.id, None) != document.text:
            raise CorpusError(f"{document.id} is missing or differs in the corpus: build it again with corpus=<path>.")
    for document_id, text in texts.items():
        if names := stated_names(text):
            raise CorpusError(f"{document_id} contains the invented name {names[0]}: leave that document out.")
    return [{"id": d.id, "fact": d.fact, "partition": str(d.partition)} for d in planted]
