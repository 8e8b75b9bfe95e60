"""Query batch, scan and refine on the worker groups. Each finds in storage what an earlier process finished."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import ray
from numpy.typing import NDArray

from infscan.config import fingerprint, is_intact, sealed
from infscan.corpus.addressable import AddressableCorpus
from infscan.corpus.plan import Plan, Selection, default_shard_sequences, shard_name
from infscan.errors import DamagedError, RunError
from infscan.influence.layout import (
    Array,
    LayoutPlan,
    QueryBatch,
    SharedBasis,
    Way,
    lay_out,
    plan_layouts,
    query_weights,
)
from infscan.influence.standings import Hits, Standings
from infscan.passes.factor_store import read_facts, read_tensors
from infscan.passes.joint import SharedBasisTask, read_shared_bases, shared_basis_task
from infscan.passes.queries import QueryTask, query_groups, query_task
from infscan.passes.query_batch import read_query_batch
from infscan.passes.refine import RefineTask, refine_task, refine_units
from infscan.passes.scan import ScanTask, scan_task
from infscan.queries import MEASURED, measured_jsonl
from infscan.results.publish import SUCCESS
from infscan.results.refined import unit_path
from infscan.results.schema import to_parquet
from infscan.results.shard_file import QUARANTINE, ScanCounts, ShardCounts, finished_shards, read_hits, shard_path
from infscan.runtime import preflight
from infscan.runtime.fit import Factors
from infscan.runtime.run import Run
from infscan.secrets import redact
from infscan.storage.ahead import ahead

PLAN = "plan.json"
_SEQUENCES_PER_UNIT = 256
# A unit's token scores, 4 bytes each, are in memory at once, on a rank and where they are published: 32 MiB at T = 512.
_PAIRS_PER_UNIT = 1 << 14
# The ways of scoring a layer as approximation.json has always named them.
_PUBLISHED: dict[Way, str] = {"factored": "low", "dense": "full", "shared_basis": "joint"}


@dataclass(frozen=True)
class BroadcastQueries:
    """All queries' compressed gradients, laid out for scoring, as every rank reads them."""

    fingerprint: str
    batch: ray.ObjectRef  # a `QueryBatch`
    layouts: dict[str, int]  # how many layers are scored in each way, as approximation.json names them


@dataclass(frozen=True)
class Scanned:
    """What the scan left: the C best rows per query and side, what the finished shards counted in all, and the shards
    given up, with reasons."""

    best: Hits
    counts: ScanCounts
    quarantined: dict[int, str]


@dataclass(frozen=True)
class Refined:
    """Where the refined units lie: for each query group, its units by layer group."""

    groups: list[range]
    paths: list[list[list[str]]]


def make_plan(run: Run, corpus: AddressableCorpus) -> Plan:
    """The run's plan: created if absent, then read back; inputs whose content changed are refused by name.

    Raises:
        RunError: where the model, the queries or the corpus are not those the run was planned with.
        StorageError: where a local disk has no space for what the scan will write.
    """
    settings = run.config.corpus
    selection = Selection.of(corpus.sequences, settings.max_sequences, settings.seed, corpus.chosen, settings.sample)
    shard_sequences = run.config.scan.shard_sequences or default_shard_sequences(selection.size)
    made = Plan(corpus.fingerprint, corpus.sequences, selection, shard_sequences, run.config.seed)
    run.store.write("shards.parquet", to_parquet(made.shards_table(), {"corpus": corpus.fingerprint}))
    attention = settings.attention.value
    value = sealed(made.to_json() | {"inputs": run.inputs(), "attention": attention})
    run.store.create(PLAN, json.dumps(value, indent=2).encode() + b"\n")
    found = run.store.read_json(PLAN)
    if not is_intact(found):
        raise RunError(f"{run.store.uri}/{PLAN} is not what was written; restore it, or give another output=...")
    wanted = {"corpus": corpus.fingerprint, "attention": attention, **run.inputs()}
    planned = {"corpus": found["corpus_fingerprint"], "attention": found["attention"], **found["inputs"]}
    changed = sorted(key for key in wanted if wanted[key] != planned.get(key))
    if changed:
        raise RunError(
            f"{run.store.uri} was planned with another {', '.join(changed)}: the content differs, whatever the path. "
            "Put back what it was planned with, or give another output=..."
        )
    plan = Plan.from_json(found, corpus.chosen)
    preflight.check_disk_for_scan(run, plan, corpus)
    run.memory = preflight.say_memory(run, corpus.sequence_length)
    return plan


