"""Answer questions from an index: it finds candidates, which alone get the full pass of a scan (docs/index-ask.md).

What follows the search is what follows a sieve (`infscan.steps.candidates`): candidates and an audit are scanned in
full. An answer is a run like any other, exact in what it publishes, with a certificate of what it missed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from infscan.config import (
    Backend,
    Config,
    FactorsConfig,
    QueriesConfig,
    Scores,
    Solver,
    absolute,
    check,
    fingerprint,
    stored_config,
)
from infscan.config.jobs import AskJob, IndexConfig, IndexJob
from infscan.corpus.addressable import AddressableCorpus, open_corpus
from infscan.corpus.filtered import FilteredCorpus, describe_filtered
from infscan.corpus.joined import JoinedCorpus
from infscan.corpus.plan import Plan
from infscan.engine.executor import Step, TaskMap
from infscan.errors import ConfigError, DamagedError, RunError
from infscan.influence.codes import CodeSettings
from infscan.influence.layers import Layer
from infscan.influence.packed import QueryCodes
from infscan.influence.precision import multiplying
from infscan.influence.topk import SIDES
from infscan.influence.topk_tracker import ScoredRows, TopKTracker
from infscan.model.worker import ModelWorker
from infscan.queries import Query
from infscan.results.index_file import IndexManifest, read_columns, read_manifest
from infscan.results.schema import read_parquet, read_with_footer, to_parquet
from infscan.steps.factor_files import COMPLETE
from infscan.steps.factors import Factors
from infscan.steps.finished import read_what_was_prepared
from infscan.steps.index import code_settings, index_fields, indexed_layers, layer_codes
from infscan.steps.preconditioner import Preconditioner, core, layer_factors, query_groups, sources
from infscan.steps.run import Run
from infscan.steps.run_folder import CONFIG, PLAN
from infscan.steps.search import Search, cores, file_groups, search_files
from infscan.storage import Store

log = logging.getLogger("infscan")

# What the index found, in the answer's folder; and the corpus of what several indexes have, where not all of it is.
CANDIDATES, INDEXED = "candidates.parquet", "indexed"
# Items of work that a search is cut into, at most, on a cluster.
_GROUPS = 256


@dataclass(frozen=True)
class OpenIndex:
    """A finished index: where it is, what it is of, and the settings that made it."""

    store: Store
    manifest: IndexManifest
    made_with: IndexJob

    @property
    def settings(self) -> IndexConfig:
        return self.made_with.index


Indexes = Sequence[OpenIndex]


def read_index(uri: str) -> OpenIndex:
    """A finished index by its folder; none of its codes is read.

    Raises:
        RunError: where it is not finished, or its config.yaml is damaged.
        DamagedError: where a file is missing, cut off or changed, as far as names and sizes say.
    """
    store = Store(absolute(uri))
    manifest = read_manifest(store)
    try:
        made_with = stored_config(store.read(CONFIG).decode(errors="replace"), store.uri, IndexJob)
    except ConfigError as error:
        raise RunError(f"{store.uri}/{CONFIG} is damaged ({error}); restore it.") from None
    read_what_was_prepared(made_with)
    return OpenIndex(store, manifest, made_with)


def read_indexes(uris: Sequence[str]) -> list[OpenIndex]:
    """Several indexes that are asked as one, in the order in which their corpora are numbered through.

    Raises:
        RunError: as `read_index`, and where one is of another model, of other factors or codes than the first.
    """
    found = [read_index(uri) for uri in dict.fromkeys(uris)]
    for other in found[1:]:
        differing = [
            name
            for name, value in found[0].manifest.fields.items()
            if name not in _OF_CORPUS and other.manifest.fields.get(name) != value
        ]
        if differing:
            raise RunError(
                f"{other.store.uri} is an index of another {', '.join(sorted(differing))} than {found[0].store.uri}: "
                "their scores do not compare. Make it with the model, the index.* settings and factors.path= of the "
                "other."
            )
    return found


# What indexes that are asked as one may have of their own.
_OF_CORPUS = ("corpus", "tokenizer")


def ask_config(found: Indexes, job: AskJob) -> Config:
    """The settings of the run that answers: the index's own, with the questions and what is published of them.

    Of several indexes the first one's, with all of their corpora, labelled `part-000`, `part-001`, ...

    Raises:
        ConfigError: for a value that cannot work.
        RunError: where the factors are not there.
    """
    made = {one.name: getattr(found[0].made_with, one.name) for one in fields(Config)}
    config = Config(**made)
    asked = QueriesConfig(
        path=absolute(job.queries) if job.queries else "",
        measure=job.measure,
        prompt=job.prompt if job.prompt is not None or job.completion is None else "",
        completion=job.completion,
        contrast=job.contrast,
    )
    named = ", ".join(one.store.uri for one in found)
    config = replace(
        config,
        output=absolute(job.output),
        queries=asked,
        scan=replace(
            config.scan, top_k=job.top_k, candidates=job.candidates, sides=job.sides, shard_sequences=None,
            check_sequences=0, scores=Scores.top, sieve=None, sieve_candidates=None, candidates_from=named,
            audit_sequences=job.audit_sequences,
        ),
        cluster=job.cluster,
    )  # fmt: skip
    if len(found) > 1:
        if several := [one.store.uri for one in found if one.made_with.corpus.paths]:
            raise ConfigError(f"{several[0]} is an index of several corpora already, and is asked alone; leave it out.")
        if job.corpus is not None:
            raise ConfigError("corpus= says where one corpus is now; with several indexes leave it out.")
        paths = {f"part-{number:03d}": one.made_with.corpus.path for number, one in enumerate(found)}
        # What each of them took a sample of is in its own plan.
        config = replace(config, corpus=replace(config.corpus, path="", paths=paths, max_sequences=None, sample=None))
    if job.model is not None:
        config = replace(config, model=replace(config.model, path=absolute(job.model, only_existing=True)))
    if job.factors is not None:
        config = replace(config, factors=replace(config.factors, path=absolute(job.factors)))
    if job.corpus is not None:
        path, was = absolute(job.corpus), config.factors.corpus
        if was.same_corpus(config.corpus):
            config = replace(config, factors=replace(config.factors, corpus=replace(was, path=path, paths={})))
        config = replace(config, corpus=replace(config.corpus, path=path, paths={}))
    check(config, ("queries.path",) if job.queries is None else ())
    _check_fitted(config.factors, found)
    return config


def _check_fitted(factors: FactorsConfig, found: Indexes) -> None:
    """Raises RunError where the factors are gone: others would be fitted, for hours, of which the codes say nothing."""
    if factors.solver is not Solver.identity and not Store(str(factors.path)).exists(COMPLETE):
        raise RunError(
            f"{factors.path} holds no complete factors, and {found[0].store.uri} answers for its own fit alone; "
            "restore them, or say where they are now (factors=...)."
        )


def indexed(run: Run, corpus: AddressableCorpus, found: Indexes, factors: Factors) -> AddressableCorpus:
    """The corpus whose sequences the indexes have, all of them planned.

    Raises:
        RunError: where an index is of another model, corpus or factors, by name.
    """
    parts = _parts(corpus, found)
    for part, one in zip(parts, found, strict=True):
        check_fields(run, part, one, factors)
    if len(found) == 1 or all(one.manifest.rows == part.sequences for part, one in zip(parts, found, strict=True)):
        return corpus
    plans = [Plan.from_json(one.store.read_json(PLAN), part.chosen) for part, one in zip(parts, found, strict=True)]
    ids = [plan.selection.ids() + first for plan, first in zip(plans, _first_ids(parts), strict=True)]
    describe_filtered(run.store / INDEXED, corpus, np.concatenate(ids))
    return open_corpus(run.store / INDEXED, corpus.reading)


def _parts(corpus: AddressableCorpus, found: Indexes) -> Sequence[AddressableCorpus]:
    """The corpus of every index."""
    base = corpus.base if isinstance(corpus, FilteredCorpus) and len(found) > 1 else corpus
    return base.parts if isinstance(base, JoinedCorpus) and len(found) > 1 else [base]


def _first_ids(parts: Sequence[AddressableCorpus]) -> list[int]:
    """The number of the first sequence of each."""
    return np.cumsum([0, *(part.sequences for part in parts[:-1])]).tolist()


def candidates(
    run: Run, corpus: AddressableCorpus, found: Indexes, factors: Factors, *, verify: bool = True
) -> NDArray[np.int64]:
    """The sequences that the index chooses for any query, ascending.

    Of every query and side the C = scan.candidates best rows by the index, which candidates.parquet lists. An answer
    that goes on takes those that it has.

    Raises:
        RunError: where nothing is found.
        DamagedError: where a file of an index does not hold what was written.
    """
    config = run.config
    of_index = [one.manifest.fingerprint for one in found]
    of_queries = [run.inputs.fingerprints(), factors.inverse.fingerprint]
    key = fingerprint([of_index, of_queries, config.candidates, config.sides])
    before = _chosen_before(run, key)
    if before is not None:
        return before
    codes = query_codes(run, found[0], factors)
    of_parts = list(zip(found, _first_ids(_parts(corpus, found)), strict=True))
    best = search(run, of_parts, codes, verify=verify)
    if not len(best):
        raise RunError(f"{found[0].store.uri} has no row with a score above zero on the sides asked for.")
    self_influence = self_influences(of_parts, np.unique(best.sequence_ids))
    run.folder.fence()
    listed = candidates_table(run.inputs.query_ids, best, self_influence)
    run.store.write(CANDIDATES, to_parquet(listed, {"fingerprint": key}))
    return np.unique(best.sequence_ids)


def self_influences(of_parts: Sequence[tuple[OpenIndex, int]], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """What the indexes say of the self-influence of some sequences (ascending). Files that have none are not read."""
    found = np.full(len(ids), np.nan, np.float32)
    ends = [first for _, first in of_parts[1:]] + [np.iinfo(np.int64).max]
    for (one, first_id), end in zip(of_parts, ends, strict=True):
        mine = slice(*np.searchsorted(ids, [first_id, end]))
        for name in _files_of(one, ids[mine] - first_id):
            columns = read_columns(one.store, name, ["sequence_id", "self_influence"], one.manifest.files[name].seal)
            place = np.searchsorted(ids, columns["sequence_id"] + first_id)
            known = (place < len(ids)) & (ids[np.minimum(place, len(ids) - 1)] == columns["sequence_id"] + first_id)
            found[place[known]] = columns["self_influence"][known]
    return found


def _files_of(one: OpenIndex, ids: NDArray[np.int64]) -> list[str]:
    """The files that some of an index's sequences may be in: they are in the order of its sequences."""
    names = sorted(one.manifest.files)
    shards = read_parquet(one.store, "shards.parquet", ["first_sequence_id"])["first_sequence_id"].to_numpy()
    return [names[place] for place in np.unique(np.searchsorted(shards, ids, side="right") - 1).tolist()]


