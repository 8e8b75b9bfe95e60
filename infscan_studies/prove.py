"""Do published rows do what their scores say? Train a copy of the model on each, and on controls (`truth.steps`).

Every row and control is trained on alone, from the run's own model; the completion's log-probability is taken before
and after. Nothing is written to the model's folder: each worker puts its weights back.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infscan.config import Dtype, Sides
from infscan.corpus.addressable import AddressableCorpus, CorpusAddress
from infscan.corpus.plan import Selection
from infscan.engine.executor import Step
from infscan.errors import ConfigError
from infscan.influence.agreement import INTERVAL, spearman
from infscan.model.worker import ModelWorker
from infscan.queries import Query, choose
from infscan.results.read import read_top
from infscan.steps.prepare import prepare_corpus
from infscan.steps.run import Run
from infscan_studies.config import ProveJob, StepOptimizer
from infscan_studies.truth.bm25 import bm25_scores
from infscan_studies.truth.retrain import measure_queries
from infscan_studies.truth.steps import After, effects, find_learning_rate

log = logging.getLogger("infscan")

PROPONENT, OPPONENT, RANDOM, BM25, DOT = "proponent", "opponent", "random", "BM25", "gradient dot product"
KINDS = (PROPONENT, OPPONENT, DOT, BM25, RANDOM)
SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        # proponent, opponent, or the control that chose the row.
        ("kind", pa.string()),
        ("rank", pa.int32()),
        ("sequence_id", pa.int64()),
        # The published score; null of a control.
        ("score", pa.float64()),
        # What the query measures at the run's model, nats, and how much more after the steps.
        ("before", pa.float64()),
        ("effect", pa.float64()),
        # The sequence's own loss, nats.
        ("loss_before", pa.float64()),
        ("loss_after", pa.float64()),
        # After how many training steps.
        ("steps", pa.int32()),
    ]
)
# The page reads these two by name (infscan.report.proved).
EFFECTS = pa.schema(
    [
        # Null: over all queries.
        ("query_id", pa.string()),
        ("steps", pa.int32()),
        ("kind", pa.string()),
        ("rows", pa.int32()),
        # The mean effect in nats with its interval, over queries or over one query's rows; and the share above 0.
        ("mean", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("raises", pa.float64()),
        # How much more proponents raise f, over the same queries; null of one query.
        ("lead", pa.float64()),
        ("lead_low", pa.float64()),
        ("lead_high", pa.float64()),
    ]
)
_SEQUENCES_PER_UNIT = 4
# Sequences that a learning rate is looked for on, and how many times as many are drawn as are matched in length.
_TRIED, _DRAWN = 8, 10


@dataclass(frozen=True)
class Chosen:
    """A sequence that one query asks to be trained on."""

    query: int
    kind: str
    rank: int
    sequence_id: int
    score: float | None = None


@dataclass(frozen=True)
class ProveTask:
    """Sequences to train on one by one; `wanted[i]` are indices of the queries that the i-th is measured on."""

    corpus: CorpusAddress
    sequence_ids: tuple[int, ...]
    wanted: tuple[tuple[int, ...], ...]
    queries: tuple[Query, ...]
    optimizer: StepOptimizer
    learning_rate: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class FirstTask:
    """What is measured before anything is trained, and the learning rate that is looked for where none is given."""

    corpus: CorpusAddress
    sequence_ids: tuple[int, ...]
    queries: tuple[Query, ...]
    optimizer: StepOptimizer
    learning_rate: float | None
    fall: float
    steps: int


@dataclass(frozen=True)
class First:
    """before_q: f of every query, nats. seconds: of the steps on one sequence, and of one query's measurement."""

    before_q: list[float]
    learning_rate: float
    step_seconds: float
    query_seconds: float


