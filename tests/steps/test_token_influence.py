"""Scores taken apart: margins add up, token influences are what dropping a token's loss or moving the weights does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from infscan.config import Dtype, ModelConfig, Packing
from infscan.corpus.addressable import PreparedCorpus
from infscan.corpus.sequences import Sequence
from infscan.model.architecture import describe
from infscan.model.experts import is_transposed
from infscan.model.loaded import RankContext
from infscan.model.target_influence import target_influence
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Part, Query, by_token
from infscan.steps.explain import Explained, ExplainTask, explain_task
from infscan.steps.preconditioner import Preconditioner, preconditioned
from infscan.steps.refine import pairs_of
from infscan.steps.targets import pair_targets
from infscan.storage import Store
from tests.corpus.builders import prepare, write_rows
from tests.corpus.builders import settings as pack_settings
from tests.model import zoo
from tests.model.families import CONFIGS, CONTEXT, VOCAB, save
from tests.steps.builders import fit, fit_plan

RNG = np.random.default_rng(3)
LENGTHS = (9, 2, 17, 5, 28, 1, 12)
DOCUMENTS = [RNG.integers(2, VOCAB, length).tolist() for length in LENGTHS]
QUERIES = (
    Query("name", (Part((5, 9, 33, 4, 17, 8, 2), (4, 5, 6)),)),
    Query("rather", (Part((5, 9, 30, 6), (2, 3)), Part((5, 9, 7), (2,), -1.0))),
)


# GPT-2 adds positions to the embedding and keeps its weights transposed; llama has no bias and three layers to an MLP;
# Qwen 3's mixture and GPT-OSS's have experts, these with biases, which an explanation takes apart token by token too.
@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen3_moe", "gpt_oss"])
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelWorker, PreparedCorpus]:
    made = save if request.param in CONFIGS else zoo.save
    folder = str(made(request.param, tmp_path_factory.mktemp("model")))
    layers = describe(folder, "linear").layers
    rank = ModelWorker(WorkerSettings(ModelConfig(folder, dtype=Dtype.float64), layers, sharded=False), RankContext())
    root = tmp_path_factory.mktemp("corpus")
    write_rows(root / "in.jsonl", [{"id": f"d{n}", "tokens": tokens} for n, tokens in enumerate(DOCUMENTS)])
    return rank, prepare(root / "in.jsonl", root / "out", pack_settings(Packing.document, CONTEXT))[1]


@pytest.fixture(scope="module")
def inverse(opened: tuple[ModelWorker, PreparedCorpus], tmp_path_factory: pytest.TempPathFactory) -> Preconditioner:
    rank, corpus = opened
    return fit(rank, Store(str(tmp_path_factory.mktemp("factors"))), corpus, fit_plan(rank, corpus))


def explained(
    rank: ModelWorker,
    inverse: Preconditioner,
    sequences: list[Sequence],
    queries: tuple[Query, ...] = QUERIES,
    **changes: Any,
) -> list[list[Explained]]:
    """By sequence, then by query."""
    rank.forget()
    wanted = tuple(tuple(range(len(queries))) for _ in sequences)
    task = ExplainTask("all", queries, rank.layers, inverse, tuple(sequences), wanted, 64, own_tokens=True)
    found = explain_task(rank, replace(task, **changes))
    return [found[start : start + len(queries)] for start in range(0, len(found), len(queries))]


def sequences_of(corpus: PreparedCorpus) -> list[Sequence]:
    return corpus.read(np.arange(corpus.sequences))


def close(ours: np.ndarray | None, theirs: np.ndarray | None) -> None:
    """Within rounding, which is float32's where a family computes its norms in it (llama)."""
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max())


def masked(sequence: Sequence, counted: np.ndarray) -> Sequence:
    return replace(sequence, loss=counted)


def test_output_tokens_add_up_to_the_score(opened: tuple[ModelWorker, PreparedCorpus], inverse: Preconditioner) -> None:
    rank, corpus = opened
    for by_query in explained(rank, inverse, sequences_of(corpus)):
        for one in by_query:
            assert one.output_t is not None
            assert float(one.output_t.sum()) == pytest.approx(one.score, rel=1e-5, abs=1e-5)


