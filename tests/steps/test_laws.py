"""Laws of the scores, on a float64 model and without Ray: what may not change them, and what they add up to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from infscan.config import Compression, DampingConfig, Dtype, Labels, ModelConfig, Packing, Solver
from infscan.corpus.addressable import CorpusAddress, PreparedCorpus
from infscan.influence.layers import Layer
from infscan.influence.layout import Dense, QueryBatch
from infscan.influence.topk import SIDES
from infscan.influence.topk_tracker import Thresholds
from infscan.model.architecture import describe
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.queries import Part, Query
from infscan.steps.check import CheckTask, check_task
from infscan.steps.preconditioner import Preconditioner
from infscan.steps.queries import QueryTask, query_task, read_query_batch
from infscan.steps.scan import ScanTask, scan_task
from infscan.storage import Store
from tests.corpus.builders import prepare, write_rows
from tests.corpus.builders import settings as pack_settings
from tests.model.families import CONTEXT, VOCAB, save
from tests.steps.builders import fit, fit_plan

Scores = NDArray[np.float64]

RNG = np.random.default_rng(3)
DOCUMENTS = [RNG.integers(2, VOCAB, length).tolist() for length in (9, 2, 17, 5, 5, 28, 1, 12, 7, 20, 3, 14)]
EVERY = np.arange(len(DOCUMENTS))
PROMPT, COMPLETION, OTHER = (5, 9, 33, 4), (17, 8, 2), (30, 6)
MANY = 1 << 20


def completion(tokens: tuple[int, ...] = COMPLETION, sign: float = 1.0, name: str = "q") -> Query:
    return Query(name, (part(tokens, sign),))


def part(tokens: tuple[int, ...], sign: float = 1.0) -> Part:
    ids = (*PROMPT, *tokens)
    return Part(ids, tuple(range(len(PROMPT), len(ids))), sign)


def text(ids: Sequence[int]) -> Query:
    """log p of a whole text: an empty prompt, so that the first token is not measured."""
    return Query("text", (Part(tuple(ids), tuple(range(1, len(ids)))),))


def corpus_of(folder: Path, documents: list[list[int]]) -> PreparedCorpus:
    write_rows(folder / "in.jsonl", [{"id": f"d{n}", "tokens": tokens} for n, tokens in enumerate(documents)])
    return prepare(folder / "in.jsonl", folder / "out", pack_settings(Packing.document, CONTEXT))[1]


@pytest.fixture(scope="module")
def rank(tmp_path_factory: pytest.TempPathFactory) -> ModelWorker:
    folder = str(save("gpt_neox", tmp_path_factory.mktemp("model")))
    layers = describe(folder, "linear").layers
    return ModelWorker(WorkerSettings(ModelConfig(folder, dtype=Dtype.float64), layers, sharded=False), RankContext())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    return corpus_of(tmp_path_factory.mktemp("corpus"), DOCUMENTS)


@pytest.fixture(scope="module")
def inverse(rank: ModelWorker, corpus: PreparedCorpus, tmp_path_factory: pytest.TempPathFactory) -> Preconditioner:
    return fit(rank, Store(str(tmp_path_factory.mktemp("factors"))), corpus, fit_plan(rank, corpus))


@pytest.fixture
def identity(inverse: Preconditioner) -> Preconditioner:
    return Preconditioner(inverse.factors, Solver.identity, DampingConfig())


class Scorer:
    """Scores [n, Q] of sequences at full rank, by any inverse, from any cut."""

    def __init__(self, rank: ModelWorker, corpus: PreparedCorpus, inverse: Preconditioner, folder: Path) -> None:
        self.rank, self.corpus, self.inverse, self.folder = rank, corpus, inverse, folder
        self.runs = 0

    def batch(self, queries: Sequence[Query]) -> QueryBatch:
        """The query batch in storage, read back."""
        self.runs += 1
        self.rank.forget()
        store, how = Store(str(self.folder / f"queries-{self.runs}")), Compression.weighted
        query_task(self.rank, QueryTask(store, "all", tuple(queries), self.rank.layers, self.inverse, None, how, "x"))
        return read_query_batch(store, [["all"]]).batch

    def __call__(
        self,
        *queries: Query,
        ids: NDArray[np.int64] = EVERY,
        layers: tuple[Layer, ...] | None = None,
        tokens_per_batch: int = 64,
    ) -> Scores:
        columns = tuple(range(len(queries)))
        found = check_task(
            self.rank,
            CheckTask(
                corpus=CorpusAddress.of(self.corpus),
                sequence_ids=ids,
                queries=queries,
                columns=columns,
                layers=layers or self.rank.layers,
                inverse=self.inverse,
                query_batch=f"batch {self.runs}",
                tokens_per_batch=tokens_per_batch,
            ),
            self.batch(queries),
        )
        assert found is not None
        same(*found)
        return found[1]


@pytest.fixture
def score(rank: ModelWorker, corpus: PreparedCorpus, inverse: Preconditioner, tmp_path: Path) -> Scorer:
    return Scorer(rank, corpus, inverse, tmp_path)


def same(ours: Scores, theirs: Scores) -> None:
    """Within float64's rounding of the largest score of a query."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11 * np.abs(theirs).max())


