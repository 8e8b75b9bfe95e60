"""Word order (docs/method.md#studies): does a text count that states the fact, but its completion before its prompt?

For each fact, the mean score of each partition's texts is put in proportion to that of the texts that state the fact
forward. Grosse et al. (2023) find those influential, reworded or not; flipped ones fall to about the level of flipped
ones without the relation. The texts are either planted documents of the corpus that was scanned, with baselines beside
EK-FAC (study.planted), or texts that `infscan facts` made and `infscan explain` scored without training on them
(study.texts).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infscan.corpus.addressable import open_corpus
from infscan.corpus.tfidf import document_frequencies, top_matches
from infscan.errors import ConfigError, RunError
from infscan.influence.agreement import INTERVAL
from infscan.queries import measured_rows
from infscan.results.dense import score_column
from infscan.results.read import read_scores
from infscan.results.schema import read_parquet
from infscan.storage import Store, open_input
from infscan.storage.foreign import parse_json
from infscan_studies.config import WordOrderConfig
from infscan_studies.demo.facts import Partition
from infscan_studies.partitions import Order

Row = dict[str, Any]
# query id -> id of a text or document -> score
Scores = Mapping[str, Mapping[str, float]]

EKFAC, DOT, TFIDF = "EK-FAC", "dot product", "TF-IDF"
METHODS = (EKFAC, DOT, TFIDF)
# A measurement, and how the id of its query goes on after the fact's.
MEASURES = {"completion": "", "first token": "-first"}
# The partition that the others are put in proportion to: of planted documents, of texts.
_FORWARD = (Partition.FORWARD.value, Order.REWORDED.value)
ALL = "*"  # the row over all facts
# Of the ratios: what a flipped text's relation adds to its names.
DIFFERENCE = "flipped - relation-removed"

SCHEMA = pa.schema(
    [
        ("fact", pa.string()),
        ("measure", pa.string()),
        ("method", pa.string()),
        ("partition", pa.string()),
        ("texts", pa.int64()),
        ("score", pa.float64()),
        # score over the fact's forward texts' score; low, high: of the average over facts (fact `*`), 95 %.
        ("ratio", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        # Of planted documents: how many of the forward ones are among as many strongest sequences of the whole corpus.
        ("forward_on_top", pa.int64()),
    ]
)


def study(run: str, config: WordOrderConfig, seed: int) -> pa.Table:
    """The study of a run's planted documents, or of texts (study.texts) that were explained for it and study.runs.

    Raises:
        RunError: where a text has no score for its fact's queries.
    """
    texts = _read_rows(config.texts or config.planted)
    if config.texts is None:
        return planted(run, config.dot_product, texts, config.resamples, seed)
    folders = [config.explained or f"{run}/explain/facts", *(f"{other}/explain/facts" for other in config.runs)]
    table = partitioned([_explained(folder) for folder in folders], texts, config.resamples, seed)
    return table.replace_schema_metadata({"models": str(len(folders))})


def planted(run: str, dot_product: str | None, documents: Sequence[Row], resamples: int, seed: int) -> pa.Table:
    """EK-FAC's scores of planted documents (rows of `id`, `fact`, `partition`) beside the dot product's and TF-IDF's.

    run, dot_product: finished runs with scan.scores=all and one document per sequence.
    """
    methods = {EKFAC: run_scores(run)}
    if dot_product:
        methods[DOT] = run_scores(dot_product)
    methods[TFIDF] = tfidf_scores(run)
    tables = []
    for method, scores in methods.items():
        # TF-IDF knows no measurement: prompt plus completion are its words.
        measures = ("completion",) if method == TFIDF else tuple(MEASURES)
        table = partitioned([scores], documents, resamples, seed, method=method, measures=measures)
        on_top = forward_on_top(scores, documents, measures)
        counts = [on_top[row["measure"], row["fact"]] for row in table.select(["measure", "fact"]).to_pylist()]
        column = table.schema.get_field_index("forward_on_top")
        tables.append(table.set_column(column, "forward_on_top", pa.array(counts, pa.int64())))
    return pa.concat_tables(tables)


def partitioned(
    models: Sequence[Scores],
    texts: Sequence[Mapping[str, Any]],
    resamples: int,
    seed: int,
    *,
    method: str = EKFAC,
    measures: Collection[str] = tuple(MEASURES),
) -> pa.Table:
    """Rows by fact, measurement and partition, and the average of the facts' ratios (fact `*`) with its interval, over
    facts and models drawn anew.

    models: of each, the scores for queries `<fact>` (the whole completion) and `<fact>-first`. texts: rows of `id`,
    `fact` and `partition`. A fact's ratio is taken for each model and averaged over them.

    Raises:
        RunError: where a text was not scored against its fact.
        ConfigError: where no text states a fact forward.
    """
    by_fact = [_by_fact(scores, texts, measures) for scores in models]
    rows: list[Row] = []
    facts = list(dict.fromkeys(text["fact"] for text in texts))
    partitions = list(dict.fromkeys(text["partition"] for text in texts))
    forward = next((name for name in _FORWARD if name in partitions), None)
    if forward is None:
        raise ConfigError(f"none of {len(texts)} texts is {' or '.join(_FORWARD)}; add some that state the facts.")
    rng = np.random.default_rng(seed)
    facts_rf, models_rm = (rng.integers(0, n, (resamples, n)) for n in (len(facts), len(models)))

    def average(ratios_mf: NDArray[np.float64]) -> Row:
        drawn_r = ratios_mf[models_rm[:, :, None], facts_rf[:, None, :]].mean(axis=(1, 2))
        low, high = np.percentile(drawn_r, INTERVAL)
        return {"fact": ALL, "ratio": float(ratios_mf.mean()), "low": float(low), "high": float(high)}

    for measure in measures:

        def means(partition: str, measure: str = measure) -> NDArray[np.float64]:
            return np.asarray([[np.mean(mine[measure, partition, fact]) for fact in facts] for mine in by_fact])

        levels_mf = means(forward)
        ratios = {partition: means(partition) / levels_mf for partition in partitions}
        for partition in partitions:
            scores_f, ratios_f = means(partition).mean(axis=0), ratios[partition].mean(axis=0)
            known = {"measure": measure, "method": method, "partition": partition}
            counts = [len(by_fact[0][measure, partition, fact]) for fact in facts]
            rows += [
                known | {"fact": fact, "texts": count, "score": float(score), "ratio": float(ratio)}
                for fact, count, score, ratio in zip(facts, counts, scores_f, ratios_f, strict=True)
            ]
            rows.append(known | {"texts": sum(counts), "score": float(scores_f.mean())} | average(ratios[partition]))
        if {Order.FLIPPED, Order.RELATION_REMOVED} <= set(partitions):
            difference = average(ratios[Order.FLIPPED] - ratios[Order.RELATION_REMOVED])
            rows.append({"measure": measure, "method": method, "partition": DIFFERENCE} | difference)
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _by_fact(
    scores: Scores, texts: Sequence[Mapping[str, Any]], measures: Collection[str]
) -> dict[tuple[str, str, str], list[float]]:
    """(measurement, partition, fact) -> the scores of its texts."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for text in texts:
        for measure in measures:
            query = f"{text['fact']}{MEASURES[measure]}"
            if text["id"] not in scores.get(query, {}):
                raise RunError(
                    f"text {text['id']!r} has no score for query {query!r}: scan the facts' queries over a corpus that "
                    "has their planted documents (study.planted), or explain texts of these facts (study.texts)."
                )
            found[measure, text["partition"], text["fact"]].append(scores[query][text["id"]])
    return found