def _chosen_before(run: Run, key: str) -> NDArray[np.int64] | None:
    """What an earlier process chose of the same index for the same questions; None where it did not."""
    if not run.store.exists(CANDIDATES):
        return None
    try:
        table, footer = read_with_footer(run.store, CANDIDATES, ["sequence_id"])
    except DamagedError as error:
        run.telemetry.warn(f"{error} It is looked for again now.")
        return None
    return np.unique(table["sequence_id"].to_numpy()) if footer["fingerprint"] == key else None


def candidates_table(query_ids: Sequence[str], best: ScoredRows, self_influence: NDArray[np.float32]) -> pa.Table:
    """What the index found: query_id, side, rank (1 = strongest by the index), sequence_id, index_score, and
    relative_score, which is index_score / sqrt(self-influence) (l-RelatIF; Barshan, Brunet and Dziugaite 2020).

    self_influence: of the sequences, ascending.
    """
    places = np.searchsorted(np.unique(best.sequence_ids), best.sequence_ids)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = best.scores / np.sqrt(self_influence[places])
    keys = best.queries.astype(np.int64) * len(SIDES) + best.sides
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    ranks = np.arange(len(best)) - np.repeat(starts, np.diff([*starts.tolist(), len(best)]))
    return pa.table(
        {
            "query_id": pa.array(query_ids, pa.string()).take(pa.array(best.queries)),
            "side": pa.array(SIDES).take(pa.array(best.sides)),
            "rank": pa.array(ranks + 1, pa.int32()),
            "sequence_id": best.sequence_ids,
            "index_score": best.scores,
            "relative_score": pa.array(relative.astype(np.float32), from_pandas=True),
        }
    )


