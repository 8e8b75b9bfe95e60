"""Retraining as a ground truth: what queries measure on models trained with and without chosen sequences.

Every training is fixed by (recipe, chosen sequences, seed), and its measurements are one small JSON in storage: a study
that is interrupted goes on, and one that asks for more trains only what is new.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from infscan.config import fingerprint
from infscan.corpus.batches import micro_batches, pad
from infscan.errors import ConfigError, ModelError, RunError
from infscan.queries import Query
from infscan.storage import Store
from infscan_studies.config import TrainingOptimizer
from infscan_studies.truth.train import TrainingSettings, train_language_model

# train_and_measure(chosen, seed) -> [Q]. chosen: int64 rows of the corpus, ascending.
TrainAndMeasure = Callable[[NDArray[np.int64], int], NDArray[np.float64]]
# Sequences that a training's duration is measured on, at most.
_TIMED_SEQUENCES = 256


class Retrainer:
    """Measurements after training on chosen sequences, from storage where that training was done before.

    recipe: what fixes a training apart from its sequences and seed, as plain values or dataclasses; the recipe and the
    query ids are the cache's key, so `recipe` must cover the model, the settings, the corpus and what queries measure.
    """

    def __init__(self, store: Store, recipe: Any, query_ids: Sequence[str], train_and_measure: TrainAndMeasure) -> None:
        self.store = store
        self.query_ids = tuple(query_ids)
        self.fingerprint = fingerprint({"recipe": recipe, "queries": self.query_ids})
        self._train_and_measure = train_and_measure

    def path(self, chosen: NDArray[np.int64], seed: int) -> str:
        return f"{self.fingerprint[:16]}/{_digest(chosen)[:24]}-seed-{seed}.json"

    def missing(self, trainings: Iterable[tuple[NDArray[np.int64], int]]) -> list[tuple[NDArray[np.int64], int]]:
        """Those of these trainings that are not in storage yet, each once."""
        there = {entry.name for entry in self.store.list(self.fingerprint[:16], ".json")}
        by_path = {self.path(chosen, seed): (chosen, seed) for chosen, seed in trainings}
        return [training for path, training in by_path.items() if path not in there]

    def measure(self, chosen: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
        """f of every query after training on `chosen` (ascending rows of the corpus): float64 [Q].

        Raises:
            ModelError: where a measurement is NaN or infinite.
            RunError: where the file in storage belongs to another training.
        """
        path, key = self.path(chosen, seed), self._key(chosen, seed)
        if not self.store.exists(path):
            started = time.monotonic()
            values = self._train_and_measure(chosen, seed)
            if not np.isfinite(values).all():
                bad = self.query_ids[int(np.flatnonzero(~np.isfinite(values))[0])]
                raise ModelError(f"query {bad!r} measures NaN or infinity after retraining; lower the learning rate.")
            self._write(chosen, seed, values, {"seconds": round(time.monotonic() - started, 3)})
        found = self.store.read_json(path)
        if {name: found.get(name) for name in key} != key:
            raise RunError(f"{self.store}/{path} belongs to another training; remove it.")
        return np.array([found["measurements"][query_id] for query_id in self.query_ids])

    def take(self, chosen: NDArray[np.int64], seed: int, values: NDArray[np.float64]) -> None:
        """Keep what this training measured elsewhere, float64 [Q]; what is in storage already stays."""
        if not self.store.exists(self.path(chosen, seed)):
            self._write(chosen, seed, values, {})

    def _key(self, chosen: NDArray[np.int64], seed: int) -> dict[str, Any]:
        return {"recipe": self.fingerprint, "chosen": _digest(chosen), "seed": seed, "sequences": len(chosen)}

    def _write(self, chosen: NDArray[np.int64], seed: int, values: NDArray[np.float64], facts: dict[str, Any]) -> None:
        measured = dict(zip(self.query_ids, values.tolist(), strict=True))
        self.store.write_json(self.path(chosen, seed), {**self._key(chosen, seed), **facts, "measurements": measured})


class LanguageModelTrainer:
    """Trains a causal language model on chosen sequences and measures queries: what a `Retrainer` calls.

    build: an untrained model from a seed. A training's seed orders its batches and, where `vary_initial`, also draws
    the initial weights; otherwise every training starts from `build(0)`, and seeds differ in the order alone.
    Sequences of a single token have no loss and are left out of the training.
    """

    def __init__(
        self,
        build: Callable[[int], nn.Module],
        sequences: Sequence[Sequence[int]],
        settings: TrainingSettings,
        queries: Sequence[Query],
        *,
        vary_initial: bool = False,
    ) -> None:
        self.build, self.sequences, self.settings, self.queries = build, sequences, settings, queries
        self.vary_initial = vary_initial

    def train(self, chosen: NDArray[np.int64], seed: int, until: int | None = None) -> nn.Module:
        """A model trained on these rows, in eval mode. until: as it was after so many epochs."""
        model = self.build(seed if self.vary_initial else 0)
        ids = [self.sequences[row] for row in chosen.tolist()]
        rows = [row for row in ids if len(row) > 1]
        train_language_model(model, rows, replace(self.settings, seed=seed), until=until)
        return model

    def __call__(self, chosen: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
        return measure_queries(self.train(chosen, seed), self.queries)

    def seconds(self, sequences: int) -> float:
        """What a training on that many sequences takes here, from one measured epoch over some of the corpus."""
        size = min(len(self.sequences), _TIMED_SEQUENCES)
        chosen = np.unique(np.linspace(0, len(self.sequences) - 1, size).astype(np.int64))
        timed = [self.sequences[row] for row in chosen.tolist() if len(self.sequences[row]) > 1]
        started = time.monotonic()
        train_language_model(self.build(0), timed, replace(self.settings, epochs=1))
        return (time.monotonic() - started) / len(chosen) * sequences * self.settings.epochs

    @property
    def optimiser(self) -> str:
        """For people: what trained the models."""
        s = self.settings
        sgd = s.optimizer is TrainingOptimizer.sgd
        name = f"SGD (momentum {s.beta1};" if sgd else f"AdamW (betas {s.beta1}, {s.beta2};"
        return (
            f"{name} weight decay {s.weight_decay} on matrices), learning rate "
            f"{s.learning_rate} with warm-up and cosine, gradients clipped at {s.gradient_clip}, {s.epochs} epochs in "
            f"batches of {s.batch_sequences} sequences, {s.reduction} loss"
        )


@torch.no_grad()
def measure_queries(model: nn.Module, queries: Sequence[Query], tokens: int = 0) -> NDArray[np.float64]:
    """f of every query (docs/method.md#losses): the signed sum of log p of its measured tokens, nats, [Q].

    tokens: padded tokens of a forward over several queries at once, a third of the time and other last bits; 0: each
    alone. Padding stands behind a query, where nothing of it sees it.
    """
    model.eval()
    device = next(model.parameters()).device
    parts = [(number, part) for number, query in enumerate(queries) for part in query.parts]
    values = np.zeros(len(queries))
    for rows in micro_batches([len(part.token_ids) for _, part in parts], max(1, tokens)):
        ids, _ = pad([np.asarray(parts[row][1].token_ids) for row in rows])
        logits_btv = model(input_ids=torch.tensor(ids, device=device), use_cache=False).logits
        for (number, part), logits_tv in zip((parts[row] for row in rows), logits_btv, strict=True):
            at = torch.tensor(part.positions, device=device)
            # The input position t - 1 predicts token t.
            log_p_v = torch.log_softmax(logits_tv[at - 1].double(), dim=-1)
            own = torch.tensor(part.token_ids, device=device)[at, None]
            values[number] += part.sign * float(log_p_v.gather(1, own).sum())
    return values


def trainings(kept_mn: NDArray[np.bool_], seeds: Sequence[int]) -> list[tuple[NDArray[np.int64], int]]:
    """(chosen rows, seed) of every retraining, row by row. kept_mn: [M, N], the sequences that each keeps."""
    return [(np.flatnonzero(kept_n), seed) for kept_n in kept_mn for seed in seeds]


def check_affordable(trainings: int, seconds_each: float, max_hours: float) -> float:
    """The hours that many trainings take.

    Raises:
        ConfigError: where that is more than `max_hours`, with the estimate and the fix.
    """
    hours = trainings * seconds_each / 3600
    if hours > max_hours:
        raise ConfigError(
            f"{trainings} trainings of {seconds_each:.1f} s each would take {hours:.2g} hours, more than "
            f"max_hours={max_hours}; take fewer subsets, seeds, queries or epochs, a smaller model or corpus, or raise "
            "max_hours (trainings that are finished are kept)."
        )
    return hours


def left_out(
    proponents: Mapping[str, Iterable[int]], kept_mn: NDArray[np.bool_], sequence_ids: NDArray[np.int64]
) -> dict[str, list[int]]:
    """Which trainings hold none of a query's proponents: query id -> rows of `kept_mn`, for queries with any such.

    proponents: by query, the sequences known to state its fact. kept_mn: [M, N], the sequences that each training kept.
    A model that never saw a fact measures something else than its neighbours: such a query is to be named.

    Raises:
        ConfigError: where a proponent is no sequence of this corpus, or a query has none.
    """
    found = {}
    for query, wanted in proponents.items():
        ids = np.unique(np.asarray(list(wanted), np.int64))
        stating = np.isin(sequence_ids, ids)
        if not len(ids) or stating.sum() != len(ids):
            raise ConfigError(
                f"query {query!r}: {len(ids)} proponents are given and {int(stating.sum())} of them are sequences of "
                "this corpus; give the sequence ids that state its fact."
            )
        rows = np.flatnonzero(~(kept_mn & stating).any(axis=1)).tolist()
        if rows:
            found[query] = rows
    return found


def _digest(chosen: NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(chosen, "<i8").tobytes()).hexdigest()