def query_batch(run: Run, factors: Factors) -> BroadcastQueries:
    """Gradients, inverse and compression of all queries; stored in <output>/queries, then broadcast."""
    config = run.config
    key = fingerprint(
        {
            **run.inputs(),
            "factors": factors.fingerprint,
            "inverse": factors.inverse.fingerprint,
            "rank": config.scan.rank,
            "energy": config.scan.energy if config.scan.rank == "auto" else None,
            "compression": config.scan.compression,
            "query_dtype": str(run.query_dtype),
        }
    )
    groups, layer_groups = query_groups(len(run.queries), run.architecture.layers, config.scan.query_group_bytes)
    names = [
        [f"queries/batch-{q:04d}-layers-{g:02d}.safetensors" for g in range(len(layer_groups))]
        for q in range(len(groups))
    ]
    cells = [(q, g) for q in range(len(groups)) for g in range(len(layer_groups))]
    left = [cell for cell in cells if not _made(run, names[cell[0]][cell[1]], key)]
    run.store.write(MEASURED, measured_jsonl(run.queries))
    if left:
        with run.telemetry.phase("queries", len(left), "groups") as phase:

            def task(unit: int) -> QueryTask:
                q, g = left[unit]
                return QueryTask(
                    store=run.store,
                    name=names[q][g],
                    queries=tuple(run.queries[index] for index in groups[q]),
                    layers=layer_groups[g],
                    inverse=factors.inverse,
                    rank=config.most_rank,
                    compression=config.scan.compression,
                    fingerprint=key,
                )

            def on_done(unit: int, tokens: int) -> None:
                phase.advance(sequences=len(groups[left[unit][0]]), tokens=tokens)

            run.pool.run(range(len(left)), query_task, task, on_done)
    stored, layers, auto = read_query_batch(run.store, names), run.architecture.layers, config.scan.rank == "auto"
    plan = plan_layouts(
        stored.spectra,
        layers,
        run.architecture.sequence_length(config.corpus.sequence_length),
        config.scan.query_group_bytes // run.query_dtype.itemsize,
        config.scan.energy if auto else None,
        share=auto,
    )
    batch = lay_out(stored.batch, plan)
    if plan.candidates:
        bases = _shared_bases(run, factors, batch, plan, query_weights(stored.spectra, layers), key)
        plan = plan.with_bases({name: found.basis for name, found in bases.items()})
        batch = lay_out({**batch, **bases}, plan)
    _warn_over_budget(run, plan)
    counted = Counter(plan.ways.values())
    layouts = {name: counted[way] for way, name in _PUBLISHED.items()}
    # Its arrays are numpy's, not tensors: Ray hands them to every rank of a node without a copy.
    return BroadcastQueries(key, ray.put(batch), layouts)


def _shared_bases(
    run: Run, factors: Factors, batch: QueryBatch, plan: LayoutPlan, weights: np.ndarray, key: str
) -> dict[str, SharedBasis[Array]]:
    """A shared basis for every candidate of the plan where that is cheaper; found once, then read back."""
    names = [
        (layer, f"queries/joint-{number:04d}.safetensors")
        for number, layer in enumerate(plan.layers)
        if layer.name in plan.candidates
    ]
    left = [(layer, name) for layer, name in names if not _made(run, name, key)]
    if left:
        with run.telemetry.phase("joint", len(left), "layers") as phase:

            def task(unit: int) -> SharedBasisTask:
                layer, name = left[unit]
                return SharedBasisTask(
                    store=run.store,
                    name=name,
                    layer=layer,
                    inverse=factors.inverse,
                    compression=run.config.scan.compression,
                    weights=weights,
                    energy=run.config.scan.energy,
                    tokens=plan.tokens,
                    entries=plan.candidates[layer.name],
                    fingerprint=key,
                )

            shared = ray.put(batch)
            run.pool.run(range(len(left)), shared_basis_task, task, lambda unit, basis: phase.advance(), shared)
    return read_shared_bases(run.store, names)


