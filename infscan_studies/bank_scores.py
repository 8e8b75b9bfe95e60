"""The scores of a bank's full models, layer by layer: what the sweep over damping, layers and methods is made of.

Each method's scores at each damping are a file of [Q, N] per layer. A set of layers scores by the sum over its layers
(docs/method.md#influence), so that one file serves every set; an iterated inverse has a file for its set. A file's
presence is the fact that it is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infscan.config import (
    CorpusConfig,
    DampingConfig,
    FactorsConfig,
    IterationConfig,
    ModelConfig,
    QueriesConfig,
    Solver,
    fingerprint,
)
from infscan.corpus import sequences as corpus_sequences
from infscan.corpus.plan import Selection
from infscan.errors import ConfigError
from infscan.influence.cg import conjugate_gradients, damped
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.influence.score import LayerQueries, score_layer
from infscan.influence.similarity import StateMoments, Whitening, best_cosines
from infscan.model.gauss_newton import GaussNewton, damping_vector, join, split
from infscan.model.tracked import block_kinds
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Query
from infscan.report.thirds import THIRDS, block_of, thirds
from infscan.results.tensor_files import read_facts, read_tensors, write_tensors
from infscan.steps.preconditioner import Preconditioner, StoredGradients, query_gradients, read_vectors
from infscan.steps.solve import SolveTask, ekfac_factors, ekfac_inverse, solve_task
from infscan.storage import Store
from infscan_studies.config import BankMethod, ScoresConfig, ValidateConfig, ValidateJob
from infscan_studies.in_process import Study, open_study
from infscan_studies.side_by_side import kind_of
from infscan_studies.swept import Way, sweep
from infscan_studies.truth.bm25 import bm25_scores
from infscan_studies.truth.lds import random_scores

# What a file has where its scores are of no single layer.
NO_LAYER = "all"
_TOKENS_PER_BATCH = 4096
# Queries that share the passes of a product with G.
_TOGETHER = 6
FOLDER, RANDOM = "scores", "random"
_IN_ONE_PASS = (BankMethod.ekfac, BankMethod.kfac, BankMethod.identity)
T = TypeVar("T")


def cpu_timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and the seconds that the processor spent on it: the same however busy the machine is."""
    started = time.process_time()
    return call(), time.process_time() - started


@dataclass(frozen=True)
class Scores:
    """A method's scores of every sequence: by_layer [Q, N] each; seconds of the processor, for all queries and layers.
    damping: None where there is none, or it is found by layer (`auto`)."""

    method: str
    damping: float | None
    by_layer: Mapping[str, NDArray[np.float64]]
    seconds: float
    # The one set of layers that it is of; None where sets are sums of its layers.
    tracked: str | None = None
    auto: bool = False
    # The queries that it is of, where not all.
    query_ids: tuple[str, ...] | None = None
    # The sequences that an iterated inverse's G is of, where not all.
    sequences: int | None = None

    def of(self, layers: Sequence[str] | None) -> NDArray[np.float64]:
        """[N, Q], over some layers; None: of a method that has none, or has one set."""
        found = self.by_layer.values() if layers is None else (self.by_layer[name] for name in layers)
        return np.sum(list(found), axis=0).T


@dataclass(frozen=True)
class Labelled:
    """A row of the sweep: its label, what it is of, scores [N, Q], and the ids of those queries."""

    label: str
    facts: dict[str, Any]
    scores_nq: NDArray[np.float64]
    query_ids: tuple[str, ...]
    # The layers and damping by which it is compared with EK-FAC; None where it has neither.
    same: tuple[str, str] | None = None

    def with_another(self, other: Labelled) -> Labelled:
        """Added up with another model's."""
        facts = self.facts | {"seconds": self.facts["seconds"] + other.facts["seconds"]}
        return replace(self, facts=facts, scores_nq=self.scores_nq + other.scores_nq)

    def of_models(self, number: int) -> Labelled:
        said = f" x{number}" if number > 1 else ""
        return replace(self, label=f"{self.label}{said}", facts=self.facts | {"models": number})

    def of_epochs(self, said: str) -> Labelled:
        return replace(self, label=f"{self.label} at {said}", facts=self.facts | {"models": 1, "epochs": said})


