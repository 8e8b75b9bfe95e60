"""Score the best candidates again with full-rank query gradients, by layer and by token (docs/method.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.config import fingerprint
from infscan.corpus.plan import Plan
from infscan.corpus.sequences import Sequence
from infscan.engine.executor import Step
from infscan.errors import DamagedError
from infscan.influence.layers import Layer
from infscan.influence.precision import Multiply, multiplying
from infscan.influence.routed import Routed
from infscan.influence.score import score_routed_tokens, score_tokens
from infscan.influence.topk_tracker import ScoredRows
from infscan.model.worker import LayerConsumer, ModelWorker
from infscan.queries import Query
from infscan.results.refined import unit_folder, unit_path, write_unit
from infscan.results.schema import read_parquet
from infscan.results.shard_file import GIVEN, read_candidates
from infscan.steps.factors import Factors
from infscan.steps.preconditioner import Preconditioner, preconditioned, query_groups
from infscan.steps.run import Run
from infscan.steps.scan import Scanned
from infscan.storage import Store
from infscan.storage.prefetch import prefetch

# A unit is one worker's: it has so many sequences that a small run's work is shared, and no more than the last.
_FEWEST_PER_UNIT, _UNITS_OF_A_SMALL_RUN, _MOST_PER_UNIT = 32, 64, 256
# A unit's token scores, 4 bytes each, are in memory at once, on a rank and where they are published: 32 MiB at T = 512.
_PAIRS_PER_UNIT = 1 << 14


@dataclass(frozen=True)
class Refined:
    """Where the refined units are stored: for each query group, its units by layer group."""

    groups: list[range]
    paths: list[list[list[str]]]


def refine(run: Run, plan: Plan, scanned: Scanned, factors: Factors) -> Refined:
    """Re-score the best C rows of every query and side with full-rank query gradients, from tokens in shard files, the
    model in scan.refine_dtype."""
    inputs, config = run.inputs, run.config
    groups, layer_groups = query_groups(len(run.queries), inputs.layers, config.refine_group_bytes)
    T = run.architecture.sequence_length(config.corpus.sequence_length)
    size = sequences_per_unit(len(np.unique(scanned.best.sequence_ids)), config.tokens_per_batch // T)
    units = refine_units(scanned.best, groups, size, _PAIRS_PER_UNIT)
    # The files of other candidates, or of the same ones cut otherwise, are elsewhere.
    cut = sha256(b"".join(array.tobytes() for unit in units for array in (unit.sequence_ids, unit.queries)))
    sizes = [(unit.group, len(unit.queries)) for unit in units]
    digest = fingerprint(
        [cut.hexdigest(), sizes, factors.fingerprint, factors.inverse.fingerprint, inputs.refine_dtype]
    )
    cells = [(number, layers) for number in range(len(units)) for layers in range(len(layer_groups))]
    path_of = {cell: unit_path(digest, cell[0] * len(layer_groups) + cell[1]) for cell in cells}
    paths: list[list[list[str]]] = [[[] for _ in layer_groups] for _ in groups]
    for number, layers in cells:
        paths[units[number].group][layers].append(path_of[number, layers])
    there = whole_units(run, digest)
    gradients = full_rank_key(run, factors, config.refine_group_bytes)

    def task(cell: tuple[int, int]) -> RefineTask:
        unit = units[cell[0]]
        return RefineTask(
            run=run.store,
            path=path_of[cell],
            group=f"{gradients}/{unit.group}/{cell[1]}",
            queries=tuple(run.queries[query] for query in groups[unit.group]),
            layers=layer_groups[cell[1]],
            inverse=factors.inverse,
            shards=tuple(plan.by_shard(unit.sequence_ids)),
            wanted=unit.wanted,
            tokens_per_batch=config.tokens_per_batch,
            fingerprint=scanned.fingerprint,
        )

    score_again(run, "refine", cells, units, task, lambda cell: path_of[cell] in there)
    return Refined(groups, paths)


def sequences_per_unit(candidates: int, per_batch: int) -> int:
    """How many sequences a unit has at most, by the candidates alone: the same units whatever the workers.

    per_batch: sequences of a micro-batch; a unit has whole ones, where it has room for one.
    """
    wanted = max(_FEWEST_PER_UNIT, -(-candidates // _UNITS_OF_A_SMALL_RUN))
    per_batch = max(1, per_batch)
    return min(_MOST_PER_UNIT, per_batch * -(-wanted // per_batch))


def full_rank_key(run: Run, factors: Factors, group_bytes: int) -> str:
    """What the full-rank gradients of the run's queries follow from, in groups of so many bytes: a rank keeps them from
    one step to the next."""
    inputs = run.inputs
    known = [inputs.fingerprints(), factors.fingerprint, factors.inverse.fingerprint, inputs.refine_dtype]
    return fingerprint([*known, group_bytes])


Cell = TypeVar("Cell", bound=tuple[int, ...])


def score_again(
    run: Run,
    name: str,
    cells: Sequences[Cell],
    units: Sequences[RefineUnit],
    task: Callable[[Cell], RefineTask],
    is_done: Callable[[Cell], bool],
) -> None:
    """Run the cells that are not done, the model in scan.refine_dtype. A cell is (place in `units`, layer group, ...):
    those that take the same full-rank gradients follow each other, since a rank keeps the last ones.
    """
    step = Step(
        name=name,
        unit_name="units",
        units=sorted(cells, key=lambda cell: (units[cell[0]].group, cell[1], cell)),
        function=refine_task,
        task=task,
        is_done=is_done,
        progress=lambda cell, tokens: (len(np.unique(units[cell[0]].sequence_ids)), tokens),
    )
    if not all(map(step.is_done, cells)):
        run.hold_model_in(run.config.refine_dtype)
        run.executor.run(step)


def whole_units(run: Run, digest: str) -> set[str]:
    """The units of these candidates that hold what was written; a damaged one is made again."""
    whole = set()
    for name, trouble in prefetch(run.store, partial(_trouble, run.store), run.store.names(unit_folder(digest))):
        if trouble is None:
            whole.add(name)
        else:
            run.telemetry.warn(f"{trouble} It is computed again now.")
    return whole


def _trouble(store: Store, name: str) -> tuple[str, DamagedError | None]:
    try:
        read_parquet(store, name)
    except DamagedError as error:
        return name, error
    return name, None


@dataclass(frozen=True)
class Context:
    """Tokens that are put before a sequence, and take no part in its loss.

    separators: which the sequence loses where it begins with one. longest: that both may be together; a longer context
    loses its first tokens.
    """

    tokens: tuple[int, ...]
    separators: tuple[int, ...]
    longest: int

    def before(self, sequence: Sequence) -> Sequence:
        """The sequence after this context."""
        skip = int(len(sequence) > 1 and int(sequence.token_ids[0]) in self.separators)
        room = max(0, self.longest - (len(sequence) - skip))
        tokens = np.asarray(self.tokens[-room:] if room else (), np.int64)
        own = np.ones(len(sequence), np.bool_) if sequence.loss is None else sequence.loss
        shift = len(tokens) - skip
        starts = None if sequence.starts is None else np.concatenate([[0], sequence.starts[1:] + shift])
        return replace(
            sequence,
            token_ids=np.concatenate([tokens, sequence.token_ids[skip:]]),
            loss=np.concatenate([np.zeros(len(tokens), np.bool_), own[skip:]]),
            starts=starts,
        )


@dataclass(frozen=True)
class RefineTask:
    """Some candidates of a group of queries, for a group of layers.

    shards: shard names with the sequence_ids to take from each (their tokens lie in the shard's file).
    wanted: sequence_id -> indices into `queries`. group: by which a rank keeps its gradients.
    """

    run: Store
    path: str
    group: str
    queries: tuple[Query, ...]
    layers: tuple[Layer, ...]
    inverse: Preconditioner
    shards: tuple[tuple[str, np.ndarray], ...]
    wanted: dict[int, tuple[int, ...]]
    tokens_per_batch: int
    # That the shards' footers must have; None where any will do.
    fingerprint: str | None = None
    # What is put before every sequence in place of what it begins with; None leaves it as it is.
    before: Context | None = None


@multiplying("exact")
def refine_task(worker: ModelWorker, task: RefineTask) -> int | None:
    """score_t(q, z) = sum over layers of s_t^T P_q a_t for every wanted pair, written by rank 0, which returns the
    tokens."""
    P = worker.cached("full-rank", task.group, lambda: preconditioned(worker, task.queries, task.layers, task.inverse))
    sequences = stored_candidates(task.run, task.shards, task.fingerprint)
    if task.before is not None:
        sequences = [task.before.before(sequence) for sequence in sequences]
    wanted = [task.wanted[sequence.sequence_id] for sequence in sequences]
    n, longest = sum(map(len, wanted)), max(len(sequence) for sequence in sequences)
    layer_scores = torch.zeros(n, len(task.layers), dtype=worker.wide, device=worker.device)
    token_scores = torch.zeros(n, longest, dtype=worker.wide, device=worker.device)
    column = {layer.name: index for index, layer in enumerate(task.layers)}

    def keep(layer: Layer, pairs_n: Tensor, scores_nt: Tensor) -> None:
        token_scores[pairs_n, : scores_nt.shape[1]] += scores_nt
        layer_scores[pairs_n, column[layer.name]] = scores_nt.sum(dim=1)

    score_pairs(worker, sequences, wanted, task.layers, P, task.tokens_per_batch, keep, task.inverse.matmul)
    layer_scores, token_scores = worker.reduce(layer_scores), worker.reduce(token_scores)
    if not worker.leads:
        return None
    by_layer, by_token = layer_scores.float().cpu().numpy(), token_scores.float().cpu().numpy()

    def write() -> int:
        write_pairs(task, sequences, by_layer, by_token)
        return sum(len(sequence) for sequence in sequences)

    return worker.later(write)


def write_pairs(
    task: RefineTask, sequences: Sequences[Sequence], by_layer: NDArray[np.float32], by_token: NDArray[np.float32]
) -> None:
    """Write a unit. by_layer [n, layers], by_token [n, T of the longest]: of every wanted pair (`pairs_of`)."""
    pairs = pairs_of([task.wanted[sequence.sequence_id] for sequence in sequences])
    write_unit(
        task.run,
        task.path,
        [(task.queries[query].id, sequences[row].sequence_id) for row, query in pairs],
        by_layer,
        [by_token[index, : len(sequences[row])] for index, (row, _) in enumerate(pairs)],
        [layer.name for layer in task.layers],
    )


# keep(layer, pairs_n, scores_nt): of some pairs (their numbers in `pairs_of`), a layer's scores by input position.
Keep = Callable[[Layer, Tensor, Tensor], None]


def pairs_of(wanted: Sequences[Sequences[int]]) -> list[tuple[int, int]]:
    """(row, query) of every pair, in order. wanted: by row, the queries that it is scored against."""
    return [(row, query) for row, queries in enumerate(wanted) for query in queries]


def score_pairs(
    worker: ModelWorker,
    sequences: Sequences[Sequence],
    wanted: Sequences[Sequences[int]],
    layers: Sequences[Layer],
    P: Mapping[str, Tensor],
    tokens_per_batch: int,
    keep: Keep,
    matmul: Multiply = "exact",
) -> None:
    """s_t^T P_q a_t of every wanted pair, layer by layer, handed to `keep` once for each layer and pair.

    P: [Q, O, I] by layer, full rank. scores_nt: [n, T of the micro-batch], float32 or wider, zero on padding; each rank
    of a group keeps its own micro-batches' pairs. An expert that no token of a micro-batch goes to is not handed over.
    """
    first = np.cumsum([0, *map(len, wanted)]).tolist()
    for batch in worker.batches(sequences, tokens_per_batch):
        by_query: dict[int, list[tuple[int, int]]] = {}
        for place, row in enumerate(batch.rows.tolist()):
            for offset, query in enumerate(wanted[row]):
                by_query.setdefault(query, []).append((place, first[row] + offset))
        index = {query: worker.to_device(np.asarray(found, np.int64).T.copy()) for query, found in by_query.items()}
        worker.backward(batch, layers, batch.loss(), pair_scoring(index, P, keep, matmul), ones=False)


def pair_scoring(
    index: Mapping[int, Tensor], P: Mapping[str, Tensor], keep: Keep, matmul: Multiply = "exact"
) -> LayerConsumer:
    """Scores a micro-batch's pairs, layer by layer. index: by query, int64 [2, n]: rows of the batch, and pairs."""

    def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None) -> None:
        with multiplying(matmul):
            for query, (places, pairs_n) in index.items():
                P_oi = P[layer.name][query]
                if routed is None:
                    keep(layer, pairs_n, score_tokens(s[places], a[places], P_oi))
                else:
                    keep(layer, pairs_n, score_routed_tokens(s, a, P_oi, routed, places))

    return consume


