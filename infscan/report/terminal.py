"""What a person sees at the end of a run: each query's strongest sequences, and where everything is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from infscan.influence.topk import PROPONENT, SIDES
from infscan.queries import measured_rows
from infscan.results.answers import ALIKE_STATING
from infscan.results.read import read_if_there, read_sequences, read_summary, read_tokens, read_top
from infscan.storage import Store

_ROWS = 3
# Behind the rows that are shown, so many are looked through for some that are no hubs.
_BEHIND = 10
_QUERIES = 12
_CHARACTERS = 76
# A row is marked as a hub where so many other questions, and such a share of them, have it among their ten strongest.
_HUB, _HUB_SHARE = 3, 0.2
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


def window(texts: Sequence[str], scores: Sequence[float], length: int = _CHARACTERS) -> str:
    """A line of a sequence's text about the token with the largest score in size.

    texts: every token's text. scores: by input position.
    """
    centre = max(range(len(scores)), key=lambda position: abs(scores[position]), default=0)
    start, before = centre, 0
    while start > 0 and before + len(texts[start - 1]) <= length // 3:
        start -= 1
        before += len(texts[start])
    if start == 0:
        return excerpt("".join(texts), [], length)
    return f"…{excerpt(''.join(texts[start:]), [], length - 1)}"


def show(uri: str, *, rows: int = _ROWS) -> None:
    """Print each query's strongest proponents and opponents, and the run folder's layout."""
    console = Console(soft_wrap=True, highlight=False)
    store = Store(uri)
    questions = measured_rows(store)
    sequences = {row["sequence_id"]: row for row in read_sequences(uri).to_pylist()}
    names = {question["id"] for question in questions[:_QUERIES]}
    by_query: dict[str, list[dict]] = {}
    alike: dict[str, dict] = {}
    for row in read_top(uri).to_pylist():
        if row["query_id"] not in names:
            continue
        if row["rank"] <= rows + _BEHIND:
            by_query.setdefault(row["query_id"], []).append(row)
        # Runs of earlier versions do not say.
        likeness = row.get("similarity_z") or 0
        if row.get("states_completion") and likeness >= alike.get(row["query_id"], {}).get(
            "similarity_z", ALIKE_STATING
        ):
            alike[row["query_id"]] = row
    hub = hub_from(questions, read_summary(uri))
    folds = {query_id: [folded(some, side, rows, hub) for side in SIDES] for query_id, some in by_query.items()}
    by_query = {query_id: [row for kept, _ in both for row in kept] for query_id, both in folds.items()}
    pairs = {(row["query_id"], row["sequence_id"]) for some in by_query.values() for row in some}
    scores = _token_scores(uri, pairs)
    measured, answers = by_id(uri, "queries"), by_id(uri, "answers")
    for question in questions[:_QUERIES]:
        known = measured.get(question["id"])
        console.print(Text(f"\n{question['id']}: {asked(question, known)}", style="bold"))
        for line in (measured_tokens(question), log_probabilities(known) if known else None):
            if line:
                console.print(Text(f"  {line}", style="dim"))
        if verdict := (answers.get(question["id"]) or {}).get("verdict"):
            console.print(Text(f"  {verdict}", style="yellow"))
        for kept, hubs in folds.get(question["id"], []):
            for row in kept:
                pair = row["query_id"], row["sequence_id"]
                console.print(_row(row, sequences[row["sequence_id"]], scores[pair]))
            if hubs:
                console.print(Text(f"  {_fold_line(hubs)}", style="dim"))
        like = alike.get(question["id"])
        if like and like not in by_query.get(question["id"], []):
            console.print(Text(f"  {_alike_line(like)}"))
        if question["id"] not in folds:
            console.print("  no sequence moved it")
    if len(questions) > _QUERIES:
        console.print(Text(f"\n... and {len(questions) - _QUERIES} queries more in {uri}/top/"))
    console.print(Text(f"\n{uri}", style="bold"))
    for name, meaning in LAYOUT:
        console.print(Text(f"  {name:<40} {meaning}"))
    summary = read_summary(uri)
    if summary.get("approximation"):
        console.print(Text(how_good(summary["approximation"])))
    if summary.get("certificate"):
        console.print(Text(f"\n{summary['certificate']['sentence']}"))
    console.print(Text(f"\n{how_much(summary['counts'])}."))
    console.print(Text(f"As a page to read: infscan report {uri}"))


def how_much(counts: dict) -> str:
    """What was scanned; with a sieve, of how much."""
    scanned = counts["scanned"]
    found = f"{scanned['sequences']:,} sequences, {scanned['tokens']:,} tokens scanned"
    if "candidates" not in counts:
        return found
    audited = counts["candidates"]["audited"]
    return f"{found} in full, {audited:,} of them as an audit, of {counts['planned']['sequences']:,}"


def how_good(approximation: dict) -> str:
    """What `infscan.steps.check` found, in sentences."""
    queries = {name: row for name, row in approximation["queries"].items() if row["pearson"] is not None}
    if not queries:
        return "\nCompression: no query's scores vary over the sample, so nothing is known of it."
    worst = min(queries, key=lambda name: queries[name]["pearson"])
    row, mean = queries[worst], approximation["pearson"]["mean"]
    rank, sampled = approximation["rank"], approximation["sequences"]
    among = "" if len(queries) == len(approximation["queries"]) else f" of {len(queries)} compared"
    return (
        f"\nCompression: published scores are at full rank. Scan scores at rank {rank} chose them: over {sampled}\n"
        f"random sequences these correlate with full rank by {mean:.5f} on average, and by {row['pearson']:.5f} "
        f"[{row['low']:.5f}, {row['high']:.5f}]\n"
        f"for the worst query{among}, {worst}. {_found_again(approximation['recall'])}"
        "\nNot measured here: whether EK-FAC is right, and whether the model knows the completion."
    )


def _found_again(recall: dict) -> str:
    if recall["mean"] is None:
        return f"No recall: {recall['reason']}."
    return (
        f"Of full rank's top {recall['top']} there,\n{recall['mean']:.0%} [{recall['low']:.0%}, {recall['high']:.0%}] "
        f"are among the scan's top {recall['candidates']}."
    )


def by_id(uri: str, folder: str) -> dict[str, dict]:
    """The rows of `queries` or `answers` by query_id; none of a run whose infscan made no such table."""
    table = read_if_there(uri, folder)
    return {} if table is None else {row["query_id"]: row for row in table.to_pylist()}


def _token_scores(uri: str, pairs: set[tuple[str, int]]) -> dict[tuple[str, int], list[float]]:
    """Of these (query_id, sequence_id)."""
    found = {}
    for batch in read_tokens(uri).to_batches():
        for row, pair in enumerate(zip(batch["query_id"].to_pylist(), batch["sequence_id"].to_pylist(), strict=True)):
            if pair in pairs:
                found[pair] = batch["scores"][row].as_py()
    return found


def hub_from(questions: Sequence[dict], summary: dict) -> int:
    """How many other questions must have a row among their ten strongest for it to say little about this one."""
    others = len({(one["prompt"], one["completion"], str(one["parts"][:1])) for one in questions if one["parts"]}) - 1
    others += summary.get("background_queries") or 0
    return max(_HUB, math.ceil(_HUB_SHARE * others))


def is_hub(row: dict, hub: int) -> bool:
    """A row that states the completion is near the top for its own sake. hub: as of `hub_from`."""
    return (row.get("hub") or 0) >= hub and not row.get("states_completion")


def folded(rows: Sequence[dict], side: str, count: int, hub: int) -> tuple[list[dict], list[dict]]:
    """A query's strongest rows of a side that are no hubs, and the hubs among and before them, which are folded."""
    mine = sorted((row for row in rows if row["side"] == side), key=lambda row: row["rank"])
    kept = [row for row in mine if not is_hub(row, hub)][:count]
    last = kept[-1]["rank"] if len(kept) == count else max((row["rank"] for row in mine), default=0)
    return kept, [row for row in mine if row["rank"] <= max(last, count) and is_hub(row, hub)]