def _warn_over_budget(run: Run, plan: LayoutPlan) -> None:
    if plan.over_budget:
        itemsize = run.query_dtype.itemsize
        needed = len(run.queries) * sum(layer.size for layer in plan.layers) * itemsize
        halved = "" if itemsize <= 2 else ", or scan.query_dtype=bfloat16, which halves them"
        run.telemetry.warn(
            f"{len(plan.over_budget)} layers are scored by their queries' columns, {plan.times:.1f} times the products "
            f"that matrices would take: those have no room in scan.query_group_bytes="
            f"{run.config.scan.query_group_bytes}; give up to {needed} of a rank's memory{halved}."
        )


def _made(run: Run, name: str, key: str) -> bool:
    """Whether a file of the query batch is there, of this key and whole; a damaged one is made again."""
    if not run.store.exists(name):
        return False
    try:
        if read_facts(run.store, name).get("fingerprint") != key:
            return False
        read_tensors(run.store, name)
    except DamagedError as error:
        run.telemetry.warn(f"{error} It is computed again now.")
        return False
    return True


def scan(run: Run, plan: Plan, corpus: AddressableCorpus, batch: BroadcastQueries) -> Scanned:
    """Scan every shard whose file is not there yet; thresholds come from the files that are.

    Raises:
        RunError: where more sequences than scan.max_nonfinite allows have scores that are NaN or infinite.
    """
    run.store.remove(SUCCESS)
    standings = Standings(len(run.queries), run.config.sides, run.config.candidates)
    # Sums alone are kept of what is done: a scan may have a million shards.
    counts = ScanCounts()
    for entry in run.store.list(QUARANTINE):
        run.store.remove(entry.name)
    done = _finished(run, plan)
    for number, found in _read_finished(run, np.flatnonzero(done)):
        if isinstance(found, DamagedError):
            run.telemetry.warn(f"{found} It is scanned again now.")
            run.store.remove(shard_path(shard_name(number)))
            done[number] = False
        else:
            standings.add(found[0])
            counts.add(found[1])
    order = plan.order()
    left: list[int] = order[~done[order]].tolist()
    quarantined: dict[int, str] = {}
    attention = run.config.corpus.attention
    run_fingerprint = fingerprint({"plan": plan.to_json(), "queries": batch.fingerprint, "attention": attention})

    def task(number: int) -> ScanTask:
        return ScanTask(
            run=run.store,
            corpus=corpus.store,
            shard=shard_name(number),
            sequence_ids=plan.ids(number),
            query_ids=run.query_ids,
            query_batch=batch.fingerprint,
            sides=run.config.sides,
            candidates=run.config.candidates,
            thresholds=standings.thresholds,
            tokens_per_batch=run.config.scan.tokens_per_batch,
            dense=run.config.scan.scores.value == "all",
            fingerprint=run_fingerprint,
            attention=attention,
            query_dtype=run.config.scan.query_dtype,
        )

    def on_given_up(number: int, reason: str) -> None:
        name, ids = shard_name(number), plan.ids(number)
        if run.store.exists(shard_path(name)):
            # An attempt that was taken for lost finished after all, or another driver did: the file is what counts.
            hits, shard_counts = read_hits(run.store, name, run.query_ids)
            standings.add(hits)
            counts.add(shard_counts)
            return
        quarantined[number] = reason = redact(reason)
        note = {"shard": name, "first_sequence_id": int(ids[0]), "last_sequence_id": int(ids[-1]), "reason": reason}
        run.store.write_json(f"{QUARANTINE}/{name}.json", note)
        run.telemetry.warn(f"{name} is quarantined: {reason}")

    run.watch.already = plan.num_shards - len(left)
    if left:
        with run.telemetry.phase("scan", len(left), "shards") as phase:

            def on_done(number: int, result: tuple[Hits, ShardCounts]) -> None:
                hits, shard_counts = result
                standings.add(hits)
                counts.add(shard_counts)
                phase.advance(sequences=shard_counts.sequences, tokens=shard_counts.tokens)
                _check_nonfinite(run, plan, counts)

            run.pool.run(left, scan_task, task, on_done, batch.batch, on_given_up=on_given_up)
            run.pool.forget()
    _check_nonfinite(run, plan, counts)
    return Scanned(standings.best(), counts, quarantined)


