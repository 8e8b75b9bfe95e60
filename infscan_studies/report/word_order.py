"""The word-order study of planted documents on a terminal: one question in full, then a line per fact and method."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infscan.config import from_yaml
from infscan.corpus.addressable import open_corpus
from infscan.corpus.tokenizer import load_tokenizer
from infscan.errors import ConfigError
from infscan.model.folder import model_folder
from infscan.queries import measured_rows
from infscan.report.terminal import excerpt, one_line, wording
from infscan.storage import Store
from infscan_studies.config import WordOrderConfig
from infscan_studies.demo.facts import Partition
from infscan_studies.word_order import ALL, METHODS, planted_partitions, run_scores

_WORDS = {
    Partition.FORWARD: "states it",
    Partition.FLIPPED: "states it backwards",
    Partition.COMPLETION_REMOVED: "has the prompt without the completion",
    Partition.RELATION_REMOVED: "names both without the relation",
}


def show_planted(run: str, config: WordOrderConfig, table: pa.Table) -> None:
    """One question with the documents that taught it, and the table of the study.

    Raises:
        ConfigError: where the run has no such query.
    """
    store = Store(run)
    planted = planted_partitions(config.planted)
    question = config.question or f"{min(planted)}-first"
    queries = {row["id"]: row for row in measured_rows(store)}
    if question not in queries or question.removesuffix("-first") not in planted:
        raise ConfigError(f"study.question={question}: {run} has no such query about a planted fact.")
    query = queries[question]
    show_question(
        f"{wording(query['prompt'], query['completion'], query.get('contrast'))}   (measured on: {query['measure']})",
        run_scores(run)[question],
        _texts(store),
        planted[question.removesuffix("-first")],
    )
    print("\nWord order: the mean score of other documents of a fact, in proportion to its forward ones\n")
    show_table(table)


def _texts(store: Store) -> dict[str, str]:
    corpus = open_corpus(store / "corpus", foreign=True)
    settings = from_yaml(store.read("config.yaml").decode())
    tokenizer = load_tokenizer(str(model_folder(settings["model"]["path"], revision=settings["model"].get("revision"))))
    sequences = corpus.read(np.arange(corpus.sequences))
    decode = tokenizer.decode if tokenizer else str
    return {sequence.document_id: decode(sequence.token_ids) for sequence in sequences}


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


def show_table(table: pa.Table) -> None:
    """Mean score of each partition over the forward documents' mean, by measurement, method and fact."""
    console = Console(soft_wrap=True, highlight=False, width=120)
    shown = Table(box=None, padding=(0, 1), header_style="dim")
    others = [partition for partition in Partition if partition is not Partition.FORWARD]
    for name in ("measured on", "method", "fact", "forward on top"):
        shown.add_column(name)
    for partition in others:
        shown.add_column(f"{partition.value} / forward", justify="right")
    cells = {(row["measure"], row["method"], row["fact"], row["partition"]): row for row in table.to_pylist()}
    keys = sorted({key[:2] for key in cells}, key=lambda key: (key[0], METHODS.index(key[1])))
    for key in keys:
        # The average over facts last.
        facts = sorted({fact for *mine, fact, _ in cells if tuple(mine) == key}, key=lambda fact: (fact == ALL, fact))
        for fact in facts:
            forward = cells[*key, fact, Partition.FORWARD]
            ratios = [f"{cells[*key, fact, partition]['ratio']:+.3f}" for partition in others]
            on_top = f"{forward['forward_on_top']}/{forward['texts']}"
            is_all = fact == ALL
            name = "all" if is_all else fact
            shown.add_row(*key, name, on_top, *ratios, style="bold" if is_all else "", end_section=is_all)
    console.print(shown)