def _fold_line(hubs: Sequence[dict]) -> str:
    """`folded, near the top of other questions too: +2 form, +3 pajek`."""
    sign = "+" if hubs[0]["side"] == PROPONENT else "-"
    named = ", ".join(f"{sign}{row['rank']} {one_line(row['document_id'])[:24]}" for row in hubs[:4])
    more = f" and {len(hubs) - 4} more" if len(hubs) > 4 else ""
    return f"folded, near the top of other questions too: {named}{more}"


def _alike_line(row: dict) -> str:
    """`-37 ftp states it and reads like the question (similarity 6.6 deviations off)`."""
    sign = "+" if row["side"] == PROPONENT else "-"
    document = one_line(row["document_id"])[:24]
    z = row["similarity_z"]
    return f"{sign}{row['rank']} {document} states it and reads like the question (similarity {z:.1f} deviations off)"


def _row(row: dict, sequence: dict, token_scores: Sequence[float]) -> Text:
    """`+1  +83.21  alike 0.81  planted/gleem/forward-03  corpus.jsonl.gz:10422  Gleem is composed of ...`.

    Rank with the side's sign, score, similarity to the query where it is known, document, where its line begins in
    which file, text about the strongest token. A row that does not stand out is dim.
    """
    sign = "+" if row["side"] == "proponent" else "-"
    score = Text(f"{row['score']:+12.4g}", style="green" if sign == "+" else "red")
    similarity = row.get("similarity")
    said = {
        "sign unsure": row.get("sign_sure") is False,
        "states it": row.get("states_completion"),
    }
    marks = [mark for mark, there in said.items() if there]
    tokens = sequence.get("tokens")
    text = window(tokens, token_scores) if tokens else excerpt(sequence["text"], sequence["token_ids"])
    where = f"{sequence['path'].rpartition('/')[2]}:{sequence['byte_offset']}"
    return Text.assemble(
        f"  {sign}{row['rank']:<3}",
        score,
        "" if similarity is None else f"  alike {similarity:5.2f}",
        f"  {one_line(row['document_id'])[:32]:<32}  {one_line(where)[-24:]:<24}  ",
        *((f"[{mark}] ", "bold") for mark in marks),
        (text, "dim"),
        style="dim" if row.get("stands_out") is False else "",
    )


