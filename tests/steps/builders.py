"""Ranks made by hand, a small prepared corpus and factors fitted on it: every pass without Ray."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from infscan.config import DampingConfig, Labels, ModelConfig, Packing, Solver
from infscan.corpus.addressable import AddressableCorpus, CorpusAddress, PreparedCorpus
from infscan.corpus.plan import Selection
from infscan.engine.in_process import InProcessExecutor
from infscan.model.architecture import describe
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.steps.eigenbases import decompose_layer, finish_layer
from infscan.steps.factor_files import FactorsPlan, layer_groups
from infscan.steps.factors import covariance_task, fit_factors, lambda_task, slice_bounds
from infscan.steps.labels import FitTask
from infscan.steps.preconditioner import Preconditioner
from infscan.storage import Store
from tests.corpus.builders import prepare, settings, token_rows, write_rows
from tests.steps.runs import CONTEXT, tiny_model

SEED = 5


def one_rank(folder: Path, family: str = "gpt_neox", tracked: str = "mlp") -> ModelWorker:
    """The only rank of its group, with a tiny model."""
    architecture = describe(str(tiny_model(folder, family=family)), tracked)
    model = ModelConfig(path=str(folder), tracked=tracked)
    return ModelWorker(WorkerSettings(model, architecture.layers, sharded=False), RankContext())


def as_rank(rank: ModelWorker, number: int, world: int) -> ModelWorker:
    """The same model in another place; it deals as in a group, and cannot reduce."""
    other = copy.copy(rank)
    other.context = replace(rank.context, rank=number, world=world)
    other._cache = {}
    return other


def small_corpus(folder: Path, count: int = 24) -> PreparedCorpus:
    """Documents of 1 to CONTEXT tokens, one sequence each."""
    rows = [row for row in token_rows(count, seed=1, longest=CONTEXT) if row["tokens"]]
    write_rows(folder / "in.jsonl", rows)
    return prepare(folder / "in.jsonl", folder / "out", settings(Packing.document, CONTEXT))[1]


def fit_plan(
    rank: ModelWorker,
    corpus: PreparedCorpus,
    *,
    slices: int = 1,
    tokens_per_batch: int = 256,
    group_bytes: int = 1 << 30,
    blocks: int = 1,
) -> FactorsPlan:
    return FactorsPlan(
        fields={"corpus": corpus.fingerprint, "seed": SEED, "blocks": blocks},
        layers=rank.layers,
        selection=Selection.of(corpus.sequences),
        slices=slice_bounds(corpus.sequences, slices),
        groups=layer_groups(rank.layers, group_bytes, blocks),
        tokens_per_batch=tokens_per_batch,
    )


def fit_tasks(
    store: Store, corpus: AddressableCorpus, plan: FactorsPlan, labels: Labels, *, draw: bool = False
) -> list[FitTask]:
    """Every (layer group, slice), the first group first; with `draw` that one draws the labels."""
    return [
        FitTask(store, CorpusAddress.of(corpus), plan, group, index, labels, SEED, draw and group == 0)
        for group in range(len(plan.groups))
        for index in range(len(plan.slices))
    ]


def fit(
    rank: ModelWorker, store: Store, corpus: AddressableCorpus, plan: FactorsPlan, labels: Labels = Labels.sampled
) -> Preconditioner:
    """All of it: covariance, eigenbases, Lambda."""
    rank.forget()
    fit_factors(InProcessExecutor.on(rank), store, corpus, plan, labels, SEED)
    return Preconditioner(store, Solver.ekfac, DampingConfig())


def fit_in_pieces(
    rank: ModelWorker, store: Store, corpus: AddressableCorpus, plan: FactorsPlan, labels: Labels = Labels.sampled
) -> Preconditioner:
    """The same, task by task; the partial sums stay."""
    rank.forget()
    for task in fit_tasks(store, corpus, plan, labels, draw=labels is Labels.sampled):
        covariance_task(rank, task)
    for layer in plan.layers:
        decompose_layer(store, plan, layer)
    for task in fit_tasks(store, corpus, plan, labels):
        lambda_task(rank, task)
    for layer in plan.layers:
        finish_layer(store, plan, layer)
    return Preconditioner(store, Solver.ekfac, DampingConfig())
