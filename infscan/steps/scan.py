"""Scan the corpus: every sequence's score against all queries, from one forward and one backward; best rows to storage.

A shard is a unit. Its file's presence is the fact that it is done; with its task it gets the thresholds of the shard
files that are in storage, so it writes only rows that may still be among the best.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.config import Dtype, fingerprint
from infscan.corpus.addressable import AddressableCorpus, CorpusAddress
from infscan.corpus.plan import Plan, shard_name
from infscan.corpus.read_ahead import Reads
from infscan.engine.executor import Pieces, Step
from infscan.errors import DamagedError, RunError
from infscan.influence.layers import Layer
from infscan.influence.layout import QueryBatch
from infscan.influence.precision import multiplying
from infscan.influence.routed import Routed
from infscan.influence.score import LayerQueries, score_layer
from infscan.influence.shard_rows import shard_rows
from infscan.influence.spread import ShardSpread, Spread
from infscan.influence.topk_tracker import ScoredRows, Thresholds, TopKTracker
from infscan.model.worker import LayerConsumer, ModelWorker
from infscan.results.dense import FOLDER as SCORES
from infscan.results.dense import check_scores, scores_path, write_scores
from infscan.results.index_file import codes_path
from infscan.results.manifest import SUCCESS
from infscan.results.schema import damaged
from infscan.results.shard_file import (
    QUARANTINE,
    ScanCounts,
    ShardCounts,
    count_sources,
    finished_shards,
    read_hits,
    shard_path,
    write_shard,
)
from infscan.results.statements import HUB_RANK
from infscan.secrets import redact
from infscan.steps.index import CodesTask, IndexPass, ShardCodes, finished
from infscan.steps.plan import few_shards
from infscan.steps.queries import BroadcastQueries, on_device
from infscan.steps.run import Run
from infscan.storage import Store
from infscan.storage.prefetch import prefetch

log = logging.getLogger("infscan")

# A shard's rows, and what it counted.
ShardResult = tuple[ScoredRows, ShardCounts]


@dataclass(frozen=True)
class ScanPass:
    """What one pass over planned sequences computes, and where its shard files go: `whole`, or a sieve's.

    layers: that are scored; ends_at: the block above which the backward ends. candidates: rows kept per query and side.
    tokens: whether shard files have the kept sequences' tokens. scores: where every sequence's scores are kept; None
    keeps none.
    fields: what else tells its shard files from another pass's.
    """

    name: str
    store: Store
    layers: tuple[Layer, ...]
    candidates: int
    scores: Store | None = None
    tokens: bool = True
    ends_at: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def whole(run: Run, planned: int) -> ScanPass:
    """All tracked layers; the best rows of so many planned sequences are refined."""
    config = run.config
    candidates = config.candidates_of(planned)
    return ScanPass("scan", run.store, run.inputs.layers, candidates, run.store if config.dense else None)


@dataclass(frozen=True)
class Scanned:
    """What a pass left."""

    # The C best rows per query and side.
    best: ScoredRows
    # Of all finished shards.
    counts: ScanCounts
    # The shards given up, with reasons.
    quarantined: dict[int, str]
    # What every shard's footer has.
    fingerprint: str
    # The HUB_RANK best rows per background query and side; queries count from 0.
    background: ScoredRows = field(default_factory=lambda: ScoredRows.concatenate([]))


def scan(
    run: Run,
    plan: Plan,
    corpus: AddressableCorpus,
    batch: BroadcastQueries,
    how: ScanPass | None = None,
    beside: IndexPass | None = None,
) -> Scanned:
    """Scan every shard whose file is not there yet; thresholds come from the files that are. how: `whole` where it is
    not given. beside: an index of the same plan, whose codes are written in the same pass.

    Raises:
        RunError: where more sequences than scan.max_nonfinite allows have scores that are NaN or infinite.
    """
    config, how = run.config, how or whole(run, plan.selection.size)
    fields = {"plan": plan.to_json(), "queries": batch.fingerprint, **corpus.reading.fields(), **how.fields}
    run_fingerprint = fingerprint(fields)
    _begin(run, how.store)
    coded = None if beside is None else set(finished(run, plan, beside))
    tally = _Tally(run, plan, run_fingerprint, how, batch)
    done = tally.add_finished(coded)
    address = CorpusAddress.of(corpus)

    def task(number: int) -> ScanTask:
        return ScanTask(
            run=how.store,
            corpus=address,
            shard=shard_name(number),
            sequence_ids=plan.ids(number),
            query_ids=batch.query_ids,
            own=batch.own,
            query_batch=batch.fingerprint,
            sides=config.sides,
            candidates=how.candidates,
            thresholds=tally.thresholds,
            tokens_per_batch=config.tokens_per_batch,
            dense=how.scores is not None,
            scores=how.scores,
            fingerprint=run_fingerprint,
            query_dtype=config.scan.query_dtype,
            layers=how.layers,
            ends_at=how.ends_at,
            tokens=how.tokens,
            codes=None if beside is None else beside.codes(shard_name(number)),
        )

    step = Step(
        name=how.name,
        unit_name="shards",
        units=plan.order().tolist(),
        function=scan_task,
        task=task,
        is_done=lambda number: bool(done[number]),
        progress=lambda number, result: (result[1].sequences, result[1].tokens),
        reads=lambda number: Reads(address, plan.ids(number)),
    )
    if said := few_shards(plan, run.executor.num_workers):
        log.info("%-11s %s", how.name, said)
    run.executor.run(step, tally.add, tally.give_up, shared=[batch.batch])
    run.executor.forget()
    tally.check_nonfinite()
    return Scanned(tally.tracker.best(), tally.counts, tally.quarantined, run_fingerprint, tally.background.best())


def _begin(run: Run, store: Store) -> None:
    """From here on the run is not finished, and shards that were given up are tried again."""
    run.folder.fence()
    run.store.remove(SUCCESS)
    for entry in store.list(QUARANTINE):
        run.folder.fence()
        store.remove(entry.name)


class _Tally:
    """The finished shards together. Sums alone are kept of them: a scan may have a million."""

    def __init__(self, run: Run, plan: Plan, fingerprint: str, how: ScanPass, batch: BroadcastQueries) -> None:
        self.run, self.plan, self.fingerprint, self.how = run, plan, fingerprint, how
        self.query_ids, self.own = batch.query_ids, batch.own
        self.tracker = TopKTracker(self.own, run.config.sides, how.candidates)
        self.background = TopKTracker(len(self.query_ids) - self.own, run.config.sides, HUB_RANK)
        self.counts = ScanCounts(spread=Spread(self.own))
        self.quarantined: dict[int, str] = {}

    @property
    def thresholds(self) -> Thresholds:
        """Of all columns of the batch."""
        return self.tracker.thresholds + self.background.thresholds

    def add_finished(self, coded: Set[str] | None = None) -> NDArray[np.bool_]:
        """Add the shards whose files are in storage; one that is damaged, or whose scores are gone, is removed.

        coded: the files of codes that are there; None where there is no index beside. A shard without its codes is
        done again, and its own file stays the one that counts.

        Returns which are done.

        Raises:
            RunError: for a file of another scan.
        """
        store, shards = self.how.store, self.plan.num_shards
        there = finished_shards(store)
        scored = None if self.how.scores is None else set(self.how.scores.names(SCORES))
        done = np.fromiter((shard_name(number) in there for number in range(shards)), np.bool_, shards)
        for number, found in prefetch(store, partial(self._read, scored=scored), map(int, np.flatnonzero(done))):
            if isinstance(found, DamagedError):
                self.run.telemetry.warn(f"{found} It is scanned again now.")
                self.run.folder.fence()
                store.remove(shard_path(shard_name(number)))
                done[number] = False
            elif coded is None or codes_path(shard_name(number)) in coded:
                self._sum(found)
            else:
                done[number] = False
        return done

    def _read(self, number: int, scored: Set[str] | None) -> tuple[int, ShardResult | DamagedError]:
        """A finished shard, whole, or what is wrong with it. scored: the parts of scores/; None where none are made."""
        store, name = self.how.store, shard_name(number)
        kept = self.how.scores
        if kept is not None and scored is not None and scores_path(name) not in scored:
            return number, damaged(f"{kept.uri}/{scores_path(name)}", "it is missing")
        try:
            if kept is not None:
                check_scores(kept, name, self.fingerprint)
            return number, read_hits(store, name, self.query_ids, self.fingerprint, whole=True)
        except DamagedError as error:
            return number, error

    def _sum(self, result: ShardResult) -> None:
        if self.own == len(self.query_ids):
            self.tracker.add(result[0])
        else:
            own = result[0].queries < self.own
            self.tracker.add(result[0].take(own))
            self.background.add(result[0].take(~own).less(self.own))
        self.counts.add(result[1])

    def add(self, number: int, result: ShardResult) -> None:
        self._sum(result)
        self.check_nonfinite()

    def give_up(self, number: int, reason: str) -> None:
        """Quarantine a shard, with a note."""
        store, name, ids = self.how.store, shard_name(number), self.plan.ids(number)
        if store.exists(shard_path(name)):
            # An attempt that was taken for lost finished after all, or another driver did: the file is what counts.
            self._sum(read_hits(store, name, self.query_ids, self.fingerprint))
            return
        self.quarantined[number] = reason = redact(reason)
        note = {"shard": name, "first_sequence_id": int(ids[0]), "last_sequence_id": int(ids[-1]), "reason": reason}
        self.run.folder.fence()
        store.write_json(f"{QUARANTINE}/{name}.json", note)
        self.run.telemetry.warn(f"{name} is quarantined: {reason}")

    def check_nonfinite(self) -> None:
        limit = self.run.config.scan.max_nonfinite
        if self.counts.nonfinite > limit * self.plan.selection.size:
            raise RunError(
                f"{self.counts.nonfinite} sequences have scores that are NaN or infinite, more than scan.max_nonfinite="
                f"{limit} of {self.plan.selection.size}; use model.dtype=float32, or raise the limit."
            )


@dataclass(frozen=True)
class ScanTask:
    """One shard."""

    run: Store
    corpus: CorpusAddress
    shard: str
    sequence_ids: np.ndarray
    query_ids: tuple[str, ...]
    # The fingerprint of the broadcast batch, so that a rank lays it out once, in query_dtype.
    query_batch: str
    sides: tuple[str, ...]
    candidates: int
    # Of the shard files that were in storage when it was handed out.
    thresholds: Thresholds
    tokens_per_batch: int
    dense: bool
    fingerprint: str
    query_dtype: Dtype | None = None
    # Those that are scored; None: all.
    layers: tuple[Layer, ...] | None = None
    ends_at: str | None = None
    # Whether the file has the kept sequences' tokens.
    tokens: bool = True
    # Where dense scores go; None: where the shard's file does.
    scores: Store | None = None
    # Of an index beside.
    codes: CodesTask | None = None
    # How many queries are the run's own; of the others the HUB_RANK best rows are kept, and nothing else. None: all.
    own: int | None = None


@multiplying("exact")
def scan_task(worker: ModelWorker, task: ScanTask, query_batch: Pieces | QueryBatch) -> ShardResult | None:
    """Score every sequence of the shard and write its file; returns what was written, on rank 0.

    score[n, q] = sum over layers and tokens of s_t^T P_q a_t, float32. Dense scores and an index's codes go before the
    shard's file.
    """
    queries = worker.cached("queries", task.query_batch, lambda: on_device(worker, query_batch, task.query_dtype))
    with worker.span("read", shard=task.shard):
        sequences = worker.read(task.corpus, task.sequence_ids)
    layers = worker.layers if task.layers is None else task.layers
    scores_nq = torch.zeros(len(sequences), len(task.query_ids), dtype=worker.wide, device=worker.device)
    losses_n = torch.zeros(len(sequences), dtype=worker.wide, device=worker.device)
    codes = None if task.codes is None else ShardCodes(worker, task.codes, len(sequences))
    for batch in worker.batches(sequences, task.tokens_per_batch):
        rows = worker.to_device(batch.rows)
        partial_bq = torch.zeros(len(batch.rows), len(task.query_ids), dtype=worker.wide, device=worker.device)
        consume = scoring(partial_bq, queries)
        if codes is not None:
            codes.begin(rows)
            consume = both(consume, codes.consume)
        losses_b = worker.backward(batch, layers, batch.loss(), consume, ones=False, ends_at=task.ends_at)
        if batch.scored:
            scores_nq[rows], losses_n[rows] = partial_bq, losses_b
    write_codes = None
    if codes is not None:
        # Ranks sum into what they reduce.
        codes.losses_n.copy_(losses_n)
        write_codes = codes.written(sequences, task.sequence_ids)
    scores_nq, losses_n = worker.reduce(scores_nq), worker.reduce(losses_n)
    if not worker.leads:
        return None
    # Rows are chosen on the device: of many queries' scores few are wanted here.
    scores_nq = scores_nq.float()
    own_nq, own_ids = scores_nq[:, : task.own], task.query_ids[: task.own]
    scores, losses = own_nq.cpu().numpy(), losses_n.float().cpu().numpy()
    hits = _kept(task, scores_nq)
    counts = ShardCounts(
        sequences=len(sequences),
        tokens=sum(len(sequence) for sequence in sequences),
        nonfinite=int((~torch.isfinite(own_nq).all(dim=1)).sum()),
        kept=len(np.unique(hits.sequence_ids)),
        rows=len(hits),
        halvings=worker.oom_retries,
        spread=ShardSpread.of(scores),
        sources=count_sources(sequences),
    )

    def write() -> ShardResult:
        if write_codes is not None:
            write_codes()
        if task.run.exists(shard_path(task.shard)):
            # Another attempt was first: its rows and scores are the ones that count, also where kernels round
            # differently.
            return read_hits(task.run, task.shard, task.query_ids, task.fingerprint)
        with worker.span("write", shard=task.shard):
            if task.dense:
                write_scores(task.scores or task.run, task.shard, sequences, scores, own_ids, task.fingerprint)
            facts = (task.query_ids, counts, task.fingerprint)
            if not write_shard(task.run, task.shard, sequences, losses, hits, *facts, tokens=task.tokens):
                return read_hits(task.run, task.shard, task.query_ids, task.fingerprint)
        return hits, counts

    return worker.later(write)


def _kept(task: ScanTask, scores_nq: Tensor) -> ScoredRows:
    """The rows of the shard that may be among the best, of the run's own queries and of the background's."""
    own = shard_rows(scores_nq[:, : task.own], task.sequence_ids, task.sides, task.candidates, task.thresholds)
    if task.own is None or task.own == len(task.query_ids):
        return own
    rest_nq, bars = scores_nq[:, task.own :], task.thresholds.after(task.own)
    others = shard_rows(rest_nq, task.sequence_ids, task.sides, HUB_RANK, bars)
    return ScoredRows.concatenate([own, others.less(-task.own)])


def both(one: LayerConsumer, other: LayerConsumer) -> LayerConsumer:
    """Two consumers of one backward."""

    def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
        one(layer, s, a, routed)
        other(layer, s, a, routed)

    return consume


def scoring(scores_bq: Tensor, queries: Mapping[str, LayerQueries]) -> LayerConsumer:
    """Adds every layer's scores of a micro-batch to scores_bq, [B, Q]."""

    def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
        scores_bq.add_(score_layer(s, a, queries[layer.name], routed))

    return consume
