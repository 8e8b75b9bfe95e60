"""Exact duplicates: documents whose content an earlier document of the corpus has too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from infscan.corpus.rows import Document

_HASH_BYTES = 16
HASH = np.dtype([("high", "<u8"), ("low", "<u8")])


def content_hash(document: Document) -> bytes:
    """BLAKE2b, 16 bytes, of a document's text or token ids, and of the prompt or loss mask it has; of no label."""
    digest = blake2b(digest_size=_HASH_BYTES)
    if document.text is not None:
        text = document.text.encode()
        prompt = (document.prompt or "").encode()
        digest.update(b"text%d:%d:" % (document.prompt is not None, len(prompt)) + prompt + text)
    elif document.token_ids is not None:
        digest.update(b"tokens%d:" % (document.loss is not None) + document.token_ids.astype("<i8").tobytes())
        if document.loss is not None:
            digest.update(document.loss.astype(np.uint8).tobytes())
    return digest.digest()


def hashes_of(documents: Iterable[Document]) -> np.ndarray:
    """HASH [n], a document's each."""
    return np.frombuffer(b"".join(map(content_hash, documents)), HASH)


def duplicates(parts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of each part's hashes, the positions (int64, ascending) whose hash occurs earlier in it or in an earlier part.

    About 50 bytes of memory per document.
    """
    hashes = np.concatenate([np.empty(0, HASH), *parts])
    # Stable, so that of equal hashes the first in the corpus comes first.
    order = np.lexsort((hashes["low"], hashes["high"]))
    ordered = hashes[order]
    again = np.sort(order[1:][ordered[1:] == ordered[:-1]])
    bounds = np.cumsum([0, *map(len, parts)])
    cuts = np.searchsorted(again, bounds)
    return [again[low:high] - start for low, high, start in zip(cuts, cuts[1:], bounds, strict=False)]