def first_task(worker: ModelWorker, task: FirstTask) -> First:
    sequences = worker.read(task.corpus, np.asarray(task.sequence_ids, np.int64))
    started = time.perf_counter()
    before_q = measure_queries(worker.model.module, task.queries).tolist()
    query_seconds = (time.perf_counter() - started) / len(task.queries)
    rate = task.learning_rate or find_learning_rate(worker, sequences, task.optimizer, task.fall, task.steps)
    started = time.perf_counter()
    effects(worker, sequences[0], (), task.optimizer, rate, [task.steps])
    return First(before_q, rate, time.perf_counter() - started, query_seconds)


def prove_task(worker: ModelWorker, task: ProveTask) -> list[tuple[float, list[After]]]:
    """By sequence: its own loss before, and what is left after each count of steps."""
    sequences = worker.read(task.corpus, np.asarray(task.sequence_ids, np.int64))
    return [
        effects(worker, each, [task.queries[q] for q in wanted], task.optimizer, task.learning_rate, task.counts)
        for each, wanted in zip(sequences, task.wanted, strict=True)
    ]


def prove(run: Run, job: ProveJob) -> tuple[pa.Table, dict[str, Any]]:
    """The table of `SCHEMA`, and facts: learning rate, seconds, hours. run: `reopen`ed and entered.

    With job.plan nothing is trained but for that: the table is empty, and facts["cost"] says what the rest would take.

    Raises:
        ConfigError: where the run's model cannot be trained in one process, or it would take longer than max_hours.
        QueryError: for a query id that the run does not have.
    """
    _check(run)
    queries = tuple(choose(run.queries, job.query_ids))
    corpus = prepare_corpus(run)
    chosen = _published(job, queries) + _controls(job, queries, corpus)
    # A step of training is lost in bfloat16's rounding.
    run.hold_model_in(Dtype.float32)
    address = CorpusAddress.of(corpus)
    tried = _usable(corpus, Selection.of(corpus.sequences, _TRIED, job.seed).ids())
    first = _first(run, FirstTask(address, tried, queries, job.optimizer, job.learning_rate, job.fall, job.steps))
    by_sequence: dict[int, set[int]] = defaultdict(set)
    for row in chosen:
        by_sequence[row.sequence_id].add(row.query)
    cost = Cost.of(first, by_sequence, len(job.counts))
    facts = {"learning_rate": first.learning_rate, "seconds_a_sequence": first.step_seconds, "hours": cost.hours}
    if job.plan:
        return SCHEMA.empty_table(), facts | {"cost": cost.sentence}
    cost.refuse_above(job.max_hours)
    log.info("prove       %s", cost.sentence)
    task = ProveTask(address, (), (), queries, job.optimizer, first.learning_rate, job.counts)
    after = _train(run, task, by_sequence)
    rows = [
        {
            "query_id": queries[row.query].id,
            "kind": row.kind,
            "rank": row.rank,
            "sequence_id": row.sequence_id,
            "score": row.score,
            "before": first.before_q[row.query],
            "effect": values[row.query] - first.before_q[row.query],
            "loss_before": after[row.sequence_id].loss_before,
            "loss_after": loss,
            "steps": steps,
        }
        for row in chosen
        for steps, (values, loss) in after[row.sequence_id].by_steps.items()
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA), facts


@dataclass(frozen=True)
class Cost:
    """What a proof takes on one worker, by the time of its first steps."""

    sequences: int
    measurements: int
    step_seconds: float
    query_seconds: float

    @staticmethod
    def of(first: First, by_sequence: Mapping[int, set[int]], counts: int) -> Cost:
        measured = counts * sum(map(len, by_sequence.values()))
        return Cost(len(by_sequence), measured, first.step_seconds, first.query_seconds)

    @property
    def hours(self) -> float:
        return (self.sequences * self.step_seconds + self.measurements * self.query_seconds) / 3600

    @property
    def sentence(self) -> str:
        return (
            f"{self.sequences} sequences of {self.step_seconds:.2g} s and {self.measurements} measurements of "
            f"{self.query_seconds:.2g} s: {self.hours:.2g} hours on one worker"
        )

    def refuse_above(self, max_hours: float) -> None:
        """Raises ConfigError where it would take longer."""
        if self.hours > max_hours:
            raise ConfigError(
                f"{self.sentence}, more than max_hours={max_hours:g}; lower rows, controls, steps or query_ids, or "
                "raise max_hours."
            )