def check_fields(run: Run, corpus: AddressableCorpus, found: OpenIndex, factors: Factors) -> None:
    """Raises RunError where the index is not of this model, corpus and factors, naming what differs."""
    asked = index_fields(run.inputs, corpus, factors, found.settings)
    stored = found.manifest.fields
    differing = sorted(name for name in asked if asked[name] != stored.get(name))
    if differing:
        said = "; ".join(f"{name}: {_short(stored.get(name))} -> {_short(asked[name])}" for name in differing)
        raise RunError(
            f"{found.store.uri} is an index of other inputs ({said}): its codes say nothing of these. Put back what it "
            "was made of (model=, corpus=, factors= say where it is now), or make an index anew with another output=..."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def query_codes(run: Run, found: OpenIndex, factors: Factors) -> dict[str, QueryCodes]:
    """Every query's side of every indexed layer."""
    layers = indexed_layers(run.inputs.layers, found.settings.layers)
    groups, layer_groups = query_groups(len(run.queries), layers, run.config.query_group_bytes)
    parts: dict[str, dict[int, QueryCodes]] = {layer.name: {} for layer in layers}

    def task(cell: tuple[int, int]) -> QueryCodesTask:
        return QueryCodesTask(
            queries=tuple(run.queries[query] for query in groups[cell[0]]),
            layers=layer_groups[cell[1]],
            inverse=factors.inverse,
            code=code_settings(found.settings),
        )

    def on_done(cell: tuple[int, int], result: dict[str, QueryCodes]) -> None:
        for name, mine in result.items():
            parts[name][cell[0]] = mine

    step = Step(
        name="query codes",
        unit_name="groups",
        units=[(q, g) for q in range(len(groups)) for g in range(len(layer_groups))],
        function=query_codes_task,
        task=task,
    )
    run.executor.run(step, on_done)
    return {name: QueryCodes.joined([mine[q] for q in range(len(groups))]) for name, mine in parts.items()}


@dataclass(frozen=True)
class QueryCodesTask:
    """The codes of a group of queries for a group of layers."""

    queries: tuple[Query, ...]
    layers: tuple[Layer, ...]
    inverse: Preconditioner
    code: CodeSettings


@multiplying("exact")
def query_codes_task(worker: ModelWorker, task: QueryCodesTask) -> dict[str, QueryCodes] | None:
    """v of every query by layer, from its preconditioned gradient: <v, u> estimates its score (`codes`). On rank 0."""
    V = sources(worker, task.queries, task.layers, task.inverse)
    solved = task.inverse.solutions is not None
    found: dict[str, QueryCodes] = {}
    for layer in task.layers:
        known = layer_factors(task.inverse, layer, worker.device, worker.wide)
        (maps,) = layer_codes(worker, task.code, (layer,), task.inverse).values()
        with multiplying(task.inverse.matmul):
            v_qd = torch.cat([maps.of_query(core(one, layer, known, solved=solved)[None]) for one in V[layer.name]])
        found[layer.name] = QueryCodes.of(v_qd.float().cpu().numpy(), task.code.bits)
    return found if worker.leads else None


def search(
    run: Run, found: Sequence[tuple[OpenIndex, int]], queries: dict[str, QueryCodes], *, verify: bool = True
) -> ScoredRows:
    """The C best rows of every query and side over whole indexes. found: each with the number of its first sequence."""
    config = run.config
    here = config.cluster.backend is Backend.in_process
    groups = [
        group
        for one, first_id in found
        for group in file_groups(
            one.store,
            [(name, file.seal, file.rows) for name, file in one.manifest.files.items()],
            1 if here else _GROUPS,
            first_id,
        )
    ]
    shared = run.executor.share(Search(queries, config.sides, config.candidates, verify))
    tracker = TopKTracker(len(run.queries), config.sides, config.candidates)
    tasks = TaskMap(
        name="search",
        unit_name="groups of files",
        items=range(len(groups)),
        function=search_files,
        arguments=lambda number: (groups[number], shared, cores() if here else 1),
        progress=lambda number, _: (groups[number].rows, 0),
    )
    run.executor.map_tasks(tasks, lambda _, hits: tracker.add(hits))
    return tracker.best()
