"""Queries: the file a user writes, tokenised, checked, and expanded into what is measured. No torch here.

A row is `{"id", "prompt", "completion"}` or `{"id", "input_ids", "prompt_len"}`, with an optional `contrast` (a second
completion: the measurement is the difference of the two log-probabilities) and an optional `measure`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from infscan.config import Measure, QueriesConfig, fingerprint
from infscan.errors import QueryError, RunError
from infscan.storage import Store, open_input

# Where a run keeps what it measured.
MEASURED = "queries/queries.jsonl"
# The id of a query that is given in the settings.
ONE = "query"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Encoder(Protocol):
    """What queries need of a tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Part:
    """A token sequence, and the positions t whose -log p(x_t | x_<t) count, times `sign`, in the query's -f."""

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]
    sign: float = 1.0


@dataclass(frozen=True)
class Query:
    """One measurement f, as the parts of -f. The texts are for people (None where only ids came)."""

    id: str
    parts: tuple[Part, ...]
    prompt: str | None = None
    completion: str | None = None
    measure: str = Measure.completion.value
    contrast: str | None = None


def read_queries(
    config: QueriesConfig, encoder: Encoder | None, *, vocab_size: int, context: int, bos_id: int | None
) -> list[Query]:
    """Read, tokenise and check a query file; `tokens` queries come back expanded into `id#0`, `id#1`, ...

    bos_id: put before every prompt; None puts none. Prompt and completion are tokenised separately.

    Raises:
        QueryError: with the line, the id, the value and the mend.
    """
    queries: list[Query] = []
    seen: dict[str, int] = {}
    for number, line in _lines(config):
        where = f"{config.path}, line {number}" if config.path else "queries.prompt"
        row = _parse(line, where)
        query_id = _checked_id(row, where)
        if query_id in seen:
            raise QueryError(f"{where}: the id {query_id!r} is taken by line {seen[query_id]}; ids must be distinct.")
        seen[query_id] = number
        where = f"{where} (query {query_id!r})"
        measure = _measure(row, config, where)
        pairs = [_tokens(row, "completion", encoder, bos_id, where)]
        if row.get("contrast") is not None:
            pairs.append(_tokens(row, "contrast", encoder, bos_id, where))
        for tokens, prompt_length in pairs:
            _check_tokens(tokens, prompt_length, vocab_size, context, where)
        queries += _expand(query_id, pairs, measure, row, where)
    if not queries:
        raise QueryError(f"{config.path} holds no query; write one JSON object per line: id, prompt, completion.")
    return queries


def _lines(config: QueriesConfig) -> Iterator[tuple[int, bytes]]:
    """The file's lines with their numbers, blank ones left out; or the one query that the settings hold."""
    if not config.path:
        row = {"id": ONE, "prompt": config.prompt, "completion": config.completion, "contrast": config.contrast}
        yield 1, json.dumps(row).encode()
        return
    with open_input(config.path) as stream:
        lines = stream.read().split(b"\n")
    yield from ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def queries_fingerprint(queries: Sequence[Query]) -> str:
    """Of what is measured: ids, tokens, positions and signs, not of the file's wording."""
    return fingerprint(
        [[query.id, [[part.token_ids, part.positions, part.sign] for part in query.parts]] for query in queries]
    )


def spacing_warnings(queries: Sequence[Query]) -> list[str]:
    """What in the wording of queries is probably a slip: it measures tokens that a corpus seldom has."""
    found = []
    for query in queries:
        prompt, completion = query.prompt, query.completion
        if prompt is None or completion is None:
            continue
        if prompt.endswith(" "):
            said = "its prompt ends in a space, which tokenizers put before the next word: move it to the completion"
        elif prompt[-1:].isalnum() and completion[:1].isalnum():
            said = f"no space between {prompt[-12:]!r} and {completion[:12]!r}: the completion is a part of a word"
        elif not prompt:
            said = "it has no prompt, so its first token, which nothing predicts, is not measured"
        else:
            continue
        found.append(f"query {query.id!r}: {said}")
    return found


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
            {"input_ids": part.token_ids, "positions": part.positions, "sign": part.sign} for part in query.parts
        ],
    }


