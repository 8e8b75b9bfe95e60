"""A row (of JSONL or of a table) as a document: its text or token ids, its labels, and where its loss is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from infscan.config import CorpusConfig
from infscan.corpus.files import file_name
from infscan.errors import BadDocumentError

MAX_LINE_BYTES = 64 << 20
# Ids and sources are repeated in every sequence of their document.
MAX_LABEL_CHARACTERS = 4096


@dataclass(frozen=True, eq=False)
class Document:
    """One document: its text, or its token ids (int [n]) where the corpus brings them.

    `prompt`: a text that comes before, without a loss (corpus.prompt_field). `loss`: bool [n], where it has one, of
    token ids that are not all of them in the loss; None where they are. `spans`: whether a token of its begins in the
    prompt and ends after it.
    `offset` is the byte of the decompressed stream where its line starts (JSONL, text), or its row from 0 (tables).
    """

    id: str
    source: str
    text: str | None
    token_ids: np.ndarray | None
    path: str
    offset: int
    prompt: str | None = None
    loss: np.ndarray | None = None
    spans: bool = False


def document_of(uri: str, where: str, name: str, offset: int, row: dict[str, Any], config: CorpusConfig) -> Document:
    """The document of one row; `name` is its id where it brings none.

    Raises:
        BadDocumentError: saying `where`, for a row that is no document.
    """
    text: str | None = None
    prompt: str | None = None
    token_ids: np.ndarray | None = None
    loss: np.ndarray | None = None
    if config.tokens_field is not None and row.get(config.tokens_field) is not None:
        token_ids = _token_ids(where, config.tokens_field, row[config.tokens_field])
        if config.masked:
            token_ids, loss = _with_loss(where, token_ids, row, config)
    else:
        text = _text(where, row, config)
        if config.prompt_field is not None:
            prompt = _prompt(where, row, config.prompt_field)
    return Document(
        id=_label(where, row, config.id_field, name),
        source=_label(where, row, config.source_field, file_name(uri)),
        text=text,
        token_ids=token_ids,
        path=uri,
        offset=offset,
        prompt=prompt,
        loss=loss,
    )


def _prompt(where: str, row: dict[str, Any], field: str) -> str:
    if isinstance(prompt := row.get(field), str):
        return prompt
    if field in row:
        raise BadDocumentError(
            f"{where}: {field!r} is {kind_of(row[field])}, not a text; give the prompt's text, empty for no prompt.",
            "no prompt",
        )
    raise _no_field(where, row, field, "prompt_field")


def _no_field(where: str, row: dict[str, Any], field: str, key: str) -> BadDocumentError:
    fields = ", ".join(map(repr, list(row)[:10])) or "none"
    return BadDocumentError(
        f"{where} has no field {field!r}; it has {fields}. Every row says where its loss is; name the field in "
        f"corpus.{key}, or give null for a corpus whose loss is everywhere.",
        "no prompt",
    )


def _with_loss(
    where: str, token_ids: np.ndarray, row: dict[str, Any], config: CorpusConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with the prompt's before them where those come apart, and bool [n]: which of them have a loss."""
    if config.mask_field is not None:
        if config.mask_field not in row:
            raise _no_field(where, row, config.mask_field, "mask_field")
        value = row[config.mask_field]
        mask = value if isinstance(value, list) else value.to_pylist() if isinstance(value, pa.Array) else None
        if mask is None or len(mask) != len(token_ids) or not all(one in (0, 1) for one in mask):
            found = kind_of(value) if mask is None else f"{len(mask)} values for {len(token_ids)} token ids"
            raise BadDocumentError(
                f"{where}: {config.mask_field!r} is {found}; give a 0 (no loss) or a 1 for every one of the token ids.",
                "no loss mask",
            )
        return token_ids, np.array(mask, np.bool_)
    assert config.prompt_field is not None
    if config.prompt_field not in row:
        raise _no_field(where, row, config.prompt_field, "prompt_field")
    value = row[config.prompt_field]
    if type(value) is int:
        if not 0 <= value <= len(token_ids):
            raise BadDocumentError(
                f"{where}: {config.prompt_field!r} is {value}, and there are {len(token_ids)} token ids; give how many "
                "of them are the prompt.",
                "no prompt",
            )
        return token_ids, np.arange(len(token_ids)) >= value
    if isinstance(value, str | bool) or value is None:
        raise BadDocumentError(
            f"{where}: {config.prompt_field!r} is {kind_of(value)} beside token ids; give the prompt's token ids, or "
            "how many of the row's are the prompt.",
            "no prompt",
        )
    before = _token_ids(where, config.prompt_field, value)
    if not len(token_ids):
        return token_ids, np.empty(0, np.bool_)
    return np.concatenate([before, token_ids]), np.arange(len(before) + len(token_ids)) >= len(before)


def _text(where: str, row: dict[str, Any], config: CorpusConfig) -> str:
    text = row.get(config.text_field)
    if isinstance(text, str):
        if len(text) > MAX_LINE_BYTES:
            raise BadDocumentError(
                f"{where}: a text of {len(text)} characters; split documents of more than {MAX_LINE_BYTES}.", "too long"
            )
        return text
    if config.text_field in row:
        raise BadDocumentError(
            f"{where}: {config.text_field!r} is {kind_of(text)}, not a text; correct or remove the row, or "
            "leave out up to N such documents with corpus.allow_bad_documents=N.",
            "not a text",
        )
    fields = ", ".join(repr(name)[:80] for name in list(row)[:10]) or "none"
    neither = f" nor {config.tokens_field!r}" if config.tokens_field else ""
    raise BadDocumentError(
        f"{where} has no field {config.text_field!r}{neither}; it has {fields}. Name the text's field in "
        "corpus.text_field, or the token ids' in corpus.tokens_field.",
        "no text",
    )


def _label(where: str, row: dict[str, Any], field: str, missing: str) -> str:
    value = row.get(field)
    if value is None:
        return missing
    if isinstance(value, str | int) and not isinstance(value, bool):
        label = str(value)
        if len(label) <= MAX_LABEL_CHARACTERS:
            return label
        raise BadDocumentError(
            f"{where}: {field!r} has {len(label)} characters; give at most {MAX_LABEL_CHARACTERS}.", "not a label"
        )
    raise BadDocumentError(
        f"{where}: {field!r} is {kind_of(value)}; give a text or a whole number, or leave it out.", "not a label"
    )


def _token_ids(where: str, field: str, value: Any) -> np.ndarray:
    """int [n] in whatever width holds them; whether they lie in the vocabulary is the packer's question."""
    if isinstance(value, pa.Array):
        if not len(value):
            return np.empty(0, np.int64)
        if not pa.types.is_integer(value.type) or value.null_count:
            kind = "empty values" if value.null_count else f"values of type {value.type}"
            raise BadDocumentError(f"{where}: {field!r} holds {kind}; token ids are whole numbers.", "no token ids")
        return value.to_numpy(zero_copy_only=False)
    if not isinstance(value, list):
        raise BadDocumentError(
            f"{where}: {field!r} is {kind_of(value)}, not a list of token ids; mend or remove the row.", "no token ids"
        )
    for position, token in enumerate(value):
        if type(token) is not int:
            raise BadDocumentError(
                f"{where}: {field!r} holds {repr(token)[:40]} at position {position}; token ids are whole numbers.",
                "no token ids",
            )
    try:
        return np.array(value, np.int64)
    except OverflowError:
        raise BadDocumentError(
            f"{where}: {field!r} holds a number beyond 64 bits; is it a list of token ids?", "no token ids"
        ) from None


def kind_of(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")