def test_an_output_token_is_worth_what_its_loss_adds(
    opened: tuple[ModelWorker, PreparedCorpus], inverse: Preconditioner
) -> None:
    """Brute force: the score with every token's loss, less the score with every one but this token's."""
    rank, corpus = opened
    sequence = sequences_of(corpus)[0]
    T = len(sequence)
    [whole] = explained(rank, inverse, [sequence])
    without = explained(rank, inverse, [masked(sequence, np.arange(T) != t) for t in range(1, T)], own_tokens=False)
    for query, one in enumerate(whole):
        assert one.output_t is not None
        dropped = [one.score - by_query[query].score for by_query in without]
        np.testing.assert_allclose(one.output_t[1:], dropped, rtol=1e-5, atol=1e-5 * np.abs(dropped).max())
        assert one.output_t[0] == 0


def test_targets_are_the_output_tokens_in_one_forward(
    opened: tuple[ModelWorker, PreparedCorpus], inverse: Preconditioner
) -> None:
    """Padded, in a batch, with a loss on some tokens, and with the head among the tracked layers or not."""
    rank, corpus = opened
    sequences = [masked(one, np.arange(len(one)) % 3 != 1) for one in sequences_of(corpus)[:3]]
    P = preconditioned(rank, QUERIES, rank.layers, inverse)
    (batch,) = rank.batches(sequences, 1 << 20)
    expected = explained(rank, inverse, sequences)
    together_kbt = target_influence(rank, batch, rank.layers, P, batch.loss()).numpy()
    for query in range(len(QUERIES)):
        mine = {name: matrices[query : query + 1] for name, matrices in P.items()}
        found_bt = target_influence(rank, batch, rank.layers, mine, batch.loss())[0].numpy()
        # A pass that several queries share has the same numbers as each one's own.
        close_to = 1e-6 * np.abs(found_bt).max()
        np.testing.assert_allclose(together_kbt[query], found_bt, rtol=1e-6, atol=close_to)
        for place, row in enumerate(batch.rows.tolist()):
            close(found_bt[place, : len(sequences[row]) - 1], expected[row][query].output_t[1:])
            assert not found_bt[place, len(sequences[row]) - 1 :].any()


def test_pairs_that_share_a_pass_have_the_numbers_of_pairs_alone(
    opened: tuple[ModelWorker, PreparedCorpus], inverse: Preconditioner
) -> None:
    """Rows that share all their queries, rows with some of them, and rows with one."""
    rank, corpus = opened
    sequences = sequences_of(corpus)
    P = {name: torch.cat([V, V.flip(0) + V]) for name, V in preconditioned(rank, QUERIES, rank.layers, inverse).items()}
    wanted = [(0, 1, 2, 3)] * 3 + [(0, 2), (1,), (0, 1, 2, 3), (3,)]
    together_nt = pair_targets(rank, sequences, wanted, rank.layers, P, 64).numpy()
    pairs = pairs_of(wanted)
    assert len(pairs) == len(together_nt) == 20
    for (row, query), found_t in zip(pairs, together_nt, strict=True):
        [alone_t] = pair_targets(rank, [sequences[row]], [(query,)], rank.layers, P, 64).numpy()
        tolerance = 1e-6 * np.abs(alone_t).max()
        np.testing.assert_allclose(found_t[: len(alone_t)], alone_t, rtol=1e-6, atol=tolerance)
        assert not found_t[len(alone_t) :].any()


@contextmanager
def moved(rank: ModelWorker, P: dict[str, torch.Tensor], by: float) -> Iterator[None]:
    """The model with its tracked weights at theta + by * P."""
    modules = dict(rank.model.module.named_modules())
    for sign in (1.0, -1.0):
        for layer in rank.layers:
            D = sign * by * P[layer.name]
            W = D[:, :-1] if layer.bias else D
            if layer.stack:
                path, _, stack = layer.stack.rpartition(".")
                holder, expert = modules[path], int(layer.name.rpartition(".")[2])
                getattr(holder, stack).data[expert] += W.T if is_transposed(holder) else W
                if layer.bias:
                    getattr(holder, f"{stack}_bias").data[expert] += D[:, -1]
                continue
            module = modules[layer.name]
            # Conv1D, of GPT-2, keeps its weight transposed.
            module.weight.data += W.T if type(module).__name__ == "Conv1D" else W
            if layer.bias:
                module.bias.data += D[:, -1]
        if sign > 0:
            yield


def log_probabilities(rank: ModelWorker, ids: np.ndarray) -> torch.Tensor:
    """log p(x_t | x_<t) for t >= 1."""
    logits = rank.model.logits(torch.from_numpy(ids)[None])[0]
    return torch.log_softmax(logits[:-1], -1)[torch.arange(len(ids) - 1), torch.from_numpy(ids)[1:]]