@dataclass(frozen=True)
class Trained:
    """A sequence's own loss before, and by count of steps f by query with its own loss then; nats."""

    loss_before: float
    by_steps: dict[int, tuple[dict[int, float], float]]


def _check(run: Run) -> None:
    if run.later:
        raise ConfigError(
            "the run has stages, and its queries are asked of a later stage's model than the one that was trained on "
            "the scanned corpus; a step on that corpus proves nothing of them. Prove a run without stages."
        )
    if run.config.sharded:
        raise ConfigError(
            "a step of training needs a whole model on one rank: give cluster.ranks_per_worker=1 and a run with "
            "model.sharding=auto whose model fits one device in float32, twice."
        )


def _usable(corpus: AddressableCorpus, ids: NDArray[np.int64]) -> tuple[int, ...]:
    """Those that have a token to predict.

    Raises:
        ConfigError: where there is none.
    """
    found = tuple(int(number) for number, one in zip(ids, corpus.read(ids), strict=True) if _has_loss(one))
    if not found:
        raise ConfigError(f"{corpus.store.uri}: none of {len(ids)} sampled sequences has a token with a loss.")
    return found


def _has_loss(sequence: Any) -> bool:
    return len(sequence) > 1 and (sequence.loss is None or bool(sequence.loss[1:].any()))


def _published(job: ProveJob, queries: Sequence[Query]) -> list[Chosen]:
    return _tops(job.run, job.rows, queries, {PROPONENT: PROPONENT, OPPONENT: OPPONENT}, job.sides, scored=True)


def _tops(
    uri: str, count: int, queries: Sequence[Query], kinds: Mapping[str, str], sides: Sides, *, scored: bool
) -> list[Chosen]:
    """The strongest rows of a run, by side, as `kinds` names them."""
    index = {query.id: number for number, query in enumerate(queries)}
    found = []
    for row in read_top(uri).to_pylist():
        wanted = row["side"] in kinds and (sides is Sides.both or sides.value == f"{row['side']}s")
        if wanted and row["rank"] <= count and row["query_id"] in index:
            score = row["score"] if scored else None
            found.append(Chosen(index[row["query_id"]], kinds[row["side"]], row["rank"], row["sequence_id"], score))
    return found


def _controls(job: ProveJob, queries: Sequence[Query], corpus: AddressableCorpus) -> list[Chosen]:
    """Random sequences as long as the proponents, BM25's first, and those of a run by the gradient dot product."""
    pool = Selection.of(corpus.sequences, min(corpus.sequences, job.bm25_sequences), job.seed).ids()
    usable = [one for one in corpus.read(pool) if _has_loss(one)]
    numbers = np.asarray([one.sequence_id for one in usable], np.int64)
    lengths = np.asarray([len(one) for one in usable])
    asked = [query.parts[0].token_ids for query in queries]
    scores_qn = bm25_scores([one.token_ids for one in usable], asked)
    found = []
    proponents = _tops(job.run, job.controls, queries, {PROPONENT: PROPONENT}, Sides.proponents, scored=False)
    longs = dict(zip((row.sequence_id for row in proponents), _lengths(corpus, proponents), strict=True))
    for query, scores_n in enumerate(scores_qn):
        best = np.argsort(-scores_n, kind="stable")[: job.controls]
        found += [Chosen(query, BM25, rank, int(numbers[row])) for rank, row in enumerate(best, start=1)]
        own = {row.sequence_id for row in proponents if row.query == query}
        wanted = [longs[row.sequence_id] for row in proponents if row.query == query]
        rows = _matched(numbers, lengths, own, wanted, np.random.default_rng([job.seed, query]))
        found += [Chosen(query, RANDOM, rank, int(numbers[row])) for rank, row in enumerate(rows, start=1)]
    if job.dot_product:
        found += _tops(job.dot_product, job.controls, queries, {PROPONENT: DOT}, Sides.proponents, scored=False)
    return found


