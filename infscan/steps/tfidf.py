"""The TF-IDF filter over an addressable corpus: one pass for document frequencies, one for scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from infscan.config import fingerprint
from infscan.config.jobs import TfidfConfig
from infscan.corpus.addressable import AddressableCorpus, open_corpus
from infscan.corpus.filtered import describe_filtered
from infscan.corpus.plan import Selection
from infscan.corpus.sequences import TokenBlock
from infscan.corpus.tfidf import DocumentFrequencies, Matches, TopMatches, block_frequencies, block_of, merge, words
from infscan.engine.executor import TaskMap
from infscan.results.schema import read_parquet, to_parquet
from infscan.steps.run import Run
from infscan.storage import Store

CANDIDATES = "candidates.parquet"
_FOLDER = "tfidf"
_SLICES = 4096
_SMALLEST_SLICE = 16384
_READ_AT_ONCE = 1024
# Raised where slices of an earlier infscan hold other scores.
_EDITION = 2


@dataclass(frozen=True)
class Slice:
    """One task: the sequences [start, stop), or those of a sample at positions [start, stop)."""

    corpus: Store
    output: Store
    name: str
    start: int
    stop: int
    sample: Selection | None = None


def tfidf_filter(run: Run, corpus: AddressableCorpus, settings: TfidfConfig) -> pa.Table:
    """Write candidates.parquet and the filtered corpus into the output; returns the candidates.

    The rows are the same for any number of workers, size of slices and interruptions: scores are exact sums, the order
    is total, and a task drops only rows that are strictly worse than k rows which are in storage.
    """
    queries = [words([np.asarray(part.token_ids, np.int64) for part in query.parts]) for query in run.queries]
    sample = None
    if settings.idf_sequences is not None and settings.idf_sequences < corpus.sequences:
        sample = Selection.of(corpus.sequences, settings.idf_sequences, run.config.seed)
    key = [
        _EDITION,
        corpus.fingerprint,
        run.inputs.fingerprints(),
        settings.top_k,
        settings.slice_sequences,
        sample and sample.digest(),
    ]
    folder = f"{_FOLDER}/{fingerprint(key)[:16]}"
    size = settings.slice_sequences or max(_SMALLEST_SLICE, -(-corpus.sequences // _SLICES))
    frequencies = _frequencies(run, corpus, folder, size, sample)
    matches = _matches(run, corpus, folder, size, queries, frequencies.idf(), settings.top_k)
    table = pa.table(
        {
            "query_id": pa.array(
                [id for id, rows in zip(run.inputs.query_ids, matches, strict=True) for _ in range(len(rows))]
            ),
            "rank": pa.array(np.concatenate([np.arange(1, len(rows) + 1) for rows in matches]), pa.int32()),
            "sequence_id": np.concatenate([rows.sequence_ids for rows in matches]),
            "score": np.concatenate([rows.scores for rows in matches]),
        }
    )
    facts = {
        "corpus": corpus.fingerprint,
        "queries": run.inputs.fingerprints()["queries"],
        "sequences": corpus.sequences,
        "idf_sequences": frequencies.sequences,
        "top_k": settings.top_k,
    }
    run.store.write(CANDIDATES, to_parquet(table, facts))
    describe_filtered(run.store, corpus, np.unique(table["sequence_id"].to_numpy()))
    for entry in run.store.list(_FOLDER):
        run.store.remove(entry.name)
    return table


def _slices(
    run: Run, corpus: AddressableCorpus, folder: str, total: int, size: int, sample: Selection | None = None
) -> list[Slice]:
    return [
        Slice(corpus.store, run.store, f"{folder}-{n:06d}.parquet", start, min(start + size, total), sample)
        for n, start in enumerate(range(0, total, size))
    ]


def _frequencies(
    run: Run, corpus: AddressableCorpus, folder: str, size: int, sample: Selection | None
) -> DocumentFrequencies:
    total = corpus.sequences if sample is None else sample.size
    slices = _slices(run, corpus, f"{folder}/frequencies", total, size, sample)
    counts = np.zeros(corpus.vocab_size, np.int64)

    def on_done(done: Slice) -> None:
        counts[:] += read_parquet(run.store, done.name)["sequences"].to_numpy()

    _on_slices(run, "frequencies", slices, frequencies_task, lambda: (), on_done)
    return DocumentFrequencies(total, counts)


def _matches(
    run: Run,
    corpus: AddressableCorpus,
    folder: str,
    size: int,
    queries: Sequence[np.ndarray],
    idf: np.ndarray,
    k: int,
) -> list[Matches]:
    found = [Matches(np.empty(0, np.int64), np.empty(0, np.float64)) for _ in queries]
    shared = run.executor.share((queries, idf, k))

    def known() -> tuple[Any, ...]:
        last = [(float(rows.scores[-1]), int(rows.sequence_ids[-1])) if len(rows) == k else None for rows in found]
        return shared, last

    def on_done(done: Slice) -> None:
        table = read_parquet(run.store, done.name)
        query, ids, scores = (table[name].to_numpy() for name in ("query", "sequence_id", "score"))
        bounds = np.searchsorted(query, np.arange(len(queries) + 1))
        for q, (low, high) in enumerate(pairwise(bounds.tolist())):
            if high > low:
                found[q] = merge([found[q], Matches(ids[low:high], scores[low:high])], k)

    _on_slices(
        run, "scores", _slices(run, corpus, f"{folder}/scores", corpus.sequences, size), scores_task, known, on_done
    )
    return found


def _on_slices(
    run: Run,
    name: str,
    slices: Sequence[Slice],
    function: Callable[..., None],
    arguments: Callable[[], tuple[Any, ...]],
    on_done: Callable[[Slice], None],
) -> None:
    """function(slice, *arguments()) for every slice whose file is not there; on_done for every slice."""
    there = {entry.name for entry in run.store.list(_FOLDER)}
    tasks = TaskMap(
        name=name,
        unit_name="slices",
        items=slices,
        function=function,
        arguments=lambda each: (each, *arguments()),
        is_done=lambda each: each.name in there,
        progress=lambda each, _: (each.stop - each.start, 0),
    )
    run.executor.map_tasks(tasks, lambda each, _: on_done(each))


def frequencies_task(task: Slice) -> None:
    """How many of the slice's sequences hold each token id."""
    corpus = open_corpus(task.corpus)
    found = DocumentFrequencies(0, np.zeros(corpus.vocab_size, np.int64))
    for _, block in _blocks(corpus, task):
        found += block_frequencies(block, corpus.vocab_size)
    corpus.close()
    task.output.write(task.name, to_parquet(pa.table({"sequences": found.counts}), {}))


