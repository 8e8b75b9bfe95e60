"""What a person sees at the end of a run: each query's strongest sequences, and where everything is."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from infscan.queries import measured_rows
from infscan.results.read import read_sequences, read_summary, read_top
from infscan.storage import Store

_ROWS = 3
_QUERIES = 12
_CHARACTERS = 76
LAYOUT = (
    ("config.yaml  plan.json  shards.parquet", "what was asked for, and how it was cut"),
    ("corpus/  factors/  queries/", "inputs made ready, where they were not reused"),
    ("shards/  refined/", "finished work: what a restart finds"),
    ("top/", "the answer: query_id, side, rank, sequence_id, score, ..."),
    ("sequences/", "the published sequences: text, tokens, provenance"),
    ("layers/  tokens/", "each score, split over layers and over input tokens"),
    ("summary.json  _SUCCESS", "counts, warnings, seconds by phase; the run is whole"),
)


def one_line(text: str) -> str:
    """What came from a corpus or a query file, as a terminal may show it.

    White space is a blank, and so is whatever controls a terminal: escapes, backspaces, bidirectional marks.
    """
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """The same characters, a blank for each that is not to be printed."""
    return "".join(character if character.isprintable() else " " for character in text)


def excerpt(text: str | None, token_ids: list[int], length: int = _CHARACTERS) -> str:
    """A line of a sequence's text, or of its token ids where there is no tokenizer."""
    shown = one_line(text if text is not None else " ".join(map(str, token_ids)))
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def show(uri: str, *, rows: int = _ROWS) -> None:
    """Print each query's strongest proponents and opponents, and the run folder's layout."""
    console = Console(soft_wrap=True, highlight=False)
    store = Store(uri)
    questions = measured_rows(store)
    sequences = {row["sequence_id"]: row for row in read_sequences(uri).to_pylist()}
    by_query: dict[str, list[dict]] = {}
    for row in read_top(uri).to_pylist():
        if row["rank"] <= rows:
            by_query.setdefault(row["query_id"], []).append(row)
    for question in questions[:_QUERIES]:
        console.print(Text(f"\n{question['id']}: {asked(question)}", style="bold"))
        if measured := measured_tokens(question):
            console.print(Text(measured, style="dim"))
        ordered = sorted(by_query.get(question["id"], []), key=lambda row: (row["side"] == "opponent", row["rank"]))
        for row in ordered:
            console.print(_row(row, sequences[row["sequence_id"]]))
        if not ordered:
            console.print("  no sequence moved it")
    if len(questions) > _QUERIES:
        console.print(Text(f"\n... and {len(questions) - _QUERIES} queries more in {uri}/top/"))
    console.print(Text(f"\n{uri}", style="bold"))
    for name, meaning in LAYOUT:
        console.print(Text(f"  {name:<40} {meaning}"))
    summary = read_summary(uri)
    if summary.get("approximation"):
        console.print(Text(how_good(summary["approximation"])))
    scanned = summary["counts"]["scanned"]
    console.print(Text(f"\n{scanned['sequences']:,} sequences, {scanned['tokens']:,} tokens scanned."))
    console.print(Text(f"As a page to read: infscan report {uri}"))


def how_good(approximation: dict) -> str:
    """What `infscan.steps.check` found, in sentences."""
    queries = {name: row for name, row in approximation["queries"].items() if row["pearson"] is not None}
    if not queries:
        return "\nCompression: no query's scores vary over the sample, so nothing is known of it."
    worst = min(queries, key=lambda name: queries[name]["pearson"])
    row, mean = queries[worst], approximation["pearson"]["mean"]
    rank, sampled = approximation["rank"], approximation["sequences"]
    return (
        f"\nCompression: published scores are at full rank. Scan scores at rank {rank} chose them: over {sampled}\n"
        f"random sequences these correlate with full rank by {mean:.5f} on average, and by {row['pearson']:.5f} "
        f"[{row['low']:.5f}, {row['high']:.5f}]\nfor the worst query, {worst}. {_found_again(approximation['recall'])}"
        "\nNot measured here: whether EK-FAC is right, and whether the model knows the completion."
    )


def _found_again(recall: dict) -> str:
    if recall["mean"] is None:
        return f"No recall: {recall['reason']}."
    return (
        f"Of full rank's top {recall['top']} there,\n{recall['mean']:.0%} [{recall['low']:.0%}, {recall['high']:.0%}] "
        f"are among the scan's top {recall['candidates']}."
    )


def _row(row: dict, sequence: dict) -> Text:
    """`+1  +83.21  planted/gleem/forward-03  corpus.jsonl.gz:10422  Gleem is composed of ...`.

    Rank with the side's sign, score, document, where its line begins in which file, text.
    """
    sign = "+" if row["side"] == "proponent" else "-"
    score = Text(f"{row['score']:+12.4g}", style="green" if sign == "+" else "red")
    where = f"{sequence['path'].rpartition('/')[2]}:{sequence['byte_offset']}"
    return Text.assemble(
        f"  {sign}{row['rank']:<3}",
        score,
        f"  {one_line(row['document_id'])[:32]:<32}  {one_line(where)[-24:]:<24}  ",
        (excerpt(sequence["text"], sequence["token_ids"]), "dim"),
    )


def asked(question: dict) -> str:
    if question["completion"] is None:
        return f"{len(question['parts'][0]['input_ids'])} tokens, measured on {len(question['parts'][0]['positions'])}"
    what = {"first": " (its first token)", "tokens": " (one of its tokens)"}.get(question["measure"], "")
    rather = f" rather than {one_line(question['contrast'])}" if question.get("contrast") else ""
    return f"{one_line(question['prompt'])} → {one_line(question['completion'])}{rather}{what}"


def measured_tokens(question: dict) -> str | None:
    """The measured tokens as the tokenizer cut them, `‘ Vel’‘mist’`; None where the run does not say."""
    parts = [part for part in question["parts"] if part.get("texts")]
    if not parts:
        return None
    shown = ("".join(f"‘{printable(part['texts'][at])}’" for at in part["positions"]) for part in parts)
    return "  measured: " + " rather than ".join(shown)