def _lengths(corpus: AddressableCorpus, rows: Sequence[Chosen]) -> list[int]:
    return [len(one) for one in corpus.read(np.asarray([row.sequence_id for row in rows], np.int64))]


def _matched(
    numbers: NDArray[np.int64],
    lengths: NDArray[np.int64],
    own: set[int],
    wanted: Sequence[int],
    rng: np.random.Generator,
) -> list[int]:
    """For each wanted length the nearest of some random sequences that are not proponents themselves, none twice."""
    free = [row for row in rng.permutation(len(numbers)).tolist() if int(numbers[row]) not in own]
    rows = []
    for length in wanted:
        drawn = free[:_DRAWN]
        if drawn:
            rows.append(min(drawn, key=lambda row: abs(int(lengths[row]) - length)))
            free.remove(rows[-1])
    return rows


def _first(run: Run, task: FirstTask) -> First:
    found: list[First] = []
    step = Step(name="rate", unit_name="tries", units=[0], function=first_task, task=lambda unit: task)
    run.executor.run(step, lambda unit, first: found.append(first))
    return found[0]


def _train(run: Run, task: ProveTask, by_sequence: Mapping[int, set[int]]) -> dict[int, Trained]:
    """What training on each sequence left."""
    numbers = sorted(by_sequence)
    units = {
        start: numbers[start : start + _SEQUENCES_PER_UNIT] for start in range(0, len(numbers), _SEQUENCES_PER_UNIT)
    }
    wanted = {number: tuple(sorted(queries)) for number, queries in by_sequence.items()}
    after: dict[int, Trained] = {}

    def keep(unit: int, found: list[tuple[float, list[After]]]) -> None:
        for number, (before, points) in zip(units[unit], found, strict=True):
            by_steps = {
                point.steps: (dict(zip(wanted[number], point.values, strict=True)), point.loss) for point in points
            }
            after[number] = Trained(before, by_steps)

    step = Step(
        name="prove",
        unit_name="units",
        units=list(units),
        function=prove_task,
        task=lambda unit: replace(
            task, sequence_ids=tuple(units[unit]), wanted=tuple(wanted[number] for number in units[unit])
        ),
        progress=lambda unit, found: (len(found), 0),
    )
    run.executor.run(step, keep)
    return after


@dataclass(frozen=True)
class KindEffect:
    """Of one kind of rows: the mean effect in nats over queries with its interval, and the share that raises f.

    lead: how much more proponents raise f than this kind does, over the same queries, with its interval.
    """

    kind: str
    rows: int
    mean: float
    low: float
    high: float
    raises: float
    lead: tuple[float, float, float] | None


def after_steps(table: pa.Table, steps: int) -> pa.Table:
    """The rows of a proof that were measured after so many steps."""
    return table.filter(pc.field("steps") == steps)


def effects_table(table: pa.Table, resamples: int, seed: int) -> pa.Table:
    """The table of `EFFECTS`: by count of steps and kind, over all queries and of each."""
    rows: list[dict[str, Any]] = []
    for steps in sorted(set(table["steps"].to_pylist())):
        part = after_steps(table, steps)
        for each in by_kind(part, resamples, seed):
            lead = dict(zip(("lead", "lead_low", "lead_high"), each.lead or (None,) * 3, strict=True))
            named = {name: getattr(each, name) for name in ("kind", "rows", "mean", "low", "high", "raises")}
            rows.append({"query_id": None, "steps": steps, **named, **lead})
        by_pair: dict[tuple[str, str], list[float]] = defaultdict(list)
        for row in part.to_pylist():
            by_pair[row["query_id"], row["kind"]].append(row["effect"])
        for (query, kind), effect in sorted(by_pair.items(), key=lambda pair: (pair[0][0], KINDS.index(pair[0][1]))):
            values = np.asarray(effect)
            found = dict(zip(("mean", "low", "high"), _mean(values, resamples, seed), strict=True))
            known = {"query_id": query, "steps": steps, "kind": kind, "rows": len(values)}
            rows.append({**known, **found, "raises": float((values > 0).mean())})
    return pa.Table.from_pylist(rows, schema=EFFECTS)