def at_random(sequences: int, query_ids: tuple[str, ...], seed: int) -> Labelled:
    """The row of the control."""
    return Labelled(RANDOM, {"method": RANDOM}, random_scores(sequences, len(query_ids), seed), query_ids)


@dataclass(frozen=True)
class _Row:
    """An iterated inverse: damping None is found by layer, sequences None are all."""

    method: str
    tracked: str
    damping: float | None
    sequences: int | None = None


class RecipeScores:
    """One recipe's full model, its factors of the whole corpus, and its scores, in a folder of their own."""

    def __init__(self, store: Store, config: ValidateJob, sweep: ScoresConfig) -> None:
        """config: of the model, with the corpus and the queries; its output is the folder of the factors."""
        self.store, self.config, self.sweep = store, config, sweep

    @staticmethod
    def config_of(
        model: str, corpus: str, queries: str, counts: tuple[int, int], output: str, seed: int, sweep: ScoresConfig
    ) -> ValidateJob:
        """All linears and the head tracked, factors and scores of every sequence. counts: sequences, queries."""
        sequences, asked = counts
        return ValidateJob(
            model=ModelConfig(path=model, tracked="linear+head"),
            corpus=CorpusConfig(path=corpus),
            factors=FactorsConfig(damping=DampingConfig(auto=sweep.auto)),
            queries=QueriesConfig(path=queries),
            validate=ValidateConfig(curvature_sequences=sequences, sequences=sequences, queries=asked),
            output=output,
            seed=seed,
        )

    @cached_property
    def study(self) -> Study:
        """The model with its factors, which are fitted or found."""
        return open_study(self.config)

    @property
    def worker(self) -> ModelWorker:
        return self.study.worker

    @cached_property
    def folder(self) -> str:
        """Of the scores of this model, corpus, queries and factors."""
        return f"{FOLDER}/{fingerprint(self.study.fingerprints)[:16]}"

    def sets(self) -> dict[str, tuple[str, ...]]:
        """The names of the layers of each set that is swept over."""
        kinds = block_kinds(self.worker.model.module)
        third = thirds(list(kinds))
        tracked = [layer.name for layer in self.worker.layers if layer.name in kinds]
        parts = {kind: tuple(name for name in tracked if kinds[name] == kind) for kind in ("mlp", "attention", "head")}
        parts |= {one: tuple(name for name in parts["mlp"] if third[name] == one) for one in THIRDS}
        last = max((block_of(name) for name in parts["mlp"]), default=-1)
        parts["last"] = tuple(name for name in parts["mlp"] if block_of(name) == last)
        wanted = dict.fromkeys([*self.sweep.tracked, *self.sweep.iterated])
        if missing := [part for one in wanted for part in one.split("+") if not parts[part]]:
            raise ConfigError(
                f"sweep.tracked: no tracked layer is of {missing[0]}; give other sets, or a model.tracked "
                "that has them."
            )
        return {one: tuple(name for part in one.split("+") for name in parts[part]) for one in wanted}

    def inverse(self, damping: float | None) -> Preconditioner:
        """damping: a multiple of the mean of Lambda; None: as it is found by layer."""
        asked = DampingConfig(auto=True) if damping is None else DampingConfig(relative=damping)
        return replace(self.study.inverse, damping=asked)

    def all(self, report: Callable[[str], None]) -> list[Scores]:
        """Every method's scores at every damping, from storage where they are there."""
        found: list[Scores] = []
        self._sweep()
        for method in self.sweep.methods:
            if method in _IN_ONE_PASS:
                found += [self._stored(way) for way in self._ways(method)]
            elif method in (BankMethod.cg, BankMethod.astra):
                dampings = [*self.sweep.iterated_damping, *([None] if self.sweep.iterated_auto else [])]
                for tracked, damping in product(self.sweep.iterated, dampings):
                    if method is BankMethod.astra:
                        found += self._by_astra(tracked, damping, report)
                        continue
                    for sequences in self.sweep.iterated_sequences:
                        found += self._by_cg(tracked, damping, sequences or None, report)
            else:
                way = Way(method, None)
                if not self.store.exists(self._path(way)):
                    scores, seconds = cpu_timed(self._by_words if method is BankMethod.bm25 else self._by_states)
                    self._write(self._path(way), {NO_LAYER: scores}, seconds)
                found.append(self._stored(way))
            report(f"scores of {method.value}")
        return found

    def labelled(self, report: Callable[[str], None]) -> Iterator[Labelled]:
        """The rows of the sweep: every method's at every damping, by sets of layers where it has layers."""
        ids = tuple(query.id for query in self.study.queries)
        sets = self.sets()
        for one in self.all(report):
            facts = {"method": one.method, "damping": one.damping, "seconds": one.seconds, "sequences": one.sequences}
            damping = " auto" if one.auto else "" if one.damping is None else f" {one.damping:g}"
            of = "" if one.sequences is None else f" of {one.sequences}"
            mine = one.query_ids or ids
            if one.tracked is None and set(one.by_layer) == {NO_LAYER}:
                yield Labelled(one.method, facts, one.of(None), mine)
                continue
            for tracked in self.sweep.tracked if one.tracked is None else [one.tracked]:
                yield Labelled(
                    f"{one.method} {tracked}{damping}{of}",
                    facts | {"tracked": tracked},
                    one.of(None if one.tracked else sets[tracked]),
                    mine,
                    (tracked, damping) if damping else None,
                )

    def _ways(self, method: BankMethod) -> list[Way]:
        """What one pass over the sequences gives of a method."""
        if method is BankMethod.identity:
            return [Way(method, None)]
        auto = method is BankMethod.ekfac and self.sweep.auto
        return [Way(method, damping) for damping in [*self.sweep.damping, *([None] if auto else [])]]

    def _sweep(self) -> None:
        """The scores of every damping that are not there yet, and of the gradient dot product, from one pass."""
        ways = [way for method in self.sweep.methods if method in _IN_ONE_PASS for way in self._ways(method)]
        missing = [way for way in ways if not self.store.exists(self._path(way))]
        if not missing:
            return
        study = self.study
        tokens = sum(len(one) for one in study.curvature) / len(study.curvature)
        found_by_way = sweep(
            self.worker, study.queries, study.candidates, study.inverse, tokens, missing, self.config.tokens_per_batch
        )
        for way, found in found_by_way.items():
            fit = 0.0 if way.method is BankMethod.identity else study.fit_cpu_seconds
            self._write(self._path(way), found.by_layer, fit + found.seconds)

    def _path(self, way: Way) -> str:
        said = f"-{way.damping:g}" if way.damping is not None else "-auto" if way.method is BankMethod.ekfac else ""
        return f"{self.folder}/{way.method.value}{said}.safetensors"

    def _stored(self, way: Way) -> Scores:
        by_layer, seconds = self._read(self._path(way))
        auto = way.method is BankMethod.ekfac and way.damping is None
        return Scores(way.method.value, way.damping, by_layer, seconds, auto=auto)

    def _write(self, path: str, by_layer: Mapping[str, NDArray[np.floating]], seconds: float) -> None:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(one, np.float32)) for name, one in by_layer.items()}
        write_tensors(self.store, path, tensors, {"seconds": f"{seconds:.3f}"})

    def _read(self, path: str) -> tuple[dict[str, NDArray[np.float64]], float]:
        tensors = read_tensors(self.store, path)
        return {name: one.double().numpy() for name, one in tensors.items()}, float(
            read_facts(self.store, path)["seconds"]
        )

    def _by_words(self) -> NDArray[np.floating]:
        sequences = [one.token_ids for one in self.study.candidates]
        return bm25_scores(sequences, [query.parts[0].token_ids for query in self.study.queries])

    def _by_states(self) -> NDArray[np.floating]:
        return state_cosines(self.worker, self.study)

    def _part(self, tracked: str) -> tuple[ModelWorker, list[Query]]:
        """A worker that tracks one set alone, and the queries that are solved for."""
        names = self.sets()[tracked]
        layers = tuple(layer for layer in self.worker.layers if layer.name in names)
        worker = ModelWorker(WorkerSettings(self.config.model, layers, sharded=False), self.worker.context)
        most, taken, queries = self.sweep.iterated_queries, dict[str, int](), []
        for query in self.study.queries:
            kind = kind_of(query.id)
            taken[kind] = taken.get(kind, 0) + 1
            if most is None or taken[kind] <= most:
                queries.append(query)
        return worker, queries

    def _iterated(self, row: _Row, query: Query) -> str:
        said = "auto" if row.damping is None else f"{row.damping:g}"
        said += "" if row.sequences is None else f"-of-{row.sequences}"
        return f"{self.folder}/{row.method}-{row.tracked}-{said}/{query.id}.safetensors"

    def _joined(self, row: _Row, queries: Sequence[Query]) -> Scores:
        read = [self._read(self._iterated(row, query)) for query in queries]
        return Scores(
            row.method,
            row.damping,
            {NO_LAYER: np.concatenate([one[NO_LAYER] for one, _ in read])},
            sum(seconds for _, seconds in read) + self.study.fit_cpu_seconds,
            row.tracked,
            row.damping is None,
            tuple(query.id for query in queries),
            row.sequences,
        )

    def _by_cg(
        self, tracked: str, damping: float | None, sequences: int | None, report: Callable[[str], None]
    ) -> list[Scores]:
        """One run of conjugate gradients, judged after each number of steps that is asked for."""
        worker, queries = self._part(tracked)
        rows = {step: _Row(f"cg-{step}", tracked, damping, sequences) for step in sorted(self.sweep.steps)}

        def is_done(query: Query) -> bool:
            return all(self.store.exists(self._iterated(row, query)) for row in rows.values())

        missing = [query for query in queries if not is_done(query)]
        factors = ekfac_factors(worker, self.inverse(damping))
        precondition = ekfac_inverse(worker.layers, factors)
        chosen = Selection.of(len(self.study.curvature), sequences, self.config.seed).ids()
        ggn = GaussNewton(worker, [self.study.curvature[row] for row in chosen.tolist()], 1024)
        for start in range(0, len(missing), _TOGETHER):
            some = missing[start : start + _TOGETHER]
            started = time.process_time()
            v_kp = join(worker.layers, query_gradients(worker, some, worker.layers))
            lambda_p = damping_vector(worker.layers, {name: lam for name, (_, lam) in factors.items()}, v_kp)
            kept: dict[int, tuple[Tensor, float]] = {}

            def keep(
                step: int,
                _seconds: float,
                _: Tensor,
                x_kp: Tensor,
                kept: dict[int, tuple[Tensor, float]] = kept,
                started: float = started,
            ) -> None:
                if step in rows:
                    kept[step] = (x_kp.clone(), time.process_time() - started)

            conjugate_gradients(
                damped(ggn.product, lambda_p),
                v_kp,
                tolerance=0.0,
                max_iterations=max(rows),
                preconditioner=precondition,
                on_iteration=keep,
            )
            for step, (x_kp, seconds) in kept.items():
                self._write_iterated(worker, rows[step], some, split(worker.layers, x_kp), seconds)
            report(f"cg of {start + len(some)} of {len(missing)} queries that were missing")
        return [self._joined(row, queries) for row in rows.values()]

    def _write_iterated(
        self, worker: ModelWorker, row: _Row, queries: Sequence[Query], x: Mapping[str, Tensor], seconds: float
    ) -> None:
        """Scores by the solutions x, [K, O, I] by layer, a file for each query. seconds: what they took."""
        by_layer, scanned = cpu_timed(lambda: layer_scores(worker, self.study.candidates, x))
        scores_kn = np.sum([one.astype(np.float64) for one in by_layer.values()], axis=0)
        for number, query in enumerate(queries):
            each = (seconds + scanned) / len(queries)
            self._write(self._iterated(row, query), {NO_LAYER: scores_kn[number : number + 1]}, each)

    def _by_astra(self, tracked: str, damping: float | None, report: Callable[[str], None]) -> list[Scores]:
        worker, queries = self._part(tracked)
        row = _Row(f"astra-{self.sweep.astra_steps}", tracked, damping)
        missing = [query for query in queries if not self.store.exists(self._iterated(row, query))]
        for start in range(0, len(missing), _TOGETHER):
            some = tuple(missing[start : start + _TOGETHER])
            names = {query.id: f"solutions/{self._iterated(row, query)}" for query in some}
            task = SolveTask(
                store=self.store,
                names=tuple(names.values()),
                queries=some,
                solver=Solver.astra,
                settings=IterationConfig(steps=self.sweep.astra_steps),
                ekfac=self.inverse(damping),
                corpus=self.study.corpus,
                curvature_ids=np.array([one.sequence_id for one in self.study.curvature]),
                curvature=self.folder,
                fingerprints=tuple(names),
                seed=self.config.seed,
            )
            _, seconds = cpu_timed(partial(solve_task, worker, task))
            x = read_vectors(worker, some, worker.layers, StoredGradients(self.store, names))
            self._write_iterated(worker, row, some, x, seconds)
            report(f"astra of {start + len(some)} of {len(missing)} queries that were missing")
        return [self._joined(row, queries)]


