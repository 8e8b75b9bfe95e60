"""A mixture of experts through the whole job, against an EK-FAC of plain autograd over transformers' own eager code."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from infscan import pipeline
from infscan.config import Config
from infscan.results.read import read_layers, read_scores, read_top
from tests.model import zoo
from tests.steps.runs import answer_here, small_run, token_corpus, token_queries

STACKS = ("gate_up_proj", "down_proj")


@dataclass
class Reference(TorchFunctionMode):
    """Every product of an expert's weight that transformers' eager forward makes: its inputs and outputs."""

    model: PreTrainedModel
    transposed: bool
    seen: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        super().__init__()
        self.experts = {
            weight[expert].data_ptr(): f"{name}.{expert}"
            for name, weight in self.model.named_parameters()
            if name.endswith(STACKS)
            for expert in range(len(weight))
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (linear, torch.Tensor.matmul, torch.Tensor.__matmul__) and args[1].data_ptr() in self.experts:
            self.seen[self.experts[args[1].data_ptr()]].append((args[0].detach(), out))
        return out


class Mixture:
    """EK-FAC over a mixture's experts, as docs/method.md says it, in float64."""

    def __init__(self, folder: Path, *, transposed: bool, bias: bool) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, experts_implementation="eager"
        ).eval()
        self.transposed, self.bias = transposed, bias
        self.stacks = [name for name, _ in self.model.named_parameters() if name.endswith(STACKS)]
        self.A: dict[str, list[Tensor]] = defaultdict(list)
        self.S: dict[str, list[Tensor]] = defaultdict(list)

    def loss(self, ids: np.ndarray, first: int = 1) -> Tensor:
        """-log p of the tokens from `first` on."""
        ids_t = torch.from_numpy(ids)
        logits_tv = self.model(ids_t[None]).logits[0]
        return cross_entropy(logits_tv[first - 1 : -1], ids_t[first:], reduction="sum")

    def gradient(self, ids: np.ndarray, first: int = 1) -> dict[str, Tensor]:
        """[O, I(+1)] by expert."""
        self.model.requires_grad_(True)
        self.model.zero_grad()
        self.loss(ids, first).backward()
        parameters = dict(self.model.named_parameters())
        found = {}
        for stack in self.stacks:
            for expert, grad in enumerate(parameters[stack].grad):
                g_oi = grad.T if self.transposed else grad
                if self.bias:
                    g_oi = torch.cat([g_oi, parameters[f"{stack}_bias"].grad[expert, :, None]], dim=1)
                found[f"{stack}.{expert}"] = g_oi.clone()
        return found

    def add_moments(self, ids: np.ndarray) -> None:
        """Each expert's inputs and gradients at outputs, over the tokens that went to it."""
        self.model.requires_grad_(True)
        with Reference(self.model, self.transposed) as reference:
            loss = self.loss(ids)
        made = [(name, a, out) for name, pairs in reference.seen.items() for a, out in pairs]
        for (name, a, _), s in zip(made, torch.autograd.grad(loss, [out for *_, out in made]), strict=True):
            ones = [torch.ones(len(a), 1, dtype=a.dtype)] if self.bias else []
            self.A[name].append(torch.cat([a, *ones], dim=1))
            self.S[name].append(s)

    def moments(self, stack: str, expert: int) -> tuple[Tensor, Tensor]:
        """A and S of an expert, the stack's mean counted as further tokens."""
        names = [f"{stack}.{number}" for number in range(self.experts(stack))]
        found = []
        for kind in (self.A, self.S):
            everything = torch.cat([x for name in names for x in kind[name]])
            mine = torch.cat([everything[:0], *kind[names[expert]]])
            mean, n = everything.T @ everything / len(everything), everything.shape[1]
            found.append((mine.T @ mine + n * mean) / (len(mine) + n))
        return found[0], found[1]

    def experts(self, stack: str) -> int:
        return len(dict(self.model.named_parameters())[stack])


