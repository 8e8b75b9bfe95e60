"""Word order (G23, section 5.3.4): does a sequence count that states the fact, but its completion before its prompt?

For each fact, the mean score of its flipped, relation-removed and completion-removed documents is put in proportion to
that of its forward ones. Measured on the completion's first token, the flipped ones should fall to about zero.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from infscan.corpus.addressable import open_corpus
from infscan.corpus.tfidf import document_frequencies, top_matches
from infscan.errors import RunError
from infscan.results.dense import score_column
from infscan.results.read import read_scores
from infscan.storage import Store
from infscan.studies.facts import Partition

METHODS = ("EK-FAC", "dot product", "TF-IDF")


@dataclass(frozen=True)
class WordOrder:
    """What became of one fact's documents under one method and measurement.

    forward_on_top: how many of the forward documents are among the strongest `forward` sequences of the whole corpus.
    ratios: by partition, mean score over the forward documents' mean (forward itself: 1).
    """

    fact: str
    measure: str
    method: str
    forward: int
    forward_on_top: int
    ratios: Mapping[Partition, float]


def compare(
    fact: str, measure: str, method: str, scores: Mapping[str, float], partitions: Mapping[str, Partition]
) -> WordOrder:
    """scores: of every document of the corpus, by id. partitions: of this fact's planted documents, by id."""
    by_partition: dict[Partition, list[float]] = defaultdict(list)
    for document, partition in partitions.items():
        by_partition[partition].append(scores[document])
    forward = len(by_partition[Partition.FORWARD])
    strongest = sorted(scores, key=lambda document: (-scores[document], document))[:forward]
    on_top = sum(partitions.get(document) is Partition.FORWARD for document in strongest)
    level = float(np.mean(by_partition[Partition.FORWARD]))
    ratios = {partition: float(np.mean(values)) / level for partition, values in by_partition.items()}
    return WordOrder(fact, measure, method, forward, on_top, ratios)


def planted_partitions(path: str) -> dict[str, dict[str, Partition]]:
    """fact -> document id -> partition, from the record of planted documents (JSONL)."""
    folder, _, name = path.rpartition("/")
    facts: dict[str, dict[str, Partition]] = defaultdict(dict)
    for line in Store(folder).read(name).splitlines():
        row = json.loads(line)
        facts[row["fact"]][row["id"]] = Partition(row["partition"])
    return dict(facts)


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
    """query_id -> document id -> TF-IDF score (METHOD: TF-IDF filter) over a run's corpus, prompt plus completion."""
    store = Store(uri)
    corpus = open_corpus(store / "corpus")
    sequences = corpus.read(np.arange(corpus.sequences))
    idf = document_frequencies((sequence.token_ids for sequence in sequences), corpus.vocab_size).idf()
    rows = [json.loads(line) for line in store.read("queries/queries.jsonl").splitlines()]
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


def word_order(run: str, dot_product: str, planted: str) -> list[WordOrder]:
    """Every fact on its whole completion (query `<fact>`) and its first token (`<fact>-first`), by three methods."""
    facts = planted_partitions(planted)
    methods = dict(zip(METHODS, (run_scores(run), run_scores(dot_product), tfidf_scores(run)), strict=True))
    found = []
    for fact, partitions in sorted(facts.items()):
        for measure, query in (("completion", fact), ("first token", f"{fact}-first")):
            for method, scores in methods.items():
                # TF-IDF knows no measurement: prompt plus completion are its words.
                if method != "TF-IDF" or measure == "completion":
                    found.append(compare(fact, measure, method, scores[query], partitions))
    return found


def to_table(found: list[WordOrder]) -> pa.Table:
    """One row per fact, measurement, method and partition."""
    rows = [
        {
            "fact": row.fact,
            "measure": row.measure,
            "method": row.method,
            "forward_on_top": row.forward_on_top,
            "partition": partition.value,
            "ratio": ratio,
        }
        for row in found
        for partition, ratio in row.ratios.items()
    ]
    return pa.Table.from_pylist(rows)