def stored_candidates(store: Store, shards: Sequences[tuple[str, np.ndarray]], scan: str | None) -> list[Sequence]:
    """Sequences by sequence_id, from the shard files: the corpus is not read again. shards, and scan: its
    fingerprint: as of `RefineTask`."""
    found: list[Sequence] = []
    for name, sequence_ids in shards:
        kept = read_candidates(store, name, sequence_ids, columns=GIVEN, fingerprint=scan)
        for row in kept.to_pylist():
            mask, starts = row["loss_mask"], row["document_starts"]
            found.append(
                Sequence(
                    sequence_id=row["sequence_id"],
                    token_ids=np.asarray(row["token_ids"], np.int64),
                    documents=(),
                    byte_offset=0,
                    path="",
                    loss=None if mask is None else np.asarray(mask, np.bool_),
                    starts=None if starts is None else np.asarray(starts, np.int64),
                )
            )
    assert len(found) == sum(len(ids) for _, ids in shards), "a candidate is missing from its shard's file"
    return sorted(found, key=lambda sequence: sequence.sequence_id)


@dataclass(frozen=True)
class RefineUnit:
    """Candidates of one query group, by sequence_id and query, as columns of one length.

    sequence_ids: int64. queries: int32, indices within the group.
    """

    group: int
    sequence_ids: NDArray[np.int64]
    queries: NDArray[np.int32]

    @property
    def wanted(self) -> dict[int, tuple[int, ...]]:
        """As RefineTask has it."""
        found: dict[int, list[int]] = {}
        for sequence_id, query in zip(self.sequence_ids.tolist(), self.queries.tolist(), strict=True):
            found.setdefault(sequence_id, []).append(query)
        return {sequence_id: tuple(queries) for sequence_id, queries in found.items()}


