"""The whole chain by family, in float64: passes, factors, inverse and scores against autograd and dense algebra.

The other side uses nothing of the method's code: one sequence at a time without padding, gradients of the weights by
autograd, tokens by two plain hooks, and numpy for the rest. It inverts on the training side, the passes on the query's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from infscan.config import Compression, Dtype, Labels, ModelConfig, Packing
from infscan.corpus.addressable import CorpusAddress, PreparedCorpus
from infscan.model.architecture import describe
from infscan.model.loaded import RankContext
from infscan.model.measure import uniforms
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Part, Query
from infscan.results.tensor_files import read_tensors
from infscan.steps.check import CheckTask, check_task
from infscan.steps.factor_files import labels_path, read_layer_factors
from infscan.steps.preconditioner import preconditioned
from infscan.steps.queries import QueryTask, query_task, read_query_batch
from infscan.storage import Store
from tests.corpus.builders import prepare, settings, write_rows
from tests.model.families import CONFIGS, CONTEXT, VOCAB, save
from tests.steps.builders import SEED, fit, fit_plan

Matrix = NDArray[np.float64]

LENGTHS = (9, 5, 17, 2, 12, 1, 24, 7)
CLOSE = 1e-8
# -f of each query: a completion, a whole text, and a difference of two completions.
QUERIES = (
    Query("completion", (Part((5, 9, 33, 4, 17, 8), (4, 5)),)),
    Query("text", (Part((7, 7, 12, 30), (1, 2, 3)),)),
    Query("contrast", (Part((3, 1, 4, 1, 5), (3, 4)), Part((3, 1, 4, 9, 2, 6), (3, 4, 5), -1.0))),
)


class WideNorm(nn.Module):
    """RMSNorm in the model's dtype: the families' own rounds to float32, which would hide differences below 1e-7."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


def widen(module: nn.Module) -> None:
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, WideNorm(child))


# --- the other side ----------------------------------------------------------------------------------------------


@dataclass
class Backward:
    """One backward of one sequence, by layer: tokens a [T, I] and s [T, O], and the weight's own gradient g [O, I]."""

    a: dict[str, Matrix]
    s: dict[str, Matrix]
    g: dict[str, Matrix]


class Plain:
    """A model as transformers loads it, and every linear layer of its blocks."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        widen(self.model)
        self.linears = {
            name: child
            for name, child in self.model.named_modules()
            if isinstance(child, nn.Linear | Conv1D) and any(part.isdigit() for part in name.split("."))
        }

    def log_probabilities(self, ids: list[int]) -> Tensor:
        """[T, V]: row t is of the token that follows position t."""
        return self.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)

    def backward(self, ids: list[int], terms: list[tuple[int, int, float]]) -> Backward:
        """Of the sum of -sign * log p(label) over terms (position, label, sign); the position is the input's."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}

        def keep(name: str, args: tuple[Tensor, ...], out: Tensor) -> None:
            out.retain_grad()
            inputs[name], outputs[name] = args[0], out

        handles = [
            child.register_forward_hook(lambda _, args, out, name=name: keep(name, args, out))
            for name, child in self.linears.items()
        ]
        logs_tv = self.log_probabilities(ids)
        for handle in handles:
            handle.remove()
        self.model.zero_grad(set_to_none=False)
        # A sequence of one token has no loss; it still has gradients, which are zero.
        loss = 0 * logs_tv.sum()
        for position, label, sign in terms:
            loss = loss - sign * logs_tv[position, label]
        loss.backward()
        found = Backward({}, {}, {})
        for name, child in self.linears.items():
            a = inputs[name].detach().reshape(len(ids), -1).numpy()
            weight = child.weight.grad.clone()
            g = (weight.T if isinstance(child, Conv1D) else weight).numpy()
            if child.bias is not None:
                a = np.concatenate([a, np.ones((len(ids), 1))], axis=1)
                g = np.concatenate([g, child.bias.grad.clone().numpy()[:, None]], axis=1)
            found.a[name], found.g[name] = a, g
            found.s[name] = outputs[name].grad.reshape(len(ids), -1).numpy()
        return found

    def training(self, ids: list[int]) -> Backward:
        return self.backward(ids, [(t - 1, ids[t], 1.0) for t in range(1, len(ids))])

    def draw(self, ids: list[int], sequence_id: int) -> list[int]:
        """The sampled Fisher's labels, one per position, from the numbers of (seed, sequence, position)."""
        [numbers] = uniforms(SEED, np.asarray([sequence_id]), len(ids))
        sums_tv = self.log_probabilities(ids).detach().exp().numpy().cumsum(axis=1)
        return [int((sums <= number * sums[-1]).sum()) for sums, number in zip(sums_tv, numbers, strict=True)]


@dataclass
class Dense:
    """One layer's A, S, Lambda and damping, and the inverse by explicit division."""

    A: Matrix
    S: Matrix
    Q_A: Matrix
    Q_S: Matrix
    Lambda: Matrix
    damping: float

    @staticmethod
    def of(name: str, sequences: list[Backward]) -> Dense:
        a_mi = np.concatenate([one.a[name] for one in sequences])
        s_mo = np.concatenate([one.s[name] for one in sequences])
        A = sum(np.outer(a, a) for a in a_mi) / len(a_mi)
        S = sum(np.outer(s, s) for s in s_mo) / len(s_mo)
        _, Q_A = np.linalg.eigh(A)
        _, Q_S = np.linalg.eigh(S)
        Lambda = np.mean([(Q_S.T @ one.g[name] @ Q_A) ** 2 for one in sequences], axis=0)
        return Dense(A, S, Q_A, Q_S, Lambda, 0.1 * float(Lambda.mean()))

    def solve(self, g: Matrix) -> Matrix:
        return self.Q_S @ ((self.Q_S.T @ g @ self.Q_A) / (self.Lambda + self.damping)) @ self.Q_A.T