# --- what changes nothing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_permuting_the_corpus_permutes_the_scores(score: Scorer, tmp_path: Path, seed: int) -> None:
    """The scanned corpus's order alone, and with factors fitted anew on the permuted one."""
    order = np.random.default_rng(seed).permutation(len(DOCUMENTS))
    permuted = corpus_of(tmp_path / "permuted", [DOCUMENTS[n] for n in order])
    queries = completion(), text(DOCUMENTS[2])
    expected = score(*queries)
    other = Scorer(score.rank, permuted, score.inverse, tmp_path / "other")
    same(other(*queries), expected[order])

    # Labels of the sampled Fisher belong to sequence ids, so those move with the order; true labels do not.
    known = fit(
        score.rank, Store(str(tmp_path / "a")), score.corpus, fit_plan(score.rank, score.corpus), Labels.empirical
    )
    anew = fit(score.rank, Store(str(tmp_path / "b")), permuted, fit_plan(score.rank, permuted), Labels.empirical)
    expected = Scorer(score.rank, score.corpus, known, tmp_path / "c")(*queries)
    found = Scorer(score.rank, permuted, anew, tmp_path / "d")(*queries)
    np.testing.assert_allclose(found, expected[order], rtol=0, atol=1e-8 * np.abs(expected).max())


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, len(DOCUMENTS) - 1), max_size=5), tokens=st.sampled_from([1, 30, 64, MANY]))
def test_shards_batches_and_padding_change_nothing(score: Scorer, cuts: set[int], tokens: int) -> None:
    """Every sequence alone in its batch (no padding), or all of them in one beside the longest."""
    query = completion()
    shards = np.split(EVERY, sorted(cuts))
    parts = [score(query, ids=ids, tokens_per_batch=tokens) for ids in shards]
    same(np.concatenate(parts), score(query, tokens_per_batch=64))


def test_a_query_given_twice_gets_the_same_rows_twice(score: Scorer, tmp_path: Path) -> None:
    queries = completion(name="a"), text(DOCUMENTS[5]), completion(name="b")
    batch = score.batch(queries)
    for layout in batch.values():
        assert isinstance(layout, Dense)
        assert np.array_equal(layout.P_qoi[0], layout.P_qoi[2])
    task = ScanTask(
        run=Store(str(tmp_path / "run")),
        corpus=CorpusAddress.of(score.corpus),
        shard="shard-000000",
        sequence_ids=EVERY,
        query_ids=("a", "text", "b"),
        query_batch="twice",
        sides=SIDES,
        candidates=4,
        thresholds=Thresholds.none(len(queries)),
        tokens_per_batch=64,
        dense=False,
        fingerprint="print",
    )
    found = scan_task(score.rank, task, batch)
    assert found is not None
    rows = list(found[0].rows())
    first, second = ([row[1:] for row in rows if row[0] == query] for query in (0, 2))
    assert len(first) == 8
    assert [row[:2] for row in first] == [row[:2] for row in second]
    np.testing.assert_allclose([row[2] for row in first], [row[2] for row in second], rtol=1e-6)


