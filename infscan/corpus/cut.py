"""A prompt and what follows it, tokenised as the one text that a corpus would hold, and cut where the prompt ends.

Tokenised apart, the text after the prompt would begin with tokens that no corpus has there: with SentencePiece's
vocabularies a bare space, after a prompt that ends in a space a word without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np


class Encoder(Protocol):
    """What cutting needs of a tokenizer. unk_id: what stands for what it cannot spell; None where it spells all."""

    @property
    def unk_id(self) -> int | None: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """int64 [n] ids and int64 [n, 2] characters [begin, end) per text; None for a family that has no offsets."""
        ...


@dataclass(frozen=True, eq=False)
class CutText:
    """token_ids: int64 [n] of prompt and rest. prompt_tokens: the first that are the prompt's.

    texts: of every token, which joined are the text (None where the tokenizer does not say). spans: whether the first
    token after the cut begins in the prompt; it counts as the rest's.
    """

    token_ids: np.ndarray
    prompt_tokens: int
    texts: tuple[str, ...] | None = None
    spans: bool = False


def encode_cut(encoder: Encoder, pairs: Sequence[tuple[str, str]]) -> list[CutText]:
    """Each (prompt, rest) as one text, cut at the character where the rest begins.

    Where a token spans that character, the cut is before it.
    """
    wholes = [prompt + rest for prompt, rest in pairs]
    found = encoder.encode_with_offsets(wholes)
    if found is None:
        return _by_tokens(encoder, [prompt for prompt, _ in pairs], wholes)
    return [
        _by_offsets(whole, len(prompt), ids, offsets)
        for whole, (prompt, _), (ids, offsets) in zip(wholes, pairs, found, strict=True)
    ]


def _by_offsets(text: str, cut: int, ids: np.ndarray, offsets_n2: np.ndarray) -> CutText:
    # A token of some bytes of a character ends with it, so its own text is what the ones before left of it.
    ends = list(accumulate(offsets_n2[:, 1].tolist(), max, initial=0))
    texts = tuple(text[begin:end] for begin, end in pairwise(ends))
    first = next((number for number, end in enumerate(ends[1:]) if end > cut), len(ids)) if cut else 0
    spans = first < len(ids) and cut > 0 and offsets_n2[first, 0] < cut
    return CutText(ids, first, texts, bool(spans))


def _by_tokens(encoder: Encoder, prompts: Sequence[str], wholes: Sequence[str]) -> list[CutText]:
    """Without offsets: the prompt's own tokens are cut off where the whole text begins with them, else as many of them
    as it begins with."""
    apart, together = encoder.encode_batch(prompts), encoder.encode_batch(wholes)
    found = []
    for prompt, whole in zip(apart, together, strict=True):
        shared = common_start(prompt.tolist(), whole.tolist())
        found.append(CutText(whole, shared, None, shared < len(prompt)))
    return found


def common_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))
