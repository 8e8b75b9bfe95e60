"""How alike published rows and their queries are in the model's own reading, beside what training does with them.

Whitened cosines of hidden states of a middle block (`infscan.influence.similarity`), by a forward of every published
sequence; the whitening is of the whole corpus, by a seeded sample. With stages, the model is the one that is scanned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.config import fingerprint
from infscan.corpus.addressable import AddressableCorpus, CorpusAddress
from infscan.corpus.plan import Plan, Selection
from infscan.corpus.sequences import Sequence
from infscan.engine.executor import Step
from infscan.errors import DamagedError
from infscan.influence.similarity import StateMoments, Whitening, best_cosines, standing
from infscan.influence.topk_tracker import ScoredRows
from infscan.model.hidden import hidden_states
from infscan.model.worker import Batch, ModelWorker
from infscan.queries import Query, queries_fingerprint
from infscan.results.publish import Ranking
from infscan.results.refined import RefinedRows, unit_path, write_unit
from infscan.results.shard_file import quarantined_shards
from infscan.results.tensor_files import read_facts, read_tensor, write_tensors
from infscan.steps.candidates import FOLDER as SIEVE
from infscan.steps.refine import pairs_of, refine_units, stored_candidates, whole_units
from infscan.steps.run import Run
from infscan.steps.scan import Scanned
from infscan.storage import Store

_NAME = "similarity"
_WHITENING, _SAMPLE = "queries/whitening.safetensors", "queries/similarity-{:04d}.safetensors"
# Sequences that the whitening is of, and beside which a row's similarity stands.
SAMPLED = 64
# Bytes of the sample's states that a rank keeps from step to step, and from run to run where its model stays loaded.
_KEPT = 64 << 20
QUERIES_PER_GROUP, SEQUENCES_PER_UNIT, _PAIRS_PER_UNIT = 64, 256, 1 << 14


@dataclass(frozen=True)
class Similarities:
    """Of the rows that were compared, as columns: queries int32, sequence_ids int64, values float32.

    sampled_qn: float32 [Q, n], every query's similarity to a sample of the corpus.
    """

    rows: ScoredRows
    values: NDArray[np.float32]
    sampled_qn: NDArray[np.float32]

    def of(self, ranking: Ranking) -> NDArray[np.float32]:
        """Of a ranking's rows; NaN for those that were not compared."""
        pairs = zip(self.rows.queries.tolist(), self.rows.sequence_ids.tolist(), strict=True)
        known = dict(zip(pairs, self.values.tolist(), strict=True))
        wanted = zip(ranking.queries.tolist(), ranking.sequence_ids.tolist(), strict=True)
        return np.asarray([known.get(pair, np.nan) for pair in wanted], np.float32)

    def standing(self, ranking: Ranking) -> NDArray[np.float32]:
        """The same in robust standard deviations from the median of the sample; NaN too where that is too small."""
        return standing(self.of(ranking), ranking.queries, self.sampled_qn)