def scores_task(
    task: Slice, shared: tuple[Sequence[np.ndarray], np.ndarray, int], known: list[tuple[float, int] | None]
) -> None:
    """The slice's best k rows of every query, without those that `known` beats."""
    queries, idf, k = shared
    corpus = open_corpus(task.corpus)
    best = TopMatches(queries, idf, k, known)
    for ids, block in _blocks(corpus, task):
        best.add(ids, block)
    corpus.close()
    rows = best.result()
    table = pa.table(
        {
            "query": np.repeat(np.arange(len(rows), dtype=np.int32), [len(each) for each in rows]),
            "sequence_id": np.concatenate([each.sequence_ids for each in rows]),
            "score": np.concatenate([each.scores for each in rows]),
        }
    )
    task.output.write(task.name, to_parquet(table, {}))


def _blocks(corpus: AddressableCorpus, task: Slice) -> Iterator[tuple[np.ndarray, TokenBlock]]:
    if task.sample is not None:
        ids = task.sample.ids(task.start, task.stop)
        for at in range(0, len(ids), _READ_AT_ONCE):
            some = ids[at : at + _READ_AT_ONCE]
            yield some, block_of([sequence.token_ids for sequence in corpus.read(some)])
        return
    at = task.start
    for block in corpus.token_blocks(task.start, task.stop):
        yield np.arange(at, at + len(block), dtype=np.int64), block
        at += len(block)
