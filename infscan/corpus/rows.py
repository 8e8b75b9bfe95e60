"""A row (of JSONL or of a table) as a document: its text or token ids, its labels, and where its loss is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa

from infscan.config import CorpusConfig
from infscan.corpus.files import name_below, partitions
from infscan.corpus.json_lines import kind_of
from infscan.errors import BadDocumentError
from infscan.storage.foreign import parse_json

MAX_LINE_BYTES = 64 << 20
# Ids and sources are repeated in every sequence of their document.
MAX_LABEL_CHARACTERS = 4096
# Up to here every whole number is a float of its own.
MAX_EXACT = 2.0**53


# What find() gives where a row has no such field: null is a value.
_ABSENT = object()


@dataclass(frozen=True, eq=False)
class Document:
    """One document: its text, or its token ids (int [n]) where the corpus brings them.

    `prompt`: a text that comes before, without a loss (corpus.prompt_field). `loss`: bool [n], where it has one, of
    token ids that are not all of them in the loss; None where they are. `spans`: whether a token of its begins in the
    prompt and ends after it. `aside`: how many of its row's labels are made up though it
    was asked for them by name, or it brings something that can be none. `lacks`: by
    key, what fields its row has in place of one that was asked for.
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
    aside: int = 0
    lacks: Mapping[str, tuple[str, ...]] | None = None


def document_of(
    uri: str,
    where: str,
    name: str,
    offset: int,
    row: dict[str, Any],
    config: CorpusConfig,
    fields: tuple[str, ...] | None = None,
) -> Document:
    """The document of one row; `name` is its id where it brings none. fields: what the file has, where `row` has less.

    Raises:
        BadDocumentError: saying `where`, for a row that is no document.
    """
    text: str | None = None
    prompt: str | None = None
    token_ids: np.ndarray | None = None
    loss: np.ndarray | None = None
    tokens = None if config.tokens_field is None else find(row, config.tokens_field)
    if tokens is not None and tokens is not _ABSENT:
        token_ids = _token_ids(where, str(config.tokens_field), tokens)
        if config.masked:
            token_ids, loss = _with_loss(where, token_ids, row, config)
    else:
        text = _text(where, row, config)
        if config.prompt_field is not None:
            prompt = _prompt(where, row, config.prompt_field)
    own_id = _label(where, row, config, "id_field")
    # Of Hive's columns, which are folders, the one that may be a source is kept.
    folders = partitions(uri)
    own_source = _label(where, {**folders, **row} if folders else row, config, "source_field")
    lacks = [key for key, label in (("id_field", own_id), ("source_field", own_source)) if label is _Lacking.asked]
    return Document(
        id=own_id if isinstance(own_id, str) else name,
        source=own_source if isinstance(own_source, str) else name_below(uri, config.path),
        text=text,
        token_ids=token_ids,
        path=uri,
        offset=offset,
        prompt=prompt,
        loss=loss,
        aside=sum(isinstance(label, _Lacking) and label is not _Lacking.none for label in (own_id, own_source)),
        lacks=dict.fromkeys(lacks, fields or tuple(fields_of(row))) if lacks else None,
    )


def find(row: Mapping[str, Any], field: str) -> Any:
    """A field of a row, or of an object in it by a dotted path (`meta.lang`); `_ABSENT` where there is none.

    An object may be written as the JSON of a text, as RedPajama's `meta` is; names may have dots of their own.
    """
    if field in row:
        return row[field]
    for head, rest in heads_of(field):
        inner = _object_in(row.get(head))
        if inner is not None and (found := find(inner, rest)) is not _ABSENT:
            return found
    return _ABSENT


def heads_of(field: str) -> Iterator[tuple[str, str]]:
    """Where a dotted path may be cut, the longest head first: `a.b.c` as (`a.b`, `c`), (`a`, `b.c`)."""
    parts = field.split(".")
    yield from ((".".join(parts[:at]), ".".join(parts[at:])) for at in range(len(parts) - 1, 0, -1))


def _object_in(value: Any) -> Mapping[str, Any] | None:
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = parse_json(value)
        except ValueError:
            return None
    return value if isinstance(value, Mapping) else None


def fields_of(row: Mapping[str, Any]) -> list[str]:
    """The names of a row's fields, those of objects in it dotted."""
    found: list[str] = []
    for name, value in row.items():
        inner = value if isinstance(value, Mapping) else {}
        found += [f"{name}.{one}" for one in inner] or [str(name)]
    return found


def _prompt(where: str, row: dict[str, Any], field: str) -> str:
    prompt = _decoded(where, field, find(row, field))
    if isinstance(prompt, str):
        return prompt
    if prompt is _ABSENT:
        raise _no_field(where, row, field, "prompt_field")
    raise BadDocumentError(
        f"{where}: {field!r} is {kind_of(prompt)}, not a text; give the prompt's text, empty for no prompt.",
        "no prompt",
    )


