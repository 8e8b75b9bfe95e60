"""Documents of text as documents of token ids, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from infscan.corpus.cut import CutText, encode_cut
from infscan.corpus.rows import Document
from infscan.corpus.tally import Tally
from infscan.corpus.tokenizer import Tokenizer
from infscan.errors import BadDocumentError, CorpusError

_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 4 << 20
# Of one text, with its prompt: a tokenizer takes up to 260 bytes of memory for a character.
MAX_TEXT_CHARACTERS = 16 << 20


def with_tokens(documents: Iterable[Document], tokenizer: Tokenizer | None, tally: Tally) -> Iterator[Document]:
    """Tokenise in batches, in order; documents that bring token ids pass as they are.

    Raises:
        BadDocumentError: for a text that is too long or that the tokenizer gives up, where `tally` allows no more.
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
        length = len(document.text or "") + len(document.prompt or "")
        if length > MAX_TEXT_CHARACTERS:
            tally.leave_out(_bad(document, f"{length} characters, above {MAX_TEXT_CHARACTERS}; split it.", "too long"))
            continue
        batch.append(document)
        characters += length
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield from _kept(batch, tokenizer, tally)
            batch, characters = [], 0
    yield from _kept(batch, tokenizer, tally)


def _bad(document: Document, reason: str, kind: str) -> BadDocumentError:
    return BadDocumentError(f"{document.path}: document {document.id[:80]!r}: {reason}", kind)


def _kept(batch: list[Document], tokenizer: Tokenizer | None, tally: Tally) -> Iterator[Document]:
    """The batch's documents with their tokens, without those that the tokenizer gives up."""
    try:
        # Whole before the first is handed on, so that none is twice.
        found = list(_encoded(batch, tokenizer))
    except BadDocumentError as error:
        if len(batch) == 1:
            tally.leave_out(_bad(batch[0], str(error), error.reason))
            return
        found = [kept for document in batch for kept in _kept([document], tokenizer, tally)]
    yield from found


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
