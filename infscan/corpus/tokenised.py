"""Documents of text as documents of token ids, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from infscan.corpus.cut import CutText, encode_cut
from infscan.corpus.rows import Document
from infscan.corpus.tokenizer import Tokenizer
from infscan.errors import CorpusError

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 4 << 20


def with_tokens(documents: Iterable[Document], tokenizer: Tokenizer | None) -> Iterator[Document]:
    """Tokenise in batches, in order; documents that bring token ids pass as they are.

    Raises:
        CorpusError: for text without a tokenizer.
    """
    batch: list[Document] = []
    characters = 0
    for document in documents:
        if document.text is not None and tokenizer is None:
            raise CorpusError(
                f"{document.path}: document {document.id!r} is text, and the model's folder has no tokenizer; add one, "
                "or name a field of token ids in corpus.tokens_field."
            )
        batch.append(document)
        characters += len(document.text or "")
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield from _encoded(batch, tokenizer)
            batch, characters = [], 0
    yield from _encoded(batch, tokenizer)


def _encoded(batch: list[Document], tokenizer: Tokenizer | None) -> Iterator[Document]:
    texts = [document.text for document in batch if document.text is not None and document.prompt is None]
    rows = iter(tokenizer.encode_batch(texts) if tokenizer else [])
    pairs = [(one.prompt, one.text) for one in batch if one.text is not None and one.prompt is not None]
    cuts = iter(encode_cut(tokenizer, pairs) if tokenizer else [])
    for document in batch:
        if document.text is None:
            yield document
        elif document.prompt is None:
            # Not by dataclasses.replace, which would cost as much as packing does.
            name, source, path, offset = document.id, document.source, document.path, document.offset
            yield Document(name, source, None, next(rows), path, offset, aside=document.aside)
        else:
            yield _cut(document, next(cuts))


def _cut(document: Document, cut: CutText) -> Document:
    """A document with its prompt's tokens, which have no loss; without a completion there is nothing to learn."""
    token_ids = cut.token_ids if document.text else cut.token_ids[:0]
    loss = np.arange(len(token_ids)) >= cut.prompt_tokens
    return replace(document, text=None, prompt=None, token_ids=token_ids, loss=loss, spans=cut.spans)