def by_kind(table: pa.Table, resamples: int, seed: int) -> list[KindEffect]:
    """Queries count alike and are resampled; rows of one query are averaged first."""
    means: dict[str, dict[str, float]] = {}
    shares: dict[str, tuple[int, float]] = {}
    for kind in KINDS:
        by_query = defaultdict(list)
        for row in table.to_pylist():
            if row["kind"] == kind:
                by_query[row["query_id"]].append(row["effect"])
        if by_query:
            means[kind] = {query: float(np.mean(effect)) for query, effect in by_query.items()}
            flat = np.concatenate([np.asarray(effect) for effect in by_query.values()])
            shares[kind] = len(flat), float((flat > 0).mean())
    found = []
    for kind, mine in means.items():
        mean, low, high = _mean(np.asarray(list(mine.values())), resamples, seed)
        both = [query for query in mine if query in means.get(PROPONENT, {})] if kind != PROPONENT else []
        ahead = np.asarray([means[PROPONENT][query] - mine[query] for query in both])
        lead = _mean(ahead, resamples, seed) if len(both) else None
        found.append(KindEffect(kind, shares[kind][0], mean, low, high, shares[kind][1], lead))
    return found


def _mean(values: NDArray[np.float64], resamples: int, seed: int) -> tuple[float, float, float]:
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), INTERVAL)
    return float(values.mean()), float(low), float(high)


def agreement_of(table: pa.Table, resamples: int, seed: int) -> tuple[float, float, float] | None:
    """Spearman of score and effect over a query's published rows, mean over queries; None below 4 rows a query."""
    by_query: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in table.to_pylist():
        if row["score"] is not None:
            by_query[row["query_id"]].append((row["score"], row["effect"]))
    pairs = [np.asarray(rows).T for rows in by_query.values() if len(rows) >= 4]
    if not pairs:
        return None
    return _mean(np.asarray([float(np.nan_to_num(spearman(x[None], y[None]))[0]) for x, y in pairs]), resamples, seed)


def words(table: pa.Table, facts: Mapping[str, Any], job: ProveJob) -> list[str]:
    """What was found, and what that cannot say."""
    found = {each.kind: each for each in by_kind(table, job.resamples, job.seed)}
    said = []
    if PROPONENT in found:
        for kind in (RANDOM, BM25, DOT, OPPONENT):
            lead = found[kind].lead if kind in found else None
            if lead is not None:
                apart = "more than" if lead[1] > 0 else "less than" if lead[2] < 0 else "not surely otherwise than"
                said.append(
                    f"Proponents raise the completion {apart} {kind} rows do: by {lead[0]:+.3g} nats "
                    f"[{lead[1]:+.3g}, {lead[2]:+.3g}]."
                )
    if (rho := agreement_of(table, job.resamples, job.seed)) is not None:
        said.append(
            f"Score and effect of published rows agree to a Spearman of {rho[0]:+.2f} [{rho[1]:+.2f}, {rho[2]:+.2f}]."
        )
    steps = "one step" if job.steps == 1 else f"{job.steps} steps"
    return [
        *said,
        f"An effect is of {steps} of {job.optimizer.value} with learning rate {facts['learning_rate']:.2g} on one "
        "sequence alone, from the model as it is. It cannot say what training without the sequence would have given.",
    ]