def forward_on_top(
    scores: Scores, documents: Sequence[Mapping[str, Any]], measures: Collection[str]
) -> dict[tuple[str, str], int]:
    """(measurement, fact) -> how many of its F forward documents are among the F strongest of the whole corpus."""
    forward: dict[str, set[str]] = defaultdict(set)
    for row in documents:
        if row["partition"] == Partition.FORWARD:
            forward[row["fact"]].add(row["id"])
    found: dict[tuple[str, str], int] = {}
    for measure in measures:
        for fact, wanted in forward.items():
            mine = scores[f"{fact}{MEASURES[measure]}"]
            strongest = sorted(mine, key=lambda document: (-mine[document], document))[: len(wanted)]
            found[measure, fact] = len(wanted & set(strongest))
        found[measure, ALL] = sum(found[measure, fact] for fact in forward)
    return found


def _read_rows(path: str) -> list[Row]:
    with open_input(path) as stream:
        return [parse_json(line) for line in stream.read().split(b"\n") if line.strip()]


def planted_partitions(path: str) -> dict[str, dict[str, Partition]]:
    """fact -> document id -> partition, from the record of planted documents (JSONL)."""
    facts: dict[str, dict[str, Partition]] = defaultdict(dict)
    for row in _read_rows(path):
        facts[row["fact"]][row["id"]] = Partition(row["partition"])
    return dict(facts)


