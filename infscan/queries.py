"""Queries: the file a user writes, tokenised, checked, and expanded into what is measured. No torch here.

A row is `{"id", "prompt", "completion"}` or `{"id", "input_ids", "prompt_len"}`, with an optional `contrast` (a second
completion: the measurement is the difference of the two log-probabilities) and an optional `measure`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import numpy as np

from infscan.config import Measure, QueriesConfig, fingerprint
from infscan.corpus.cut import CutText, Encoder, common_start, encode_cut
from infscan.corpus.json_lines import lines_of, parse_object
from infscan.errors import BadDocumentError, QueryError, RunError
from infscan.storage import Store
from infscan.storage.foreign import parse_lines
from infscan.storage.shapes import check_types

# Where a run keeps what it measured.
MEASURED = "queries/queries.jsonl"
# The id of a query that is given in the settings.
ONE = "query"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NOTHING_BEFORE = "its first token, which nothing precedes, has no probability and is not measured"
_KEYS = ("id", "prompt", "completion", "contrast", "measure", "input_ids", "prompt_len")


@dataclass(frozen=True)
class Part:
    """A token sequence, and the positions t whose -log p(x_t | x_<t) count, times `sign`, in the query's -f.

    texts: of every token, for people; None where only ids came, or the tokenizer does not say.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    sign: float = 1.0
    texts: tuple[str, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Query:
    """One measurement f, as the parts of -f. The texts are for people (None where only ids came).

    warnings: what of its wording is probably not meant.
    """

    id: str
    parts: tuple[Part, ...]
    prompt: str | None = None
    completion: str | None = None
    measure: str = Measure.completion.value
    contrast: str | None = None
    warnings: tuple[str, ...] = field(default=(), compare=False)


def read_queries(
    config: QueriesConfig, encoder: Encoder | None, *, vocab_size: int, context: int, bos_id: int | None
) -> list[Query]:
    """Read, tokenise and check a query file; `tokens` queries come back expanded into `id#0`, `id#1`, ...

    bos_id: put before every prompt; None puts none. Prompt and completion are tokenised as one text.

    Raises:
        QueryError: with the line, the id, the value and the fix.
    """
    queries: list[Query] = []
    for where, row in _rows(config):
        asked = _given_tokens(row, where) if "input_ids" in row else _tokenised(row, encoder, bos_id, where)
        for one in asked.cuts:
            _check_tokens(one.token_ids.tolist(), one.prompt_tokens, vocab_size, context, where)
        queries += _expand(row["id"], asked, _measure(row, config, where), row, where)
    return queries


def check_rows(config: QueriesConfig) -> None:
    """All of a query file that can be wrong whatever the model is.

    Raises:
        QueryError: as `read_queries`.
    """
    for where, row in _rows(config):
        if "input_ids" in row:
            _given_tokens(row, where)
        else:
            _wording(row, where)


def _rows(config: QueriesConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows, and what each is called in errors; their ids, keys and measures are right, and there is one at least.

    Raises:
        QueryError: for a row that is none.
    """
    seen: dict[str, int] = {}
    for number, line in _lines(config):
        where = f"{config.path}, line {number}" if config.path else "queries.prompt"
        row = _parse(line, where)
        query_id = _checked_id(row, where)
        if query_id in seen:
            raise QueryError(f"{where}: the id {query_id!r} is taken by line {seen[query_id]}; ids must be distinct.")
        seen[query_id] = number
        where = f"{where} (query {query_id!r})"
        _check_keys(row, where)
        _measure(row, config, where)
        yield where, row
    if not seen:
        raise QueryError(f"{config.path} holds no query; write one JSON object per line: id, prompt, completion.")


def _lines(config: QueriesConfig) -> Iterator[tuple[int, bytes]]:
    """The file's lines with their numbers, blank ones left out; or the one query that the settings hold."""
    if not config.path:
        row = {"id": ONE, "prompt": config.prompt, "completion": config.completion, "contrast": config.contrast}
        yield 1, json.dumps(row).encode()
        return
    yield from lines_of(config.path)


def queries_fingerprint(queries: Sequence[Query]) -> str:
    """Of what is measured: ids, tokens, positions and signs, not of the file's wording."""
    return fingerprint(
        [[query.id, [[part.token_ids, part.positions, part.sign] for part in query.parts]] for query in queries]
    )


def query_warnings(queries: Sequence[Query]) -> list[str]:
    """What of the queries' wording is probably not meant, each sentence once."""
    return list(dict.fromkeys(warning for query in queries for warning in query.warnings))


def by_token(query: Query) -> list[Query]:
    """A query's measurement token by token: `<id>#0`, `<id>#1`, ..., which add up to it; a contrast's keep its sign."""
    parts = [replace(part, positions=(position,)) for part in query.parts for position in part.positions]
    return [replace(query, id=f"{query.id}#{index}", parts=(part,)) for index, part in enumerate(parts)]


def measured_jsonl(queries: Sequence[Query]) -> bytes:
    """What a run measured, as it keeps it in `MEASURED`."""
    return "".join(json.dumps(_plain(query), ensure_ascii=False) + "\n" for query in queries).encode()


def _plain(query: Query) -> dict[str, Any]:
    return {
        "id": query.id,
        "measure": query.measure,
        "prompt": query.prompt,
        "completion": query.completion,
        **({} if query.contrast is None else {"contrast": query.contrast}),
        "parts": [
            {
                "input_ids": part.token_ids,
                "positions": part.positions,
                "sign": part.sign,
                **({} if part.texts is None else {"texts": part.texts}),
            }
            for part in query.parts
        ],
    }


def read_measured(store: Store) -> list[Query]:
    """What a run measured: the queries that `measured_jsonl` wrote into its folder.

    Raises:
        StorageError: where the folder is no run's.
        RunError: where the file does not hold what was written.
    """
    return [_measured(row) for row in measured_rows(store)]


def measured_rows(store: Store) -> list[dict[str, Any]]:
    """The rows of what a run measured, as they are written; raises as `read_measured`."""
    rows = parse_lines(store.read(MEASURED), f"{store.uri}/{MEASURED}")
    try:
        for row in rows:
            query = _measured(row)
            check_types(query, Query)
            for part in query.parts:
                if not math.isfinite(part.sign) or not all(0 <= t < len(part.token_ids) for t in part.positions):
                    raise ValueError("a position or a sign that no query has")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{store.uri}/{MEASURED} is not what was written; restore it, or scan again.") from None
    return rows


def _measured(row: dict[str, Any]) -> Query:
    parts = [
        Part(
            tuple(part["input_ids"]),
            tuple(part["positions"]),
            float(part["sign"]),
            tuple(part["texts"]) if part.get("texts") is not None else None,
        )
        for part in row["parts"]
    ]
    return Query(row["id"], tuple(parts), row["prompt"], row["completion"], row["measure"], row.get("contrast"))


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_object(line, where)
    except BadDocumentError as error:
        raise QueryError(str(error)) from None


def _checked_id(row: dict[str, Any], where: str) -> str:
    query_id = row.get("id")
    if not isinstance(query_id, str) or not _ID.fullmatch(query_id):
        raise QueryError(f"{where}: id {query_id!r} must be a string of 1 to 64 letters, digits, '_' or '-'.")
    return query_id


def _measure(row: dict[str, Any], config: QueriesConfig, where: str) -> Measure:
    value = row.get("measure")
    if value is None:
        return config.measure
    try:
        return Measure(value)
    except ValueError:
        known = ", ".join(measure.value for measure in Measure)
        raise QueryError(f"{where}: measure {value!r} is unknown; give one of {known}.") from None


@dataclass(frozen=True, eq=False)
class _Asked:
    """A row's completion, and its contrast where it has one, after the same prompt; what was noticed on the way."""

    cuts: list[CutText]
    warnings: tuple[str, ...] = ()


def _check_keys(row: dict[str, Any], where: str) -> None:
    for key in row:
        if key not in _KEYS:
            close = get_close_matches(str(key), _KEYS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"a row has {', '.join(_KEYS)}."
            raise QueryError(f"{where}: there is no key {str(key)[:80]!r}; {hint}")
    twice = [key for key in ("prompt", "completion") if "input_ids" in row and row.get(key) is not None]
    if twice:
        raise QueryError(f"{where}: it brings input_ids and {twice[0]}, and only one can be measured; leave one out.")
    if "input_ids" not in row and row.get("prompt_len") is not None:
        raise QueryError(f"{where}: prompt_len counts input_ids, and there are none; leave it out, or give them.")


def _given_tokens(row: dict[str, Any], where: str) -> _Asked:
    """Token ids as the row brings them."""
    ids, prompt_length = row["input_ids"], row.get("prompt_len")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise QueryError(f"{where}: input_ids must be a list of whole numbers.")
    if type(prompt_length) is not int or not 0 <= prompt_length <= len(ids):
        raise QueryError(
            f"{where}: prompt_len={prompt_length!r} must be a whole number between 0 and the {len(ids)} input_ids."
        )
    rows = [ids]
    if (contrast := row.get("contrast")) is not None:
        if not isinstance(contrast, list) or not all(type(token) is int for token in contrast):
            raise QueryError(f"{where}: beside input_ids, contrast must be a list of token ids too.")
        rows.append(ids[:prompt_length] + contrast)
    warnings = () if prompt_length else (f"query {row['id']!r}: {_NOTHING_BEFORE}",)
    # Of whatever size: that they lie in the vocabulary is checked next.
    return _Asked([CutText(np.array(one, object), prompt_length) for one in rows], warnings)


def _tokenised(row: dict[str, Any], encoder: Encoder | None, bos_id: int | None, where: str) -> _Asked:
    """Prompt and completion (or contrast) as one text, cut where the completion begins."""
    prompt, texts = _wording(row, where)
    if encoder is None:
        raise QueryError(f"{where}: it is text, and the model folder has no tokenizer; give input_ids and prompt_len.")
    try:
        cuts = encode_cut(encoder, [(prompt, text) for text in texts])
    except BadDocumentError as error:
        raise QueryError(f"{where}: {error}") from None
    shared = _same_prompt(cuts)
    warnings = [*_slips(prompt, texts, cuts), *_unknown(cuts, encoder.unk_id)]
    if any(one.prompt_tokens != shared and not one.spans for one in cuts):
        warnings.append(f"completion and contrast have the first {shared} tokens alike: both are measured from there")
    if shared == 0 and bos_id is None:
        warnings.append(_NOTHING_BEFORE)
    warnings = [f"query {row['id']!r}: {said}" for said in warnings]
    return _Asked([_after_bos(replace(one, prompt_tokens=shared), bos_id) for one in cuts], tuple(warnings))


def _wording(row: dict[str, Any], where: str) -> tuple[str, list[str]]:
    """The prompt, and the completion with the contrast where there is one."""
    prompt = row.get("prompt", "")
    if not isinstance(prompt, str):
        raise QueryError(f"{where}: prompt must be a string (it may be empty).")
    texts = []
    for key in ("completion",) if row.get("contrast") is None else ("completion", "contrast"):
        if not isinstance(text := row.get(key), str) or not text:
            raise QueryError(f"{where}: no {key}; give the text whose probability is to be explained.")
        texts.append(text)
    return prompt, texts


def _same_prompt(cuts: Sequence[CutText]) -> int:
    """The prompt's tokens that completion and contrast have alike: log-probabilities are compared after one prompt."""
    rows = [one.token_ids.tolist() for one in cuts]
    alike = common_start(rows[0], rows[-1]) if len(rows) > 1 else len(rows[0])
    return min(alike, *(one.prompt_tokens for one in cuts))


def _after_bos(one: CutText, bos_id: int | None) -> CutText:
    if bos_id is None:
        return one
    texts = None if one.texts is None else ("", *one.texts)
    return CutText(np.array([bos_id, *one.token_ids.tolist()]), one.prompt_tokens + 1, texts, one.spans)


def _slips(prompt: str, texts: Sequence[str], cuts: Sequence[CutText]) -> list[str]:
    """What in the wording is probably a slip, or is measured elsewhere than it says."""
    found = []
    for text, one in zip(texts, cuts, strict=True):
        if one.spans:
            what = "a token" if one.texts is None else f"the token {one.texts[one.prompt_tokens]!r}"
            fix = " (move the space from the prompt's end to the completion)" if prompt.endswith(" ") else ""
            found.append(
                f"{what} spans the prompt's end and the beginning of {text[:24]!r}: it counts as the latter's{fix}"
            )
        elif prompt.endswith(" ") and text.startswith(" "):
            found.append(f"the prompt ends in a space and {text[:12]!r} begins with one: a corpus rarely has two")
        elif _cuts_a_word(prompt[-1:], text[:1]):
            found.append(f"no space between {prompt[-12:]!r} and {text[:12]!r}: the completion is a part of a word")
    return found


def _unknown(cuts: Sequence[CutText], unk_id: int | None) -> list[str]:
    """What is measured as the token that stands for anything unknown."""
    found = []
    for one in cuts:
        at = [place for place in range(one.prompt_tokens, len(one.token_ids)) if one.token_ids[place] == unk_id]
        if at:
            what = "a token" if one.texts is None else repr(one.texts[at[0]])
            found.append(f"the tokenizer does not know {what}: what is measured is its token for anything unknown")
    return found


def _cuts_a_word(before: str, after: str) -> bool:
    """Whether two characters are of one word, in scripts that put spaces between words."""
    cased = all(one.lower() != one.upper() for one in (before, after))
    return cased or (before.isdigit() and after.isdigit())


def _check_tokens(tokens: list[int], prompt_length: int, vocab_size: int, context: int, where: str) -> None:
    if len(tokens) == prompt_length:
        raise QueryError(
            f"{where}: no completion follows the {prompt_length} prompt tokens; add the tokens to measure."
        )
    if len(tokens) < 2:
        raise QueryError(f"{where}: a single token has no log-probability; add a prompt or a longer completion.")
    if len(tokens) > context:
        raise QueryError(f"{where}: {len(tokens)} tokens are longer than the model's context of {context}; shorten it.")
    outside = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise QueryError(f"{where}: token id {outside} is outside the model's vocabulary of {vocab_size}.")


def _expand(query_id: str, asked: _Asked, measure: Measure, row: dict[str, Any], where: str) -> list[Query]:
    keys = ("prompt", "completion", "contrast")
    prompt, completion, contrast = (row.get(key) if isinstance(row.get(key), str) else None for key in keys)

    def query(name: str, parts: list[Part]) -> Query:
        return Query(name, tuple(parts), prompt, completion, measure.value, contrast, asked.warnings)

    def part(one: CutText, positions: Sequence[int], sign: float = 1.0) -> Part:
        return Part(tuple(one.token_ids.tolist()), tuple(positions), sign, one.texts)

    spans = [range(max(1, one.prompt_tokens), len(one.token_ids)) for one in asked.cuts]
    if measure is Measure.tokens:
        if len(spans) > 1:
            raise QueryError(f"{where}: measure 'tokens' splits one completion; leave out contrast or that measure.")
        return [query(f"{query_id}#{index}", [part(asked.cuts[0], (t,))]) for index, t in enumerate(spans[0])]
    if measure is Measure.first:
        spans = [span[:1] for span in spans]
    signs = (1.0, -1.0)[: len(spans)]
    parts = [part(*each) for each in zip(asked.cuts, spans, signs, strict=True)]
    if len({one.token_ids[: one.positions[-1] + 1] for one in parts}) < len(parts):
        raise QueryError(
            f"{where}: its contrast has the tokens of its completion, as far as they are measured, so their difference "
            "is 0 whatever the corpus has; give another contrast, or leave it out."
        )
    return [query(query_id, parts)]


def choose(queries: Sequence[Query], query_ids: Sequence[str]) -> list[Query]:
    """The queries of these ids, in their order; all of them for none.

    Raises:
        QueryError: for an id that none of them has.
    """
    by_id = {query.id: query for query in queries}
    for query_id in query_ids:
        if query_id not in by_id:
            close = get_close_matches(query_id, by_id, 1)
            listed = f"did you mean {close[0]}?" if close else f"it has {', '.join(list(by_id)[:8])}"
            more = ", ..." if not close and len(by_id) > 8 else ""
            raise QueryError(f"query_ids: {query_id!r} is none of the run's; {listed}{more}")
    return [by_id[query_id] for query_id in query_ids] if query_ids else list(queries)
