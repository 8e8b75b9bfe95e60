"""A few texts that a person gives to be scored, as the sequences they would be in a corpus packed by document."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from infscan.corpus.json_lines import lines_of, parse_object
from infscan.corpus.tokenizer import Tokenizer
from infscan.errors import ConfigError, CorpusError


@dataclass(frozen=True, eq=False)
class GivenText:
    """token_ids: int64 [length]. queries: the only ones that it is to be scored against; None for all."""

    token_ids: np.ndarray
    queries: tuple[str, ...] | None = None


_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KEYS = ("id", "text", "input_ids", "queries")


def given_texts(
    text: str | None,
    path: str | None,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    context: int,
    bos_id: int | None,
) -> dict[str, GivenText]:
    """By id: one `text` (its id is `text`), or the rows of a JSONL file.

    A row is `{"id", "text"}` or `{"id", "input_ids"}`, with an optional list `queries`. bos_id: put before every text,
    as the corpus had it; None: none.

    Raises:
        ConfigError, CorpusError: with the line, the value and the fix.
    """
    if text is not None:
        return {"text": GivenText(_tokens({"text": text}, "text", tokenizer, vocab_size, context, bos_id))}
    assert path is not None
    found: dict[str, GivenText] = {}
    for number, line in lines_of(path):
        where = f"{path}, line {number}"
        row = parse_object(line, where)
        name = row.get("id")
        if not isinstance(name, str) or not _ID.fullmatch(name) or name in found:
            raise CorpusError(f"{where}: id {name!r} must be 1 to 64 letters, digits, '_' or '-', and stand once.")
        if slip := next((hint for key in row if (hint := _meant(key)) is not None), None):
            raise CorpusError(f"{where}: there is no key {slip[0][:80]!r}; did you mean {slip[1]!r}?")
        if row.get("text") is not None and row.get("input_ids") is not None:
            raise CorpusError(f"{where}: it brings text and input_ids, and only one can be scored; leave one out.")
        queries = row.get("queries")
        if queries is not None and not (isinstance(queries, list) and all(isinstance(each, str) for each in queries)):
            raise CorpusError(f"{where}: queries must be a list of query ids; leave it out for all of them.")
        tokens = _tokens(row, where, tokenizer, vocab_size, context, bos_id)
        found[name] = GivenText(tokens, None if queries is None else tuple(queries))
    if not found:
        raise CorpusError(f"{path} holds no text; write one JSON object per line: id, text.")
    return found


def _meant(key: str) -> tuple[str, str] | None:
    """A key that is nearly one that counts, and that one; other keys are a person's own."""
    close = [] if key in _KEYS else get_close_matches(key, _KEYS, 1, 0.75)
    return (key, close[0]) if close else None


def _tokens(
    row: dict[str, Any], where: str, tokenizer: Tokenizer | None, vocab_size: int, context: int, bos_id: int | None
) -> np.ndarray:
    ids = row.get("input_ids")
    if ids is None:
        if not isinstance(row.get("text"), str) or not row["text"]:
            raise CorpusError(f"{where}: no text; give text, or input_ids.")
        if tokenizer is None:
            raise ConfigError(
                f"{where}: it is text, and the model folder has no tokenizer; give input_ids (texts=...)."
            )
        ids = ([] if bos_id is None else [bos_id]) + tokenizer.encode(row["text"]).tolist()
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        raise CorpusError(f"{where}: input_ids must be a list of token ids below the vocabulary's {vocab_size}.")
    if not 2 <= len(ids) <= context:
        raise CorpusError(
            f"{where}: {len(ids)} tokens; a sequence has 2 to {context} (the model's context), so give another cut."
        )
    return np.asarray(ids, np.int64)