def _explained(folder: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in read_parquet(Store(folder), "rows.parquet", ["query_id", "item", "score"]).to_pylist():
        found[row["query_id"]][row["item"]] = row["score"]
    return found


def run_scores(uri: str) -> dict[str, dict[str, float]]:
    """query_id -> document id -> scan score, of a run with scan.scores=all and one document per sequence."""
    table = read_scores(uri)
    documents = table["document_id"].to_pylist()
    if len(set(documents)) != len(documents):
        raise RunError(f"{uri}: documents span several sequences; scan the corpus with corpus.packing=document.")
    return {
        name.removeprefix(score_column("")): dict(zip(documents, table[name].to_pylist(), strict=True))
        for name in table.column_names
        if name.startswith(score_column(""))
    }


def tfidf_scores(uri: str) -> dict[str, dict[str, float]]:
    """query_id -> document id -> TF-IDF score (docs/method.md#tf-idf) over a run's corpus, prompt plus completion."""
    store = Store(uri)
    corpus = open_corpus(store / "corpus", foreign=True)
    sequences = corpus.read(np.arange(corpus.sequences))
    idf = document_frequencies((sequence.token_ids for sequence in sequences), corpus.vocab_size).idf()
    rows = measured_rows(store)
    queries = [np.asarray(row["parts"][0]["input_ids"], np.int64) for row in rows]
    numbered = ((sequence.sequence_id, sequence.token_ids) for sequence in sequences)
    matches = top_matches(numbered, queries, idf, len(sequences))
    documents = {sequence.sequence_id: sequence.document_id for sequence in sequences}
    return {
        row["id"]: {
            documents[int(sequence_id)]: float(score)
            for sequence_id, score in zip(found.sequence_ids, found.scores, strict=True)
        }
        for row, found in zip(rows, matches, strict=True)
    }


def words(table: pa.Table) -> list[str]:
    """What was found of explained texts, and what that cannot say; planted documents are shown as a table instead."""
    rows = table.to_pylist()
    if any(row["partition"] == Partition.FORWARD for row in rows):
        return []
    facts = len({row["fact"] for row in rows} - {ALL})
    models = int((table.schema.metadata or {}).get(b"models", b"1"))
    over = f"{facts} facts" if models == 1 else f"{facts} facts and {models} models"
    said = [f"{over}; mean scores in proportion to the reworded texts' (mean [95 %]):"]
    for measure in MEASURES:
        mine = {row["partition"]: row for row in rows if (row["fact"], row["measure"]) == (ALL, measure)}
        parts = [
            f"{order} {mine[order]['ratio']:+.2f} [{mine[order]['low']:+.2f}, {mine[order]['high']:+.2f}]"
            for order in Order
            if order is not Order.REWORDED
        ]
        less = mine[DIFFERENCE]
        parts.append(f"flipped less relation-removed {less['ratio']:+.2f} [{less['low']:+.2f}, {less['high']:+.2f}]")
        said.append(f"  on the {measure if measure == 'first token' else 'whole completion'}: {', '.join(parts)}")
    return [
        *said,
        "It cannot say: what training on these texts would do, beyond the first order; anything of facts that the "
        "model has not learnt (their reworded score is then no yardstick)"
        + ("; and intervals are over facts, not over models." if models == 1 else "."),
    ]