def scaled_gradient(rank: ModelWorker, ids: np.ndarray) -> torch.Tensor:
    """<e_t, grad_{e_t} log p(z)>, by autograd through the embedding's output."""
    held: list[torch.Tensor] = []
    embedding = rank.model.module.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _m, _a, out: held.append(out.requires_grad_(True)))
    [gradient] = torch.autograd.grad(log_probabilities(rank, ids).sum(), held)
    handle.remove()
    return (gradient[0] * held[0][0]).sum(-1).detach()


def test_token_influences_are_the_papers_difference_quotients(
    opened: tuple[ModelWorker, PreparedCorpus], inverse: Preconditioner
) -> None:
    """Grosse et al. 2023, B.1: theta' = theta + eps (G + lambda)^-1 grad f against theta (here: theta less as much)."""
    rank, corpus = opened
    sequence = sequences_of(corpus)[2]
    [by_query] = explained(rank, inverse, [sequence])
    P = preconditioned(rank, QUERIES, rank.layers, inverse)
    for query, one in enumerate(by_query):
        assert one.output_t is not None
        assert one.input_t is not None
        # P = (G + lambda)^-1 grad(-f): theta' is theta - eps P.
        mine = {name: P_qoi[query] for name, P_qoi in P.items()}
        # Llama computes its norms in float32, whose rounding a smaller step would magnify.
        step, tolerance = (1e-2, 1e-2) if rank.layers[0].name.startswith("model.layers") else (1e-4, 1e-4)
        eps = step / max(float(D.norm()) for D in mine.values())
        at = []
        for by in (-eps, eps):
            with moved(rank, mine, by):
                ids = sequence.token_ids
                at.append((log_probabilities(rank, ids).detach(), scaled_gradient(rank, ids)))
        output, entered = ((up - down).numpy() / (2 * eps) for up, down in zip(*at, strict=True))
        for ours, theirs in ((one.output_t[1:], output), (one.input_t, entered)):
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max() / 10)


def test_a_masked_token_has_no_influence_as_an_output(
    opened: tuple[ModelWorker, PreparedCorpus], inverse: Preconditioner
) -> None:
    rank, corpus = opened
    sequence = sequences_of(corpus)[4]
    counted = np.arange(len(sequence)) % 3 == 1
    [[one, _]] = explained(rank, inverse, [masked(sequence, counted)])
    assert one.output_t is not None
    assert not one.output_t[~counted].any()
    assert float(one.output_t.sum()) == pytest.approx(one.score, rel=1e-5)


def test_a_queries_tokens_add_up_to_it(opened: tuple[ModelWorker, PreparedCorpus], inverse: Preconditioner) -> None:
    """Also where a contrast counts against it."""
    rank, corpus = opened
    sequences = sequences_of(corpus)
    whole = explained(rank, inverse, sequences, own_tokens=False)
    for number, query in enumerate(QUERIES):
        split = by_token(query)
        assert [one.id for one in split] == [f"{query.id}#{i}" for i in range(3)]
        parts = explained(rank, inverse, sequences, tuple(split), own_tokens=False)
        for by_query, by_part in zip(whole, parts, strict=True):
            summed = np.sum([part.matrix_lt for part in by_part], axis=0)
            close(summed, by_query[number].matrix_lt)


def test_what_stands_beside_it_changes_no_explanation(
    opened: tuple[ModelWorker, PreparedCorpus], inverse: Preconditioner
) -> None:
    rank, corpus = opened
    sequences = sequences_of(corpus)
    together = explained(rank, inverse, sequences)
    for sequence, ours in zip(sequences, together, strict=True):
        [alone] = explained(rank, inverse, [sequence])
        for one, other in zip(ours, alone, strict=True):
            close(one.matrix_lt, other.matrix_lt)
            close(one.input_t, other.input_t)


def test_groups_of_layers_add_up(opened: tuple[ModelWorker, PreparedCorpus], inverse: Preconditioner) -> None:
    rank, corpus = opened
    sequence = sequences_of(corpus)[2]
    [[whole, _]] = explained(rank, inverse, [sequence])
    parts = [explained(rank, inverse, [sequence], layers=(layer,))[0][0] for layer in rank.layers]
    close(np.concatenate([part.matrix_lt for part in parts]), whole.matrix_lt)
    for name in ("output_t", "input_t"):
        summed = np.sum([getattr(part, name) for part in parts], axis=0)
        close(summed, getattr(whole, name))
