"""Documents of text as documents of token ids, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

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
    texts = [document.text for document in batch if document.text is not None]
    rows = iter(tokenizer.encode_batch(texts) if tokenizer else [])
    prompts = [document.prompt for document in batch if document.prompt is not None]
    before = iter(tokenizer.encode_batch(prompts) if tokenizer else [])
    for document in batch:
        if document.text is None:
            yield document
            continue
        token_ids = next(rows)
        if document.prompt is None:
            # Not by dataclasses.replace, which would cost as much as packing does.
            yield Document(document.id, document.source, None, token_ids, document.path, document.offset)
            continue
        # Apart, as a query's prompt and completion are; without a completion there is nothing to learn.
        prompt_ids = next(before) if len(token_ids) else next(before)[:0]
        yield replace(
            document,
            text=None,
            prompt=None,
            token_ids=np.concatenate([prompt_ids, token_ids]),
            loss=np.arange(len(prompt_ids) + len(token_ids)) >= len(prompt_ids),
        )