def similarity(
    run: Run, plan: Plan, corpus: AddressableCorpus, scanned: Scanned, ranking: Ranking
) -> Similarities | None:
    """Compare the scan.similarity strongest rows of every query and side with the query; None for 0 rows."""
    config, inputs = run.config, run.inputs
    most = config.scan.similarity
    if most == 0:
        return None
    if not run.architecture.block:
        run.telemetry.warn(
            f"top.similarity is null: transformers calls no part of a {run.architecture.family} model a block, whose "
            "hidden states would be compared"
        )
        return None
    rows = np.sort(ranking.rows if most is None else ranking.rows[ranking.ranks <= most])
    tried = scanned.best.take(rows)
    sample = Selection.of(corpus.sequences, SAMPLED, config.seed).ids()
    of_sample = [run.architecture.fingerprint, inputs.refine_dtype, corpus.fingerprint, sample.tolist()]
    key = fingerprint([of_sample, [queries_fingerprint([query]) for query in run.queries]])
    groups = [
        range(start, min(start + QUERIES_PER_GROUP, len(run.queries)))
        for start in range(0, len(run.queries), QUERIES_PER_GROUP)
    ]
    units = refine_units(tried, groups, SEQUENCES_PER_UNIT, _PAIRS_PER_UNIT)
    digest = fingerprint([key, scanned.fingerprint, tried.sequence_ids.tolist(), tried.queries.tolist()])
    paths = [unit_path(digest, number) for number in range(len(units))]
    there = whole_units(run, digest)

    def task(number: int) -> SimilarityTask:
        unit = units[number]
        return SimilarityTask(
            run=run.store,
            path=paths[number],
            group=f"{unit.group}/{key}",
            queries=tuple(run.queries[query] for query in groups[unit.group]),
            shards=tuple(plan.by_shard(unit.sequence_ids)),
            wanted=unit.wanted,
            tokens_per_batch=config.tokens_per_batch,
            fingerprint=scanned.fingerprint,
        )

    step = Step(
        name=_NAME,
        unit_name="units",
        units=range(len(units)),
        function=similarity_task,
        task=task,
        is_done=lambda number: paths[number] in there,
        progress=lambda number, tokens: (len(np.unique(units[number].sequence_ids)), tokens),
    )
    states = fingerprint([of_sample, config.tokens_per_batch])
    whiten = WhiteningTask(run.store, CorpusAddress.of(corpus), sample, config.tokens_per_batch, key, states)

    def sampling(number: int) -> SampleTask:
        queries = tuple(run.queries[query] for query in groups[number])
        return SampleTask(whiten, _SAMPLE.format(number), f"{number}/{key}", queries)

    sampled = Step(
        name="similarity_sample",
        unit_name="query groups",
        units=range(len(groups)),
        function=sample_task,
        task=sampling,
        is_done=lambda number: _is_made(run, _SAMPLE.format(number), key),
    )
    if not all(all(map(each.is_done, each.units)) for each in (step, sampled)):
        # As the published scores are made.
        run.hold_model_in(config.refine_dtype)
        whitening = Step(
            "whitening", "samples", [0], whitening_task, lambda _: whiten, lambda _: _is_made(run, _WHITENING, key)
        )

        def on_given_up(_: int, reason: str) -> None:
            run.telemetry.warn(f"top.similarity is null: a sample of the corpus could not be compared: {reason}")

        # What the scan, or its sieve, could not read either, and lists, ends no run; any other trouble does.
        gave_up = any(quarantined_shards(store) for store in (run.store, run.store / SIEVE))
        forgiven = on_given_up if gave_up else None
        if any(run.executor.run(each, on_given_up=forgiven) for each in (whitening, sampled)):
            return None
        # Its rows come from the run's own files, as refining's do: what fails here fails the run.
        run.executor.run(step)
    sampled_qn = np.concatenate(
        [read_tensor(run.store, _SAMPLE.format(number), _NAME).numpy() for number in range(len(groups))]
    )
    by_group: list[list[list[str]]] = [[[]] for _ in groups]
    for unit, path in zip(units, paths, strict=True):
        by_group[unit.group][0].append(path)
    found = RefinedRows(run.store, groups, by_group, [_NAME], inputs.query_ids, tried)
    return Similarities(tried, found.scores, sampled_qn)


def _is_made(run: Run, name: str, key: str) -> bool:
    try:
        return run.store.exists(name) and read_facts(run.store, name).get("fingerprint") == key
    except DamagedError as error:
        run.telemetry.warn(f"{error} It is computed again now.")
        return False


@dataclass(frozen=True)
class WhiteningTask:
    """Sequences of a corpus whose hidden states the whitening is of. states: what those follow from."""

    run: Store
    corpus: CorpusAddress
    sequence_ids: np.ndarray
    tokens_per_batch: int
    fingerprint: str
    states: str


@dataclass(frozen=True)
class SampleTask:
    """The queries of a group beside the sample that the whitening is of. name: of the file. group: as of
    `SimilarityTask`."""

    sample: WhiteningTask
    name: str
    group: str
    queries: tuple[Query, ...]

    @property
    def run(self) -> Store:
        return self.sample.run


@dataclass(frozen=True)
class SimilarityTask:
    """Some published rows of a group of queries; shards and wanted as of `infscan.steps.refine.RefineTask`."""

    run: Store
    path: str
    group: str
    queries: tuple[Query, ...]
    shards: tuple[tuple[str, np.ndarray], ...]
    wanted: dict[int, tuple[int, ...]]
    tokens_per_batch: int
    fingerprint: str | None


def whitening_task(worker: ModelWorker, task: WhiteningTask) -> None:
    """Sum the states of a sample's tokens and their products; rank 0 writes them, float64."""
    moments: StateMoments | None = None
    for batch, h_btd in _sampled_states(worker, task, worker.read(task.corpus, task.sequence_ids)):
        moments = moments or StateMoments(h_btd.shape[-1], worker.device)
        if batch.scored:
            moments.add(h_btd[counted(batch)])
    assert moments is not None, "every rank of a group has as many micro-batches"
    total_nn = worker.reduce(moments.total_nn)
    if worker.leads:
        write_tensors(task.run, _WHITENING, {"total": total_nn}, {"fingerprint": task.fingerprint})