class Truth:
    """Scores by layer [Q, N], from explicit gradients alone: -<grad f, (G + lambda)^-1 grad L(z)>."""

    def __init__(self, plain: Plain, sequences: list[list[int]], labels: Labels) -> None:
        self.drawn = [plain.draw(ids, number) for number, ids in enumerate(sequences)]
        training = [plain.training(ids) for ids in sequences]
        fisher = training
        if labels is Labels.sampled:
            fisher = [
                plain.backward(ids, [(t, label, 1.0) for t, label in enumerate(drawn)])
                for ids, drawn in zip(sequences, self.drawn, strict=True)
            ]
        self.factors = {name: Dense.of(name, fisher) for name in plain.linears}
        # grad f, not of -f: the sign is the definition's.
        self.of_f: list[dict[str, Matrix]] = []
        for query in QUERIES:
            parts = [
                plain.backward(list(part.token_ids), [(t - 1, part.token_ids[t], -part.sign) for t in part.positions]).g
                for part in query.parts
            ]
            self.of_f.append({name: np.sum([part[name] for part in parts], axis=0) for name in plain.linears})
        self.scores = {
            name: np.array([[-np.sum(f[name] * known.solve(one.g[name])) for one in training] for f in self.of_f])
            for name, known in self.factors.items()
        }


# --- the passes --------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """One family: what the passes run on, and the other side's results by kind of label."""

    folder: Path
    rank: ModelWorker
    corpus: PreparedCorpus
    truth: dict[Labels, Truth]

    def tracking(self, tracked: str) -> ModelWorker:
        rank = copy.copy(self.rank)
        rank.layers = describe(str(self.folder), tracked).layers
        rank._cache = {}
        return rank


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    rows = [{"id": f"d{n}", "tokens": rng.integers(2, VOCAB, length).tolist()} for n, length in enumerate(LENGTHS)]
    write_rows(folder / "in.jsonl", rows)
    return prepare(folder / "in.jsonl", folder / "out", settings(Packing.document, CONTEXT))[1]


@pytest.fixture(scope="module", params=list(CONFIGS))
def subject(
    request: pytest.FixtureRequest, corpus: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory
) -> Subject:
    folder = save(request.param, tmp_path_factory.mktemp("model"))
    layers = describe(str(folder), "linear").layers
    rank = ModelWorker(WorkerSettings(ModelConfig(str(folder), Dtype.float64), layers, sharded=False), RankContext())
    widen(rank.model.module)
    plain = Plain(folder)
    assert {layer.name for layer in layers} == set(plain.linears)
    sequences = [sequence.token_ids.tolist() for sequence in corpus.read(np.arange(corpus.sequences))]
    assert [len(ids) for ids in sequences] == list(LENGTHS)
    return Subject(folder, rank, corpus, {labels: Truth(plain, sequences, labels) for labels in Labels})


def off(ours: Tensor | Matrix, theirs: Matrix) -> float:
    return float(np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(
    ("tracked", "labels"),
    [
        ("mlp", Labels.sampled),
        ("attention", Labels.empirical),
        ("linear", Labels.sampled),
        ("linear", Labels.empirical),
    ],
)
def test_scores_are_those_of_autograd_and_dense_algebra(
    subject: Subject, tmp_path: Path, tracked: str, labels: Labels
) -> None:
    rank, corpus, truth = subject.tracking(tracked), subject.corpus, subject.truth[labels]
    store = Store(str(tmp_path / "factors"))
    # Batches of unequal lengths, several of them, in two slices.
    inverse = fit(rank, store, corpus, fit_plan(rank, corpus, slices=2, tokens_per_batch=40), labels)

    if labels is Labels.sampled:
        stored = [row for n in range(2) for row in read_tensors(store, labels_path(n))["labels"].tolist()]
        assert [row[: len(drawn)] for row, drawn in zip(stored, truth.drawn, strict=True)] == truth.drawn

    P = preconditioned(rank, QUERIES, rank.layers, inverse)
    for layer in rank.layers:
        factors, known = read_layer_factors(store, layer), truth.factors[layer.name]
        assert off(factors.A.dense(), known.A) < CLOSE, layer
        assert off(factors.S.dense(), known.S) < CLOSE, layer
        # Of Lambda, what does not depend on the eigenvectors' signs and order: |g|^2 is kept by a rotation.
        assert float(factors.Lambda.sum()) == pytest.approx(known.Lambda.sum(), rel=CLOSE)
        for P_oi, f in zip(P[layer.name], truth.of_f, strict=True):
            assert off(P_oi, -known.solve(f[layer.name])) < CLOSE, layer

    batch = Store(str(tmp_path / "queries"))
    query_task(rank, QueryTask(batch, "all", QUERIES, rank.layers, inverse, None, Compression.weighted, "print"))
    task = CheckTask(
        corpus=CorpusAddress.of(corpus),
        sequence_ids=np.arange(corpus.sequences),
        queries=QUERIES,
        columns=(0, 1, 2),
        layers=rank.layers,
        inverse=inverse,
        query_batch="print",
        tokens_per_batch=40,
    )
    found = check_task(rank, task, read_query_batch(batch, [["all"]]).batch)
    assert found is not None
    expected = sum(truth.scores[layer.name] for layer in rank.layers)
    for scores_nq in found:  # with the stored query batch, and with gradients kept in memory
        for ours, theirs in zip(scores_nq.T, expected, strict=True):
            assert off(ours, theirs) < CLOSE
