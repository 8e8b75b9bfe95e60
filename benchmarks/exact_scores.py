"""Scores of every sequence for every query at full rank, in one process: what benchmarks of rankings are of.

Everything is in the factors' eigenbases, where the damped inverse is a division. Of each query one matrix per layer is
held (4 bytes an entry), so that a benchmark tracks some of a model's blocks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infscan.api import settings_of_call
from infscan.config import Config
from infscan.corpus.addressable import CorpusAddress
from infscan.corpus.sequences import Sequence as CorpusSequence
from infscan.engine.in_process import InProcessExecutor
from infscan.influence.inverse import tokens_to_core
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Query
from infscan.steps.factor_files import store_plan
from infscan.steps.factors import fit_factors, plan_factors
from infscan.steps.gradients import Tokens, backward_of_part
from infscan.steps.inputs import Inputs, open_inputs
from infscan.steps.preconditioner import Preconditioner, core, layer_factors
from infscan.steps.prepare import prepare
from infscan.storage import Store

Scores = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Ready:
    """A model, a corpus and factors in this process."""

    config: Config
    inputs: Inputs
    worker: ModelWorker
    sequences: list[CorpusSequence]
    inverse: Preconditioner

    @property
    def names(self) -> list[str]:
        """The documents, one of each sequence."""
        return [one.documents[0].id for one in self.sequences]


def ready(settings: dict[str, Any], factors: Store | None = None) -> Ready:
    """settings: of a scan. factors: where they are, or else they are fitted into <output>/factors on the corpus."""
    config: Config = settings_of_call("scan", (), settings)
    inputs = open_inputs(config)
    store = Store(config.output)
    settled = WorkerSettings(config.model, inputs.layers, sharded=False)
    executor = InProcessExecutor(settled, RankContext(device="cpu", threads=1))
    corpus = prepare(config.corpus, inputs.architecture, inputs.tokenizer, store / "corpus", executor)
    if factors is None:
        factors, started = store / "factors", time.monotonic()
        plan = store_plan(factors, plan_factors(inputs, corpus))
        fit_factors(executor, factors, corpus, plan, config.factors.labels, config.seed)
        print(f"factors of {plan.selection.size} sequences: {time.monotonic() - started:.0f} s", flush=True)
    inverse = Preconditioner(factors, config.factors.solver, config.factors.damping)
    worker = executor.worker
    read = worker.read(CorpusAddress.of(corpus), np.arange(corpus.sequences))
    return Ready(config, inputs, worker, read, inverse)


def score(it: Ready, queries: Sequence[Query], sequences: Sequence[CorpusSequence] | None = None) -> Scores:
    """Of every query and sequence, with gradients V and g, summed over layers:

    ekfac [Q, N] = <V, (G + lambda)^-1 g>; dot [Q, N] = <V, g>; self_influence [N] = <g, (G + lambda)^-1 g>;
    squares [N] = <g, g>; query_squares [Q] = <V, V>; nats [Q] = -log p of what is measured.
    """
    worker, sequences = it.worker, it.sequences if sequences is None else sequences
    known = {}
    for layer in worker.layers:
        damped = layer_factors(it.inverse, layer, worker.device, worker.wide)
        assert damped is not None
        known[layer.name] = damped[0], (damped[0].Lambda + damped[1]).flatten(), damped
    Q, N = len(queries), len(sequences)
    found = {name: np.zeros((Q, N)) for name in ("ekfac", "dot")} | {"nats": np.zeros(Q)}
    C = {layer.name: torch.empty(Q, layer.size) for layer in worker.layers}
    for query, one in enumerate(queries):

        def invert(layer: Layer, s: torch.Tensor, a: torch.Tensor, _: Routed | None, query: int = query) -> None:
            tokens = Tokens(s.view(-1, layer.outputs), a.view(-1, layer.inputs))
            C[layer.name][query] = core(tokens, layer, known[layer.name][2]).flatten()

        # -log p of what is measured; none of these queries has a contrast.
        [part] = one.parts
        found["nats"][query] = float(backward_of_part(worker, part, worker.layers, invert))
    print(f"{Q} queries", flush=True)
    found |= {name: np.zeros(size) for name, size in (("self_influence", N), ("squares", N), ("query_squares", Q))}
    for name, C_qx in C.items():
        for query, one in enumerate(C_qx):
            found["query_squares"][query] += float((one * known[name][1]).square_().sum())
    done, started = 0, time.monotonic()
    for batch in worker.batches(sequences, it.config.tokens_per_batch):

        def consume(layer: Layer, s: torch.Tensor, a: torch.Tensor, _: Routed | None, rows: Any = batch.rows) -> None:
            factors, damped, _both = known[layer.name]
            g_bx = torch.stack([tokens_to_core(*pair, factors).flatten() for pair in zip(s, a, strict=True)])
            found["ekfac"][:, rows] += (C[layer.name] @ g_bx.T).numpy()
            found["squares"][rows] += g_bx.square().sum(1).numpy()
            found["self_influence"][rows] += (g_bx.square() / damped).sum(1).numpy()
            found["dot"][:, rows] += (C[layer.name] @ (g_bx * damped).T).numpy()

        worker.backward(batch, worker.layers, batch.loss(), consume)
        done += len(batch.rows)
        print(f"{done} of {N} sequences, {time.monotonic() - started:.0f} s", flush=True)
    return {name: values.astype(np.float32) for name, values in found.items()}