def sample_task(worker: ModelWorker, task: SampleTask) -> int:
    """Similarity of every query to every sequence of the sample, [Q, n] float32, written by rank 0. Returns the
    tokens."""
    whitening, own = worker.cached("similarity", task.group, lambda: _own(worker, task))
    sequences = worker.read(task.sample.corpus, task.sample.sequence_ids)
    values_qn = torch.zeros(len(own), len(sequences), dtype=torch.float64, device=worker.device)
    for batch, x_btd, counts_bt in _directions(_sampled_states(worker, task.sample, sequences), whitening):
        rows = torch.from_numpy(batch.rows).to(worker.device)
        for query, own_id in enumerate(own):
            values_qn[query, rows] = best_cosines(own_id, x_btd, counts_bt).to(values_qn.dtype)
    values_qn = worker.reduce(values_qn)
    if worker.leads:
        facts = {"fingerprint": task.sample.fingerprint}
        write_tensors(task.run, task.name, {_NAME: values_qn.float().cpu()}, facts)
    return sum(len(sequence) for sequence in sequences)


def similarity_task(worker: ModelWorker, task: SimilarityTask) -> int:
    """Similarity of every wanted pair, written by rank 0. Returns the tokens."""
    whitening, own = worker.cached("similarity", task.group, lambda: _own(worker, task))
    sequences = stored_candidates(task.run, task.shards, task.fingerprint)
    wanted = [task.wanted[sequence.sequence_id] for sequence in sequences]
    pairs = pairs_of(wanted)
    first = np.cumsum([0, *map(len, wanted)]).tolist()
    values_n = torch.zeros(len(pairs), dtype=torch.float64, device=worker.device)
    states = ((batch, _states(worker, batch)) for batch in worker.batches(sequences, task.tokens_per_batch))
    for batch, x_btd, counts_bt in _directions(states, whitening):
        for place, row in enumerate(batch.rows.tolist()):
            for offset, query in enumerate(wanted[row]):
                one = slice(place, place + 1)
                values_n[first[row] + offset] = best_cosines(own[query], x_btd[one], counts_bt[one])[0]
    values_n = worker.reduce(values_n)
    if worker.leads:
        write_unit(
            task.run,
            task.path,
            [(task.queries[query].id, sequences[row].sequence_id) for row, query in pairs],
            values_n.float().cpu().numpy()[:, None],
            [np.empty(0, np.float32)] * len(pairs),
            [_NAME],
        )
    return sum(len(sequence) for sequence in sequences)


def _sampled_states(
    worker: ModelWorker, task: WhiteningTask, sequences: Sequences[Sequence]
) -> Iterable[tuple[Batch, Tensor]]:
    """This rank's micro-batches of the sample with their states [B, T, d]; where those are few, forward once for all
    questions to a loaded model."""

    def states() -> Iterator[tuple[Batch, Tensor]]:
        # Of a dummy too: the ranks of a group go forward together.
        for batch in worker.batches(sequences, task.tokens_per_batch):
            yield batch, _states(worker, batch)

    width = getattr(worker.model.module.config.get_text_config(), "hidden_size", None)
    if width is None or len(sequences) * max(map(len, sequences)) * width * worker.wide.itemsize > _KEPT:
        return states()
    return worker.cached("sampled states", task.states, lambda: list(states()), lasting=True)


def _directions(states: Iterable[tuple[Batch, Tensor]], whitening: Whitening) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Micro-batches, with their tokens' directions [B, T, d] and which of them take part [B, T]."""
    for batch, h_btd in states:
        if batch.scored:
            yield batch, whitening.directions(h_btd), counted(batch)


def _own(worker: ModelWorker, task: SimilarityTask | SampleTask) -> tuple[Whitening, list[Tensor]]:
    """The whitening, and the directions [i, d] of every query's tokens, prompt and completion."""
    total_nn = read_tensor(task.run, _WHITENING, "total")
    whitening = Whitening.of(total_nn).to(worker.device, worker.wide)
    found = []
    for query in task.queries:
        ids = np.asarray([query.parts[0].token_ids], np.int64)
        batch = Batch(np.arange(1), worker.to_device(ids), worker.to_device(np.ones(ids.shape, np.bool_)))
        found.append(whitening.directions(_states(worker, batch)[counted(batch)]))
    return whitening, found


def _states(worker: ModelWorker, batch: Batch) -> Tensor:
    return hidden_states(worker.model, batch.ids_bt, batch.position_ids_bt).to(worker.wide)


def counted(batch: Batch) -> Tensor:
    """The tokens that take part, bool [B, T]: all but padding and the first of every document that attention begins
    anew with, whose state says nothing of the text; of a sequence that has no other, that one."""
    positions_bt = batch.position_ids_bt
    if positions_bt is None:
        positions_bt = torch.arange(batch.ids_bt.shape[1], device=batch.ids_bt.device).expand_as(batch.ids_bt)
    inner_bt = batch.mask_bt & (positions_bt > 0)
    return torch.where(inner_bt.any(dim=1, keepdim=True), inner_bt, batch.mask_bt)
