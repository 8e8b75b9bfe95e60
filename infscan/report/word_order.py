"""The word-order study on a terminal: one question in full, then every fact in one line per method."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infscan.report.terminal import excerpt, one_line
from infscan.studies.facts import Partition
from infscan.studies.word_order import METHODS, WordOrder

_WORDS = {
    Partition.FORWARD: "states it",
    Partition.FLIPPED: "states it backwards",
    Partition.COMPLETION_REMOVED: "has the prompt without the completion",
    Partition.RELATION_REMOVED: "names both without the relation",
}


def show_question(
    question: str, scores: Mapping[str, float], texts: Mapping[str, str], partitions: Mapping[str, Partition]
) -> None:
    """The ten sequences that taught the answer most, and where the ones that state it backwards stand.

    scores, texts: by document id, over the whole corpus.
    """
    console = Console(soft_wrap=True, highlight=False)
    ranked = sorted(scores, key=lambda document: (-scores[document], document))
    console.print(Text(f"\n{one_line(question)}", style="bold"))
    console.print("\n  The ten sequences that taught it:")
    for rank, document in enumerate(ranked[:10], start=1):
        console.print(_line(rank, scores[document], document, texts[document], partitions))
    backwards = [document for document, partition in partitions.items() if partition is Partition.FLIPPED]
    console.print(f"\n  The {len(backwards)} that state it backwards (rank among {len(ranked):,}):")
    for document in sorted(backwards, key=lambda document: -scores[document]):
        console.print(_line(ranked.index(document) + 1, scores[document], document, texts[document], partitions))


def _line(rank: int, score: float, document: str, text: str, partitions: Mapping[str, Partition]) -> Text:
    what = _WORDS[partitions[document]] if document in partitions else "another text"
    return Text.assemble(
        f"  {rank:>5}",
        (f"{score:+12.4g}", "green" if score > 0 else "red"),
        f"  {one_line(document)[:34]:<34}  {what:<20}  ",
        (excerpt(text, [], 90), "dim"),
    )


def show_table(found: list[WordOrder]) -> None:
    """Mean score of each partition over the forward documents' mean, by measurement, method and fact."""
    console = Console(soft_wrap=True, highlight=False, width=120)
    table = Table(box=None, padding=(0, 1), header_style="dim")
    others = [partition for partition in Partition if partition is not Partition.FORWARD]
    for name in ("measured on", "method", "fact", "forward on top"):
        table.add_column(name)
    for partition in others:
        table.add_column(f"{partition.value} / forward", justify="right")
    ordered = sorted(found, key=lambda row: (row.measure, METHODS.index(row.method), row.fact))
    for key in dict.fromkeys((row.measure, row.method) for row in ordered):
        rows = [row for row in ordered if (row.measure, row.method) == key]
        for row in rows:
            ratios = [f"{row.ratios[partition]:+.3f}" for partition in others]
            table.add_row(*key, row.fact, f"{row.forward_on_top}/{row.forward}", *ratios)
        means = [f"{np.mean([row.ratios[partition] for row in rows]):+.3f}" for partition in others]
        on_top = f"{sum(row.forward_on_top for row in rows)}/{sum(row.forward for row in rows)}"
        table.add_row(*key, "all", on_top, *means, style="bold", end_section=True)
    console.print(table)