def layer_scores(
    worker: ModelWorker, sequences: Sequence[corpus_sequences.Sequence], P: Mapping[str, Tensor]
) -> dict[str, NDArray[np.floating]]:
    """<P, grad L(z)> of every layer apart, in one pass over the sequences: [Q, N] each, at full rank."""
    ready = {name: LayerQueries.dense(matrix.to(worker.model.dtype)) for name, matrix in P.items()}
    Q = len(next(iter(P.values())))
    found = {name: torch.zeros(len(sequences), Q, dtype=worker.wide, device=worker.device) for name in P}
    layers = [layer for layer in worker.layers if layer.name in P]
    for batch in worker.batches(sequences, _TOKENS_PER_BATCH):
        rows = worker.to_device(batch.rows)

        def consume(layer: Layer, s: Tensor, a: Tensor, routed: Routed | None, rows: Tensor = rows) -> None:
            found[layer.name].index_add_(0, rows, score_layer(s, a, ready[layer.name], routed))

        worker.backward(batch, layers, batch.loss(), consume)
    return {name: scores_nq.T.cpu().numpy() for name, scores_nq in found.items()}


@torch.no_grad()
def state_cosines(worker: ModelWorker, study: Study) -> NDArray[np.floating]:
    """Whitened cosines of the last block's states (`infscan.influence.similarity`), [Q, N]; the query's own tokens are
    all but its last, which nothing is predicted from."""
    states = [_states(worker, one.token_ids) for one in study.candidates]
    moments = StateMoments(states[0].shape[1], worker.device)
    for h_td in states:
        moments.add(h_td.double())
    whitening = Whitening.of(moments.total_nn).to(worker.device, worker.wide)
    own = [whitening.directions(_states(worker, np.asarray(query.parts[0].token_ids[:-1]))) for query in study.queries]
    scores = []
    for h_td in states:
        x_1td = whitening.directions(h_td)[None]
        counts_1t = torch.ones(x_1td.shape[:2], dtype=torch.bool, device=worker.device)
        scores.append([float(best_cosines(own_id, x_1td, counts_1t)) for own_id in own])
    return np.array(scores).T


def _states(worker: ModelWorker, token_ids: NDArray[np.int64]) -> Tensor:
    ids_1t = worker.to_device(np.asarray(token_ids, np.int64)[None])
    hidden = worker.model.module(input_ids=ids_1t, output_hidden_states=True, use_cache=False).hidden_states
    found: Tensor = hidden[-1][0].to(worker.wide)
    return found