def _no_field(where: str, row: dict[str, Any], field: str, key: str) -> BadDocumentError:
    return BadDocumentError(
        f"{where} has no field {field!r}; it has {_listed(row)}. Every row says where its loss is; name the field in "
        f"corpus.{key}, or give null for a corpus whose loss is everywhere.",
        "no prompt",
    )


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(name)[:80] for name in fields_of(row)[:10]) or "none"


def _with_loss(
    where: str, token_ids: np.ndarray, row: dict[str, Any], config: CorpusConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids with the prompt's before them where those come apart, and bool [n]: which of them have a loss."""
    if config.mask_field is not None:
        if (value := find(row, config.mask_field)) is _ABSENT:
            raise _no_field(where, row, config.mask_field, "mask_field")
        mask = value if isinstance(value, list) else value.to_pylist() if isinstance(value, pa.Array) else None
        if mask is None or len(mask) != len(token_ids) or not all(one in (0, 1) for one in mask):
            found = kind_of(value)
            if mask is not None:
                other = next((one for one in mask if one not in (0, 1)), None)
                found = f"{len(mask)} values for {len(token_ids)} token ids"
                found = found if len(mask) != len(token_ids) else f"a list with {other!r} in it"
            raise BadDocumentError(
                f"{where}: {config.mask_field!r} is {found}; give a 0 (no loss) or a 1 for every one of the token ids.",
                "no loss mask",
            )
        return token_ids, np.array(mask, np.bool_)
    assert config.prompt_field is not None
    if (value := find(row, config.prompt_field)) is _ABSENT:
        raise _no_field(where, row, config.prompt_field, "prompt_field")
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
    text = _decoded(where, config.text_field, find(row, config.text_field))
    if isinstance(text, str):
        if len(text) > MAX_LINE_BYTES:
            raise BadDocumentError(
                f"{where}: a text of {len(text)} characters; split documents of more than {MAX_LINE_BYTES}.", "too long"
            )
        return text
    if text is not _ABSENT:
        raise BadDocumentError(
            f"{where}: {config.text_field!r} is {kind_of(text)}, not a text; {_for_text(text)} or leave out up to N "
            "such documents with corpus.allow_bad_documents=N.",
            "not a text",
        )
    neither = ""
    if config.tokens_field:
        is_null = find(row, config.tokens_field) is None
        neither = f", and {config.tokens_field!r} is null" if is_null else f" nor {config.tokens_field!r}"
    raise BadDocumentError(
        f"{where} has no field {config.text_field!r}{neither}; it has {_listed(row)}. Name the text's field in "
        "corpus.text_field, or the token ids' in corpus.tokens_field.",
        "no text",
    )


def _for_text(value: Any) -> str:
    if isinstance(value, list | pa.Array):
        return "write it as one text first (a conversation by its chat template),"
    return "correct or remove the row,"


def _decoded(where: str, field: str, value: Any) -> Any:
    """Bytes as the text that they are: ClickHouse and Impala write texts without saying that they are UTF-8."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadDocumentError(
            f"{where}: {field!r} is bytes, not UTF-8 at byte {error.start}; name another field, or write it as text.",
            "not UTF-8",
        ) from None


class _Lacking(Enum):
    """Why a row has no label of its own."""

    none = "it has none"
    asked = "it has no such field, and one was asked for by name"
    empty = "it has nothing in the field that was asked for by name"
    unusable = "it has something that is no label, and nobody asked for it by name"


def _label(where: str, row: Mapping[str, Any], config: CorpusConfig, key: str) -> str | _Lacking:
    """A row's own id or source.

    Raises:
        BadDocumentError: where the key was given, and the field holds something else.
    """
    field = getattr(config, key)
    asked = field != getattr(CorpusConfig, key)
    value = find(row, field)
    if value is _ABSENT:
        return _Lacking.asked if asked else _Lacking.none
    if value is None or value == "" or (isinstance(value, float) and value != value):
        return _Lacking.empty if asked else _Lacking.none
    label = _as_label(value)
    if label is not None and len(label) <= MAX_LABEL_CHARACTERS:
        return label
    if not asked:
        return _Lacking.unusable
    what = kind_of(value) if label is None else f"{len(label)} characters long, above {MAX_LABEL_CHARACTERS}"
    raise BadDocumentError(
        f"{where}: {field!r} is {what}; name a field of texts or whole numbers in corpus.{key}.", "not a label"
    )


def _as_label(value: Any) -> str | None:
    """A text or whole number as a text: pandas makes floats of whole numbers beside an empty one."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, str | UUID) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    exact = isinstance(value, Decimal) or (isinstance(value, float) and abs(value) <= MAX_EXACT)
    return str(int(value)) if exact and value == value // 1 else None


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
            f"{where}: {field!r} is {kind_of(value)}, not a list of token ids; fix or remove the row.", "no token ids"
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
