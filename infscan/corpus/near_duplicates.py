"""Near-duplicates: texts whose shared spans of tokens make up most of the shorter one, wherever they begin.

A packed sequence is compared by the document that its influence comes from (`carrying`), since the same document lies
at other offsets, beside other documents, in other sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infscan.errors import ConfigError

# Tokens of the shortest span that counts as shared.
SHINGLE = 5
# A text of fewer tokens is alike to a longer one only where it is most of so many of that one's (Lee et al. 2022,
# arXiv 2107.06499, take 50 tokens in common for a duplicate): a short quotation is no copy of what it stands in.
FEWEST = 50


def near_duplicates(texts: Sequence[np.ndarray], threshold: float = 0.8) -> list[int]:
    """Of every text, the index of the first text that it is like; of one that is like none before it, its own.

    Two are alike where the similarity of `shared` is at least `threshold`. Texts are compared with those that lead a
    group alone, so that a chain of slowly shifting pieces does not join what has nothing in common.

    texts: token ids, int64 [length].

    Raises:
        ConfigError: for a threshold outside (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"similar={threshold}: a share of shared tokens, above 0 and up to 1.")
    shingles = [_shingles(text) for text in texts]
    # Which leads have a shingle.
    having: dict[bytes, list[int]] = {}
    found = []
    for number, mine in enumerate(shingles):
        common = Counter(lead for shingle in mine for lead in having.get(shingle, ()))
        # A shared span has at most SHINGLE tokens for each place at which one begins.
        close = (lead for lead in sorted(common) if SHINGLE * common[lead] >= threshold * _least(shingles[lead], mine))
        lead = next((lead for lead in close if shared(shingles[lead], mine) >= threshold), number)
        found.append(lead)
        if lead == number:
            for shingle in set(mine):
                having.setdefault(shingle, []).append(number)
    return found


def shared(x: Sequence[bytes], y: Sequence[bytes]) -> float:
    """The tokens that lie in shared spans, as a share of the shorter text, or of up to FEWEST tokens of the longer.

    x, y: the shingles of two texts in order. The tokens are counted in each text, and the smaller count is taken.
    """
    if not x or not y:
        return float(len(x) == len(y))
    return min(_covered(x, set(y)), _covered(y, set(x))) / _least(x, y)


def _least(x: Sequence[bytes], y: Sequence[bytes]) -> int:
    shorter, longer = sorted((_tokens(x), _tokens(y)))
    return min(longer, max(shorter, FEWEST))


def carrying(documents: Sequence[Mapping[str, Any]], scores: NDArray[np.floating]) -> slice:
    """The tokens of the document with the largest absolute influence; all of them where no documents are known.

    documents: with `start` and `end`. scores: [T], by token.
    """
    pieces = [slice(document["start"], document["end"]) for document in documents] or [slice(None)]
    return max(pieces, key=lambda piece: abs(float(scores[piece].sum(dtype=np.float64))))


def _shingles(token_ids: np.ndarray) -> list[bytes]:
    """Every span of SHINGLE tokens in order; a shorter text is one."""
    ids = np.ascontiguousarray(token_ids, "<i8")
    if len(ids) <= SHINGLE:
        return [ids.tobytes()] if len(ids) else []
    return [ids[start : start + SHINGLE].tobytes() for start in range(len(ids) - SHINGLE + 1)]


def _tokens(shingles: Sequence[bytes]) -> int:
    return len(shingles) - 1 + len(shingles[0]) // 8 if shingles else 0


def _covered(mine: Sequence[bytes], others: set[bytes]) -> int:
    """How many tokens lie in spans that the other text has too."""
    ends = np.zeros(_tokens(mine) + 1, np.int64)
    length = len(mine[0]) // 8
    for start, shingle in enumerate(mine):
        if shingle in others:
            ends[start] += 1
            ends[start + length] -= 1
    return int((np.cumsum(ends[:-1]) > 0).sum())