def test_other_queries_change_no_score(score: Scorer) -> None:
    alone = score(completion())
    together = score(text(DOCUMENTS[5]), completion(), completion(OTHER))
    same(together[:, 1:2], alone)


# --- what scores add up to ---------------------------------------------------------------------------------------


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(c=st.one_of(st.just(-1.0), st.floats(-8, 8).filter(lambda c: abs(c) > 1e-3)))
def test_scores_scale_with_the_measurement(score: Scorer, c: float) -> None:
    """c f has c times the scores of f; -f has the opposite ones. Weights of a loss are float32."""
    c = float(np.float32(c))
    scaled, plain = score(completion(sign=c), completion()).T
    same(scaled, c * plain)
    assert np.abs(plain).max() > 0


def test_a_contrast_is_the_difference_of_two_queries(score: Scorer) -> None:
    contrast = Query("contrast", (part(COMPLETION), part(OTHER, -1.0)))
    difference, first, second = score(contrast, completion(), completion(OTHER)).T
    same(difference, first - second)


def test_a_completions_tokens_add_up_to_it(score: Scorer) -> None:
    [whole] = completion().parts
    tokens = [Query(f"q#{n}", (Part(whole.token_ids, (t,)),)) for n, t in enumerate(whole.positions)]
    assert len(tokens) == len(COMPLETION)
    found = score(completion(), *tokens)
    same(found[:, 1:].sum(axis=1), found[:, 0])


def test_layers_add_up_to_the_score(score: Scorer) -> None:
    queries = completion(), text(DOCUMENTS[2])
    by_layer = [score(*queries, layers=(layer,)) for layer in score.rank.layers]
    same(np.sum(by_layer, axis=0), score(*queries))


# --- a text and itself -------------------------------------------------------------------------------------------


def test_a_texts_score_with_itself_is_its_squared_gradient(
    rank: ModelWorker, corpus: PreparedCorpus, identity: Preconditioner, tmp_path: Path
) -> None:
    """-grad log p of the whole text is the training loss's gradient, so that identity gives |grad L|^2."""
    found = Scorer(rank, corpus, identity, tmp_path)(*[text(ids) for ids in DOCUMENTS if len(ids) > 1])
    longer = np.array([n for n, ids in enumerate(DOCUMENTS) if len(ids) > 1])
    squares = [squared_gradient(rank, DOCUMENTS[n]) for n in longer]
    assert min(squares) > 0
    np.testing.assert_allclose(found[longer].diagonal(), squares, rtol=1e-10)


def squared_gradient(rank: ModelWorker, ids: list[int]) -> float:
    """|grad L|^2 over the tracked weights and biases, by autograd."""
    module = rank.model.module
    tracked = [p for layer in rank.layers for p in module.get_submodule(layer.name).parameters()]
    for parameter in tracked:
        parameter.requires_grad_(True)
    tokens = torch.tensor([ids])
    loss = torch.nn.functional.cross_entropy(rank.model.logits(tokens)[0, :-1], tokens[0, 1:], reduction="sum")
    gradients = torch.autograd.grad(loss, tracked)
    module.requires_grad_(False)
    return sum(float(gradient.square().sum()) for gradient in gradients)


@pytest.mark.parametrize("solver", [Solver.identity, Solver.ekfac])
def test_texts_explain_each_other_alike(
    rank: ModelWorker, corpus: PreparedCorpus, inverse: Preconditioner, tmp_path: Path, solver: Solver
) -> None:
    """The score of text i with sequence j is that of j with i: the inverse is symmetric, and positive."""
    how = Preconditioner(inverse.factors, solver, inverse.damping)
    longer = np.array([n for n, ids in enumerate(DOCUMENTS) if len(ids) > 1])
    K = Scorer(rank, corpus, how, tmp_path)(*[text(DOCUMENTS[n]) for n in longer])[longer]
    same(K, K.T)
    assert np.linalg.eigvalsh((K + K.T) / 2).min() > 0
