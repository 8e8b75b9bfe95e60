"""Query batch, scan and refine on the worker groups. Each finds in storage what an earlier process finished."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import ray
from numpy.typing import NDArray

from infscan.config import fingerprint, is_intact, sealed
from infscan.corpus.addressable import AddressableCorpus
from infscan.corpus.plan import Plan, Selection, default_shard_sequences
from infscan.errors import DamagedError, RunError
from infscan.influence.standings import Hits, Standings
from infscan.passes.factor_store import read_facts, read_tensors
from infscan.passes.joint import JointTask, joint_task, with_joint, worthwhile
from infscan.passes.queries import QueryTask, query_groups, query_task
from infscan.passes.query_batch import (
    allotted,
    layout,
    multiplied_out,
    query_weights,
    read_query_batch,
)
from infscan.passes.refine import RefineTask, refine_task, refine_units
from infscan.passes.scan import ScanTask, scan_task
from infscan.results.publish import SUCCESS
from infscan.results.refined import unit_path
from infscan.results.schema import to_parquet
from infscan.results.shard_file import QUARANTINE, ShardCounts, finished_shards, read_hits, shard_path
from infscan.runtime import preflight
from infscan.runtime.fit import Factors
from infscan.runtime.run import Run
from infscan.secrets import redact

PLAN = "plan.json"
_SEQUENCES_PER_UNIT = 256


@dataclass(frozen=True)
class QueryBatch:
    """All queries' compressed gradients: their files, and the broadcast copy that every rank reads.

    layouts: how many layers are scored in which way (`infscan.influence.score`): low, full, joint.
    """

    fingerprint: str
    arrays: ray.ObjectRef
    layouts: dict[str, int]


@dataclass(frozen=True)
class Scanned:
    """What the scan left: the C best rows per query and side, and what each finished shard counted."""

    best: Hits
    counts: dict[str, ShardCounts]
    quarantined: dict[str, str]


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


def query_batch(run: Run, factors: Factors) -> QueryBatch:
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
        }
    )
    groups, layer_groups = query_groups(len(run.queries), run.architecture.layers, config.scan.query_group_bytes)
    names = [
        [f"queries/batch-{q:04d}-layers-{g:02d}.safetensors" for g in range(len(layer_groups))]
        for q in range(len(groups))
    ]
    cells = [(q, g) for q in range(len(groups)) for g in range(len(layer_groups))]
    left = [cell for cell in cells if not _made(run, names[cell[0]][cell[1]], key)]
    run.store.write("queries/queries.jsonl", _queries_jsonl(run))
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
    arrays, layers = read_query_batch(run.store, names), run.architecture.layers
    tokens = run.architecture.sequence_length(config.corpus.sequence_length)
    if config.scan.rank == "auto":
        weights = query_weights(arrays, layers)
        arrays = _with_joint_bases(run, factors, allotted(arrays, layers, config.scan.energy), weights, tokens, key)
    arrays = multiplied_out(arrays, layers, tokens, config.scan.query_group_bytes)
    counted = Counter(layout(arrays, layer) for layer in layers)
    layouts = {way: counted[way] for way in ("low", "full", "joint")}
    # numpy arrays, not tensors: Ray hands them to every rank of a node without a copy.
    return QueryBatch(key, ray.put(arrays), layouts)


def _with_joint_bases(
    run: Run, factors: Factors, arrays: dict[str, np.ndarray], weights: np.ndarray, tokens: int, key: str
) -> dict[str, np.ndarray]:
    """The query batch with a joint basis pair in every layer where that is cheaper; found once, then read back."""
    names = [
        (layer, f"queries/joint-{number:04d}.safetensors")
        for number, layer in enumerate(run.architecture.layers)
        if worthwhile(arrays, layer, tokens)
    ]
    left = [(layer, name) for layer, name in names if not _made(run, name, key)]
    if left:
        with run.telemetry.phase("joint", len(left), "layers") as phase:

            def task(unit: int) -> JointTask:
                layer, name = left[unit]
                return JointTask(
                    store=run.store,
                    name=name,
                    layer=layer,
                    inverse=factors.inverse,
                    compression=run.config.scan.compression,
                    weights=weights,
                    kept=run.config.scan.energy,
                    tokens=tokens,
                    fingerprint=key,
                )

            shared = ray.put(arrays)
            run.pool.run(range(len(left)), joint_task, task, lambda unit, shape: phase.advance(), shared)
    return with_joint(arrays, run.store, names)


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


def _queries_jsonl(run: Run) -> bytes:
    rows = [
        {
            "id": query.id,
            "measure": query.measure,
            "prompt": query.prompt,
            "completion": query.completion,
            "parts": [
                {"input_ids": part.token_ids, "positions": part.positions, "sign": part.sign} for part in query.parts
            ],
        }
        for query in run.queries
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def scan(run: Run, plan: Plan, corpus: AddressableCorpus, batch: QueryBatch) -> Scanned:
    """Scan every shard whose file is not there yet; thresholds come from the files that are.

    Raises:
        RunError: where more sequences than scan.max_nonfinite allows have scores that are NaN or infinite.
    """
    run.store.remove(SUCCESS)
    standings = Standings(len(run.queries), run.config.sides, run.config.candidates)
    counts: dict[str, ShardCounts] = {}
    done = finished_shards(run.store)
    for entry in run.store.list(QUARANTINE):
        run.store.remove(entry.name)
    names = [plan.shard(number).name for number in range(plan.num_shards)]
    for name in sorted(done & set(names)):
        try:
            hits, counts[name] = read_hits(run.store, name, run.query_ids)
        except DamagedError as error:
            run.telemetry.warn(f"{error} It is scanned again now.")
            run.store.remove(shard_path(name))
            done.remove(name)
        else:
            standings.add(hits)
    left = [int(number) for number in plan.order() if names[int(number)] not in done]
    quarantined: dict[str, str] = {}
    attention = run.config.corpus.attention
    run_fingerprint = fingerprint({"plan": plan.to_json(), "queries": batch.fingerprint, "attention": attention})

    def task(number: int) -> ScanTask:
        return ScanTask(
            run=run.store,
            corpus=corpus.store,
            shard=names[number],
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
        )

    def on_given_up(number: int, reason: str) -> None:
        name, ids = names[number], plan.ids(number)
        if run.store.exists(shard_path(name)):
            # An attempt that was taken for lost finished after all, or another driver did: the file is what counts.
            hits, counts[name] = read_hits(run.store, name, run.query_ids)
            standings.add(hits)
            return
        quarantined[name] = reason = redact(reason)
        note = {"shard": name, "first_sequence_id": int(ids[0]), "last_sequence_id": int(ids[-1]), "reason": reason}
        run.store.write_json(f"{QUARANTINE}/{name}.json", note)
        run.telemetry.warn(f"{name} is quarantined: {reason}")

    run.watch.already = plan.num_shards - len(left)
    if left:
        with run.telemetry.phase("scan", len(left), "shards") as phase:

            def on_done(number: int, result: tuple[Hits, ShardCounts]) -> None:
                hits, shard_counts = result
                standings.add(hits)
                counts[names[number]] = shard_counts
                phase.advance(sequences=shard_counts.sequences, tokens=shard_counts.tokens)
                _check_nonfinite(run, plan, counts)

            run.pool.run(left, scan_task, task, on_done, batch.arrays, on_given_up=on_given_up)
            run.pool.forget()
    _check_nonfinite(run, plan, counts)
    return Scanned(standings.best(), counts, quarantined)


def _check_nonfinite(run: Run, plan: Plan, counts: dict[str, ShardCounts]) -> None:
    nonfinite = sum(shard.nonfinite for shard in counts.values())
    if nonfinite > run.config.scan.max_nonfinite * plan.selection.size:
        raise RunError(
            f"{nonfinite} sequences have scores that are NaN or infinite, more than scan.max_nonfinite="
            f"{run.config.scan.max_nonfinite} of {plan.selection.size}; use model.dtype=float32, or raise the limit."
        )


def by_shard(plan: Plan, sequence_ids: NDArray[np.int64]) -> list[tuple[str, NDArray[np.int64]]]:
    """Sequence_ids grouped by the shard whose file holds them, in plan order."""
    ordered = np.unique(sequence_ids)
    shards = plan.selection.positions(ordered) // plan.shard_sequences
    return [(plan.shard(int(number)).name, ordered[shards == number]) for number in np.unique(shards)]


def refine(run: Run, plan: Plan, scanned: Scanned, factors: Factors) -> Refined:
    """Re-score the best C rows of every query and side with full-rank query gradients, from tokens in shard files."""
    best = scanned.best
    groups, layer_groups = query_groups(len(run.queries), run.architecture.layers, run.config.scan.query_group_bytes)
    pairs = list(zip(best.queries.tolist(), best.sequence_ids.tolist(), strict=True))
    digest = fingerprint([sorted(pairs), factors.fingerprint, factors.inverse.fingerprint])
    units = refine_units(pairs, groups, _SEQUENCES_PER_UNIT)
    paths: list[list[list[str]]] = [[[] for _ in layer_groups] for _ in groups]
    work: list[tuple[int, int, str]] = []
    for number, (group, _) in enumerate(units):
        for layers in range(len(layer_groups)):
            path = unit_path(digest, number * len(layer_groups) + layers)
            paths[group][layers].append(path)
            work.append((number, layers, path))
    there = {entry.name for entry in run.store.list(f"refined/{digest[:16]}")}
    left = [item for item in work if item[2] not in there]

    def task(unit: int) -> RefineTask:
        number, layers, path = left[unit]
        group, wanted = units[number]
        return RefineTask(
            run=run.store,
            path=path,
            group=f"{group}/{layers}/{digest}",
            queries=tuple(run.queries[index] for index in groups[group]),
            layers=layer_groups[layers],
            inverse=factors.inverse,
            shards=tuple(by_shard(plan, np.asarray(sorted(wanted), np.int64))),
            wanted=wanted,
            tokens_per_batch=run.config.scan.tokens_per_batch,
        )

    if left:
        with run.telemetry.phase("refine", len(left), "units") as phase:

            def on_done(unit: int, tokens: int) -> None:
                phase.advance(sequences=len(units[left[unit][0]][1]), tokens=tokens)

            run.pool.run(range(len(left)), refine_task, task, on_done)
    return Refined(groups, paths)