def _finished(run: Run, plan: Plan) -> NDArray[np.bool_]:
    """Of every shard, whether its file is there."""
    there = finished_shards(run.store)
    return np.fromiter((shard_name(number) in there for number in range(plan.num_shards)), np.bool_, plan.num_shards)


def _read_finished(
    run: Run, numbers: NDArray[np.intp]
) -> Iterator[tuple[int, tuple[Hits, ShardCounts] | DamagedError]]:
    """What each of these shards' files says, or that it is damaged."""

    def read(number: int) -> tuple[int, tuple[Hits, ShardCounts] | DamagedError]:
        try:
            return number, read_hits(run.store, shard_name(number), run.query_ids)
        except DamagedError as error:
            return number, error

    return ahead(run.store, read, map(int, numbers))


def _check_nonfinite(run: Run, plan: Plan, counts: ScanCounts) -> None:
    if counts.nonfinite > run.config.scan.max_nonfinite * plan.selection.size:
        raise RunError(
            f"{counts.nonfinite} sequences have scores that are NaN or infinite, more than scan.max_nonfinite="
            f"{run.config.scan.max_nonfinite} of {plan.selection.size}; use model.dtype=float32, or raise the limit."
        )


def by_shard(plan: Plan, sequence_ids: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Sequence_ids, ascending and each once, grouped by the shard whose file holds them, in plan order."""
    ordered = np.unique(sequence_ids)
    shards, starts = np.unique(plan.selection.positions(ordered) // plan.shard_sequences, return_index=True)
    for number, mine in zip(shards, np.split(ordered, starts)[1:], strict=True):
        yield shard_name(int(number)), mine


def refine(run: Run, plan: Plan, scanned: Scanned, factors: Factors) -> Refined:
    """Re-score the best C rows of every query and side with full-rank query gradients, from tokens in shard files, the
    model in scan.refine_dtype."""
    best = scanned.best
    groups, layer_groups = query_groups(len(run.queries), run.architecture.layers, run.config.scan.query_group_bytes)
    units = refine_units(best, groups, _SEQUENCES_PER_UNIT, _PAIRS_PER_UNIT)
    # The files of other candidates, or of the same ones cut otherwise, lie elsewhere.
    cut = sha256(b"".join(array.tobytes() for unit in units for array in (unit.sequence_ids, unit.queries)))
    sizes = [(unit.group, len(unit.queries)) for unit in units]
    digest = fingerprint([cut.hexdigest(), sizes, factors.fingerprint, factors.inverse.fingerprint, run.refine_dtype])
    paths: list[list[list[str]]] = [[[] for _ in layer_groups] for _ in groups]
    work: list[tuple[int, int, str]] = []
    for number, unit in enumerate(units):
        for layers in range(len(layer_groups)):
            path = unit_path(digest, number * len(layer_groups) + layers)
            paths[unit.group][layers].append(path)
            work.append((number, layers, path))
    there = set(run.store.names(f"refined/{digest[:16]}"))
    left = [item for item in work if item[2] not in there]

    def task(index: int) -> RefineTask:
        number, layers, path = left[index]
        unit = units[number]
        return RefineTask(
            run=run.store,
            path=path,
            group=f"{unit.group}/{layers}/{digest}",
            queries=tuple(run.queries[query] for query in groups[unit.group]),
            layers=layer_groups[layers],
            inverse=factors.inverse,
            shards=tuple(by_shard(plan, unit.sequence_ids)),
            wanted=unit.wanted,
            tokens_per_batch=run.config.scan.tokens_per_batch,
        )

    if left:
        run.hold_model_in(run.config.refine_dtype)
        with run.telemetry.phase("refine", len(left), "units") as phase:

            def on_done(index: int, tokens: int) -> None:
                phase.advance(sequences=len(np.unique(units[left[index][0]].sequence_ids)), tokens=tokens)

            run.pool.run(range(len(left)), refine_task, task, on_done)
    return Refined(groups, paths)
