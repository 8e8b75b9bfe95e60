"""An explanation on a terminal: row by row, which layers and tokens carry it, and what it did to the completion."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.text import Text

from infscan.queries import Query
from infscan.report.terminal import excerpt, log_probabilities, one_line, printable, wording
from infscan.report.thirds import THIRDS, thirds

_TOKENS = 6
Rows = list[dict[str, Any]]
Pair = tuple[str, str]


def show_explanation(
    tables: Mapping[str, pa.Table], queries: Mapping[str, Query], measured: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Every row of an explanation, as far as a screen says it; the tables say all.

    measured: the run's `queries` by id, which says what the model gives the completions; None where it has none.
    """
    console = Console(soft_wrap=True, highlight=False)
    rows = tables["rows"].to_pylist()
    by_pair = {name: _by_pair(tables[name]) for name in ("layers", "tokens", "completion") if name in tables}
    beside: dict[str, Rows] = defaultdict(list)
    for row in tables["neighbours"].to_pylist():
        beside[row["item"]].append(row)
    for query_id in dict.fromkeys(row["query_id"] for row in rows):
        query = queries[query_id]
        asked = wording(query.prompt, query.completion, query.contrast)
        console.print(Text(f"\n{query_id}: {asked}  (measured on: {query.measure})", style="bold"))
        if known := (measured or {}).get(query_id):
            console.print(Text(f"  {log_probabilities(known)}", style="dim"))
        for row in (row for row in rows if row["query_id"] == query_id):
            pair = row["query_id"], row["item"]
            console.print(_head(row))
            console.print(_toned(by_pair["tokens"][pair], row["text"]))
            for line in _lines({name: found[pair] for name, found in by_pair.items()}):
                console.print(Text(f"      {line}"))
            for other in beside[row["item"]]:
                where = "before" if other["offset"] < 0 else "after"
                console.print(Text(f"      {where:<10} {excerpt(other['text'], [])}", style="dim"))
        alike = [row for row in tables["similar"].to_pylist() if row["query_id"] == query_id]
        for line in _groups(alike):
            console.print(Text(f"  {line}"))
    console.print(
        Text(
            "\nA token's margin belongs to the position that predicts the next token; attention mixes tokens, and the\n"
            "signs of single tokens are hard to read. as output: what the token adds as something to predict; as\n"
            "input: what a louder embedding of it would add.",
            style="dim",
        )
    )


def _by_pair(table: pa.Table) -> dict[Pair, Rows]:
    found: dict[Pair, Rows] = defaultdict(list)
    for row in table.to_pylist():
        found[row["query_id"], row["item"]].append(row)
    return found


def _head(row: dict[str, Any]) -> Text:
    sign = "-" if row["side"] == "opponent" else "+"
    place = f"{sign}{row['rank']}" if row["rank"] else "·"
    where = one_line(row["document_id"] or f"text {row['item']}")
    marks = "  (it hangs on a few tokens)" if row["spurious"] else ""
    score = Text(f"{row['score']:+12.4g}", style="green" if row["score"] > 0 else "red")
    return Text.assemble(f"\n  {place:<4}", score, f"  sequence {row['item']}  {where[:48]}{marks}")


def _toned(tokens: Rows, text: str | None) -> Text:
    """The sequence's tokens, green where their margin is positive and red where negative, strong ones bold."""
    if text is None:
        return Text("      " + " ".join(str(token["token_id"]) for token in tokens[:24]), style="dim")
    largest = max(abs(token["score"]) for token in tokens) or 1.0
    found = Text("      ")
    for token in tokens:
        share = token["score"] / largest
        style = "dim" if abs(share) < 0.1 else ("green" if share > 0 else "red") + (" bold" if abs(share) > 0.5 else "")
        found.append(printable(token["token"]), style=style)
    return found


def _lines(parts: Mapping[str, Rows]) -> list[str]:
    layers = {row["layer"]: row["score"] for row in parts["layers"]}
    total = sum(layers.values())
    third = thirds(list(layers))
    by_third = {name: sum(score for layer, score in layers.items() if third[layer] == name) for name in THIRDS}
    said = [
        "layers     "
        + "  ".join(f"{name} {score / total:+.0%}" if total else name for name, score in by_third.items())
        + " of the score"
    ]
    if "completion" in parts:
        raised = [f"{_quoted(row)} {row['score']:+.4g}" for row in parts["completion"]]
        said.append("raised     " + "  ".join(raised))
    for column, name in (("score", "positions"), ("output", "as output"), ("input", "as input")):
        known = [row for row in parts["tokens"] if row[column] is not None]
        strongest = sorted(known, key=lambda row: -abs(row[column]))[:_TOKENS]
        if strongest:
            said.append(f"{name:<10} " + "  ".join(f"{_quoted(row)} {row[column]:+.4g}" for row in strongest))
    return said


def _quoted(row: dict[str, Any]) -> str:
    return f"‘{printable(row['token'])}’" if row["token"] is not None else str(row["token_id"])


def _groups(alike: Rows) -> list[str]:
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for row in alike:
        groups[row["side"], row["group"]].append(f"{'-' if row['side'] == 'opponent' else '+'}{row['rank']}")
    return [f"near-duplicates: {', '.join(ranks)}" for ranks in groups.values()]