def scores(mixture: Mixture, sequences: list[np.ndarray], queries: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """[N, Q]."""
    gradients = [mixture.gradient(ids) for ids in sequences]
    asked = [mixture.gradient(ids, first) for ids, first in queries]
    for ids in sequences:
        mixture.add_moments(ids)
    found = np.zeros((len(sequences), len(queries)))
    for stack in mixture.stacks:
        rotated = {}
        for expert in range(mixture.experts(stack)):
            A, S = mixture.moments(stack, expert)
            Q_A, Q_S = torch.linalg.eigh(A)[1], torch.linalg.eigh(S)[1]
            name = f"{stack}.{expert}"
            Lambda = torch.stack([(Q_S.T @ g[name] @ Q_A).square() for g in gradients]).mean(dim=0)
            rotated[name] = (Q_A, Q_S, Lambda)
        lam = 0.1 * float(torch.stack([Lambda for *_, Lambda in rotated.values()]).mean())
        for name, (Q_A, Q_S, Lambda) in rotated.items():
            for q, V in enumerate(asked):
                P = Q_S @ ((Q_S.T @ V[name] @ Q_A) / (Lambda + lam)) @ Q_A.T
                found[:, q] += [float((P * g[name]).sum()) for g in gradients]
    return found


@pytest.fixture(params=["qwen3_moe", "gpt_oss"])
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Mixture]:
    folder = zoo.save(request.param, tmp_path / "models")
    oss = request.param == "gpt_oss"
    return folder, Mixture(folder, transposed=oss, bias=oss)


def asked(mixture: tuple[Path, Mixture], tmp_path: Path, *overrides: str) -> tuple[Config, np.ndarray]:
    """A job over the mixture's experts alone, and the scores [N, Q] that it is to give."""
    folder, theirs = mixture
    token_corpus(tmp_path / "corpus.jsonl", 24, T=16, vocab=zoo.VOCAB)
    token_queries(tmp_path / "queries.jsonl", 3, vocab=zoo.VOCAB)
    config = small_run(
        tmp_path,
        f"model.path={folder}",
        r"model.tracked=experts\.(gate_up|down)_proj$",
        "factors.labels=empirical",
        "scan.rank=null",
        "scan.scores=all",
        *overrides,
    )
    rows = [np.asarray(line["tokens"]) for line in _lines(tmp_path / "corpus.jsonl")]
    queries = [(np.asarray(line["input_ids"]), line["prompt_len"]) for line in _lines(tmp_path / "queries.jsonl")]
    return config, scores(theirs, rows, queries)


def check(config: Config, expected: np.ndarray) -> None:
    ours = read_scores(config.output).sort_by("sequence_id")
    for q in range(expected.shape[1]):
        found = np.asarray(ours[f"score_q{q}"])
        assert np.abs(found - expected[:, q]).max() < 1e-5 * np.abs(expected[:, q]).max()


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_whole_job_gives_the_scores_of_plain_autograd(mixture: tuple[Path, Mixture], tmp_path: Path) -> None:
    config, expected = asked(mixture, tmp_path, "model.dtype=float64")
    answer_here(config)
    check(config, expected)
    # What is published is refined: by layer and by token it adds up to the same.
    top = read_top(config.output).to_pylist()
    layers = read_layers(config.output).to_pylist()
    for row in top:
        assert row["score"] == pytest.approx(expected[row["sequence_id"], int(row["query_id"][1:])], rel=1e-4, abs=1e-6)
        mine = [each["score"] for each in layers if (each["query_id"], each["sequence_id"]) == key(row)]
        assert sum(mine) == pytest.approx(row["score"], rel=1e-4, abs=1e-6)


def key(row: dict[str, Any]) -> tuple[str, int]:
    return row["query_id"], row["sequence_id"]


@pytest.mark.slow
def test_so_does_one_on_two_ranks_that_share_the_model(mixture: tuple[Path, Mixture], tmp_path: Path) -> None:
    config, expected = asked(mixture, tmp_path, "cluster.ranks_per_worker=2", "model.dtype=float32")
    pipeline.answer(config)
    check(config, expected)