def refine_units(
    candidates: ScoredRows, query_groups: Sequences[range], most_sequences: int, most_pairs: int
) -> list[RefineUnit]:
    """Cut candidates into units, each of one query group and of so many sequences and pairs at most.

    A sequence's pairs stay together: one alone may have more of them. It depends on the candidates alone, so that
    micro-batches do too.
    """
    units: list[RefineUnit] = []
    group_of = np.searchsorted([group.stop for group in query_groups], candidates.queries, side="right")
    order = np.lexsort((candidates.queries, candidates.sequence_ids, group_of))
    ends = np.searchsorted(group_of[order], np.arange(len(query_groups)), side="right")
    for number, (group, mine) in enumerate(zip(query_groups, np.split(order, ends)[:-1], strict=True)):
        sequence_ids, local = candidates.sequence_ids[mine], candidates.queries[mine] - np.int32(group.start)
        # Of every sequence, where its pairs begin; and where the last one's end.
        starts = [*np.flatnonzero(np.diff(sequence_ids, prepend=-1)).tolist(), len(mine)]
        first = 0
        while first + 1 < len(starts):
            last = min(first + most_sequences, len(starts) - 1)
            while last > first + 1 and starts[last] - starts[first] > most_pairs:
                last -= 1
            stretch = slice(starts[first], starts[last])
            units.append(RefineUnit(number, sequence_ids[stretch], local[stretch]))
            first = last
    return units