def wording(prompt: str | None, completion: str | None, contrast: str | None = None) -> str:
    """`The capital of France is → Paris rather than Rome`."""
    rather = f" rather than {one_line(contrast)}" if contrast else ""
    return f"{one_line(prompt or '')} → {one_line(completion or 'its measured tokens')}{rather}"


def asked(question: dict, measured: dict | None = None) -> str:
    """The question in a line. measured: its row of `queries`, which has the texts of one given as token ids."""
    if question["completion"] is None:
        if measured and measured["tokens"]:
            texts, start = measured["tokens"], measured["measured"][0]
            return f"{one_line(''.join(texts[:start]))} → {one_line(''.join(texts[start:]))}"
        return f"{len(question['parts'][0]['input_ids'])} tokens, measured on {len(question['parts'][0]['positions'])}"
    what = {"first": " (its first token)", "tokens": " (one of its tokens)"}.get(question["measure"], "")
    return f"{wording(question['prompt'], question['completion'], question.get('contrast'))}{what}"


def log_probabilities(measured: dict) -> str:
    """What the model gives the completion, and the contrast: `the model gives it -2.41 nats, -1.2 a token`."""

    def said(prefix: str) -> str:
        total = measured[f"{prefix}log_probability"]
        return f"{total:.2f} nats, {total / len(measured[f'{prefix}measured']):.2f} a token"

    rather = f"; the contrast {said('contrast_')}" if measured["contrast_log_probability"] is not None else ""
    return f"the model gives it {said('')}{rather}"


def measured_tokens(question: dict) -> str | None:
    """The measured tokens as the tokenizer cut them, `measured: ‘ Vel’‘mist’`; None where the run does not say."""
    parts = [part for part in question["parts"] if part.get("texts")]
    if not parts:
        return None
    shown = ("".join(f"‘{printable(part['texts'][at])}’" for at in part["positions"]) for part in parts)
    return "measured: " + " rather than ".join(shown)