def read_measured(store: Store) -> list[Query]:
    """What a run measured: the queries that `measured_jsonl` wrote into its folder.

    Raises:
        StorageError: where the folder is no run's.
        RunError: where the file does not hold what was written.
    """
    try:
        rows = [json.loads(line) for line in store.read(MEASURED).splitlines()]
        return [
            Query(
                row["id"],
                tuple(
                    Part(tuple(part["input_ids"]), tuple(part["positions"]), float(part["sign"]))
                    for part in row["parts"]
                ),
                row["prompt"],
                row["completion"],
                row["measure"],
                row.get("contrast"),
            )
            for row in rows
        ]
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{store.uri}/{MEASURED} is not what was written; restore it, or scan again.") from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise QueryError(f"{where}: not JSON ({error}); write one object per line.") from None
    if not isinstance(row, dict):
        raise QueryError(f"{where}: a {type(row).__name__}, not an object with id, prompt and completion.")
    return row


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


def _tokens(
    row: dict[str, Any], key: str, encoder: Encoder | None, bos_id: int | None, where: str
) -> tuple[list[int], int]:
    """Token ids of prompt plus completion (or contrast), and where the completion starts."""
    if "input_ids" in row:
        ids, prompt_length = row["input_ids"], row.get("prompt_len")
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise QueryError(f"{where}: input_ids must be a list of whole numbers.")
        if type(prompt_length) is not int or not 0 <= prompt_length <= len(ids):
            raise QueryError(
                f"{where}: prompt_len={prompt_length!r} must be a whole number between 0 and the {len(ids)} input_ids."
            )
        if key == "contrast":
            contrast = row["contrast"]
            if not isinstance(contrast, list) or not all(type(token) is int for token in contrast):
                raise QueryError(f"{where}: beside input_ids, contrast must be a list of token ids too.")
            return ids[:prompt_length] + contrast, prompt_length
        return list(ids), prompt_length
    prompt, completion = row.get("prompt", ""), row.get(key)
    if not isinstance(prompt, str):
        raise QueryError(f"{where}: prompt must be a string (it may be empty).")
    if not isinstance(completion, str) or not completion:
        raise QueryError(f"{where}: no {key}; give the text whose probability is to be explained.")
    if encoder is None:
        raise QueryError(f"{where}: it is text, and the model folder has no tokenizer; give input_ids and prompt_len.")
    before, after = (encoded.tolist() for encoded in encoder.encode_batch([prompt, completion]))
    before = ([bos_id] if bos_id is not None else []) + before
    return before + after, len(before)


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


def _expand(
    query_id: str, pairs: list[tuple[list[int], int]], measure: Measure, row: dict[str, Any], where: str
) -> list[Query]:
    keys = ("prompt", "completion", "contrast")
    prompt, completion, contrast = (row.get(key) if isinstance(row.get(key), str) else None for key in keys)

    def query(name: str, parts: list[Part]) -> Query:
        return Query(name, tuple(parts), prompt, completion, measure.value, contrast)

    spans = [range(max(1, prompt_length), len(tokens)) for tokens, prompt_length in pairs]
    if measure is Measure.tokens:
        if len(pairs) > 1:
            raise QueryError(f"{where}: measure 'tokens' splits one completion; leave out contrast or that measure.")
        tokens = tuple(pairs[0][0])
        return [query(f"{query_id}#{index}", [Part(tokens, (t,))]) for index, t in enumerate(spans[0])]
    if measure is Measure.first:
        spans = [span[:1] for span in spans]
    signs = (1.0, -1.0)[: len(pairs)]
    parts = [Part(tuple(ids), tuple(span), sign) for (ids, _), span, sign in zip(pairs, spans, signs, strict=True)]
    return [query(query_id, parts)]
