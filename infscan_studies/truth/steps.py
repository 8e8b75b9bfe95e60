"""What training on one sequence does to a query: a few steps on a copy of the weights in memory, taken back afterwards.

    effect_q(z) = f_q(theta_k) - f_q(theta_0),   theta_j = theta_(j-1) - step of the optimizer on grad L(z)

theta are all parameters, not only the tracked ones, and f is what the query measures, in nats. To first order one step
of SGD is lr <grad f, grad L> with the sign turned: the gradient dot product over all parameters. AdamW's first step
moves every parameter by about lr, whatever the size of its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from infscan.corpus import sequences as corpus
from infscan.errors import ModelError
from infscan.model.attention import document_logits
from infscan.model.measure import summed_losses
from infscan.model.worker import ModelWorker
from infscan.queries import Query
from infscan_studies.config import StepOptimizer
from infscan_studies.truth.retrain import measure_queries

# A search for a learning rate starts here and grows by _GROWTH, at most to _LARGEST.
_SMALLEST, _LARGEST, _GROWTH = 1e-8, 1e2, math.sqrt(10)
# Padded tokens of a forward that measures queries together.
_TOKENS_MEASURED = 512


def sequence_loss(worker: ModelWorker, sequence: corpus.Sequence) -> Tensor:
    """L(z), nats, with a graph to every parameter that asks for a gradient."""
    (batch,) = worker.batches([sequence], len(sequence))
    loss = batch.loss()
    logits_btv = document_logits(worker.model.module, batch.ids_bt, batch.position_ids_bt)
    return summed_losses(logits_btv, loss.labels_bt, loss.weights_bt).sum()


def weights_of(worker: ModelWorker) -> tuple[list[nn.Parameter], list[Tensor]]:
    """What a step moves, and a copy of it."""
    parameters = [p for p in worker.model.module.parameters() if p.is_floating_point()]
    return parameters, [p.detach().clone() for p in parameters]


@contextmanager
def trained(
    worker: ModelWorker,
    sequence: corpus.Sequence,
    optimizer: StepOptimizer,
    learning_rate: float,
    steps: int,
    after_step: Callable[[int], None] = lambda step: None,
    weights: tuple[list[nn.Parameter], list[Tensor]] | None = None,
) -> Iterator[float]:
    """The model after `steps` steps on one sequence, while open; then its weights are what they were, bit by bit.

    Yields L(z) before, nats. after_step: called with 1, 2, ... after each step but the last. weights: `weights_of` the
    worker, where many sequences are trained on and one copy serves them all.
    """
    module = worker.model.module
    parameters, before = weights or weights_of(worker)
    module.requires_grad_(True)
    try:
        make: type[torch.optim.Optimizer] = torch.optim.SGD if optimizer is StepOptimizer.sgd else torch.optim.AdamW
        # In one pass over the weights, which a step is mostly made of.
        stepper = make(parameters, lr=learning_rate, weight_decay=0.0, fused=True)  # type: ignore[call-arg]
        first = None
        for step in range(1, steps + 1):
            loss = sequence_loss(worker, sequence)
            first = float(loss.detach()) if first is None else first
            loss.backward()
            stepper.step()
            stepper.zero_grad(set_to_none=True)
            if step < steps:
                after_step(step)
        assert first is not None
        yield first
    finally:
        module.requires_grad_(False)
        _restore(parameters, before)


@torch.no_grad()
def loss_now(worker: ModelWorker, sequence: corpus.Sequence) -> float:
    """L(z) at the model as it is, nats."""
    return float(sequence_loss(worker, sequence))


@torch.no_grad()
def _restore(parameters: Sequence[nn.Parameter], before: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, before, strict=True):
        parameter.grad = None
        parameter.copy_(value)


@dataclass(frozen=True)
class After:
    """What training left: f of some queries, and L(z) of the sequence that was trained on; nats."""

    steps: int
    values: list[float]
    loss: float


def effects(
    worker: ModelWorker,
    sequence: corpus.Sequence,
    queries: Sequence[Query],
    optimizer: StepOptimizer,
    learning_rate: float,
    counts: Sequence[int],
) -> tuple[float, list[After]]:
    """L(z) before training on a sequence, and what is left after each of these counts of steps, ascending.

    One training passes through all of them: what is measured on the way changes nothing of it.
    """
    found: list[After] = []

    def measure(steps: int) -> None:
        if steps in counts:
            values = measure_queries(worker.model.module, queries).tolist()
            found.append(After(steps, values, loss_now(worker, sequence)))

    last = counts[-1]
    with trained(worker, sequence, optimizer, learning_rate, last, measure) as before:
        measure(last)
    return before, found


def effects_on(
    worker: ModelWorker,
    sequences: Sequence[corpus.Sequence],
    queries: Sequence[Query],
    optimizer: StepOptimizer,
    learning_rate: float,
) -> Tensor:
    """What a step on each sequence alone adds to f of every query, nats: float64 [N, Q].

    Queries are measured together, at the model as it is as after each step.
    """
    module, weights = worker.model.module, weights_of(worker)
    before_q = measure_queries(module, queries, _TOKENS_MEASURED)
    found = []
    for sequence in sequences:
        with trained(worker, sequence, optimizer, learning_rate, 1, weights=weights):
            found.append(measure_queries(module, queries, _TOKENS_MEASURED) - before_q)
    return torch.from_numpy(np.stack(found))


def find_learning_rate(
    worker: ModelWorker, sequences: Sequence[corpus.Sequence], optimizer: StepOptimizer, fall: float, steps: int
) -> float:
    """The smallest of 1e-8, 3.2e-8, ... at which half of the sequences' own losses fall by the share `fall`.

    Raises:
        ModelError: where none does: larger steps only raise them.
    """
    rate, best, weights = _SMALLEST, 0.0, weights_of(worker)
    while rate <= _LARGEST:
        falls = []
        for sequence in sequences:
            with trained(worker, sequence, optimizer, rate, steps, weights=weights) as before:
                falls.append(1 - loss_now(worker, sequence) / before)
        found = sorted(falls)[len(falls) // 2]
        if found >= fall:
            return rate
        best = max(best, found)
        if not found > -1:
            break
        rate *= _GROWTH
    raise ModelError(
        f"fall={fall}: no learning rate lowers a sequence's own loss by this share; the most was {best:.3f}. Give a "
        "smaller fall, more steps, or learning_rate itself."
    )
