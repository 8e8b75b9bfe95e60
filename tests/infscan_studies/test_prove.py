"""Steps of training on rows of a run: what one does to first order, that it is taken back, and what a table says."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from infscan.config import Backend, ClusterConfig
from infscan.errors import ConfigError, QueryError
from infscan.report.assemble import Archive
from infscan.report.contents import run_contents
from infscan.results.read import read_top
from infscan.results.schema import to_parquet
from infscan.steps.finished import reopen
from infscan.steps.run import Run
from infscan.storage import Store
from infscan_studies.config import ProveJob, StepOptimizer
from infscan_studies.prove import (
    BM25,
    OPPONENT,
    PROPONENT,
    RANDOM,
    SCHEMA,
    after_steps,
    agreement_of,
    by_kind,
    effects_table,
    prove,
    words,
)
from infscan_studies.truth.retrain import measure_queries
from infscan_studies.truth.steps import effects, find_learning_rate, loss_now, sequence_loss, trained
from tests.steps.runs import answer_here, compose, text_corpus, text_queries, tiny_model

HERE = ClusterConfig(backend=Backend.in_process)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("prove")
    config = compose(
        "scan",
        f"model.path={tiny_model(root / 'model', tokenizer=True)}",
        f"corpus.path={text_corpus(root / 'corpus.jsonl', 30)}",
        f"queries.path={text_queries(root / 'queries.jsonl', 2)}",
        "scan.top_k=6",
        "corpus.sequence_length=16",
        "factors.slices=1",
        f"output={root / 'run'}",
    )
    answer_here(config)
    return str(root / "run")


@pytest.fixture(scope="module")
def opened(run: str) -> Iterator[Run]:
    with reopen(run, HERE) as opened:
        yield opened


@pytest.fixture(scope="module")
def found(run: str, opened: Run) -> tuple[pa.Table, dict[str, float]]:
    return prove(opened, ProveJob(run=run, rows=3, controls=2, cluster=HERE))


def test_a_step_of_sgd_is_the_gradient_dot_product_to_first_order_and_is_taken_back(run: str, opened: Run) -> None:
    worker = opened.executor.worker  # type: ignore[attr-defined]
    module, queries = worker.model.module, opened.queries
    parameters = list(module.parameters())
    weights = [p.detach().clone() for p in parameters]
    number = int(read_top(run)["sequence_id"][0].as_py())
    (sequence,) = worker.read(_address(opened), np.asarray([number]))
    before = measure_queries(module, queries)
    module.requires_grad_(True)
    loss_grad = torch.autograd.grad(sequence_loss(worker, sequence), parameters)
    dots = []
    for query in queries:
        (part,) = query.parts
        ids, at = torch.tensor(part.token_ids), torch.tensor(part.positions)
        log_p = torch.log_softmax(module(input_ids=ids[None]).logits[0, at - 1].double(), dim=-1)
        f_grad = torch.autograd.grad(log_p.gather(1, ids[at, None]).sum(), parameters)
        dots.append(-sum(float((a.double() * b.double()).sum()) for a, b in zip(f_grad, loss_grad, strict=True)))
    module.requires_grad_(False)
    rate = 1e-5
    own_before, (after,) = effects(worker, sequence, queries, StepOptimizer.sgd, rate, [1])
    own_after = after.loss
    assert (np.asarray(after.values) - before) / rate == pytest.approx(dots, rel=0.02, abs=0.02 * np.abs(dots).max())
    assert own_before - own_after == pytest.approx(
        rate * sum(float((g.double() ** 2).sum()) for g in loss_grad), rel=0.02
    )
    assert all(torch.equal(p, w) for p, w in zip(parameters, weights, strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in parameters)


@pytest.mark.parametrize("optimizer", list(StepOptimizer))
def test_more_steps_go_further_and_the_rate_is_the_smallest_that_goes_far_enough(
    run: str, opened: Run, optimizer: StepOptimizer
) -> None:
    worker = opened.executor.worker  # type: ignore[attr-defined]
    sequences = worker.read(_address(opened), np.arange(3))

    def falls(rate: float, steps: int = 1) -> list[float]:
        found = []
        for sequence in sequences:
            with trained(worker, sequence, optimizer, rate, steps) as before:
                found.append(1 - loss_now(worker, sequence) / before)
        return sorted(found)

    rate = find_learning_rate(worker, sequences, optimizer, 0.05, 1)
    assert falls(rate)[1] >= 0.05 > falls(rate / 10**0.5)[1]
    assert falls(rate, 3)[1] > falls(rate)[1]


def test_every_row_and_control_is_in_the_table(run: str, found: tuple[pa.Table, dict[str, float]]) -> None:
    table, facts = found
    assert table.schema == SCHEMA
    rows = table.to_pylist()
    published = [row for row in read_top(run).to_pylist() if row["rank"] <= 3]
    for kind in (PROPONENT, OPPONENT):
        mine = {
            (row["query_id"], row["rank"]): (row["sequence_id"], row["score"]) for row in rows if row["kind"] == kind
        }
        theirs = {
            (row["query_id"], row["rank"]): (row["sequence_id"], row["score"])
            for row in published
            if row["side"] == kind
        }
        assert mine == theirs
    for kind in (RANDOM, BM25):
        assert sorted((row["query_id"], row["rank"]) for row in rows if row["kind"] == kind) == [
            (query, rank) for query in sorted({row["query_id"] for row in published}) for rank in (1, 2)
        ]
    own = {(row["query_id"], row["sequence_id"]) for row in published if row["side"] == PROPONENT and row["rank"] <= 2}
    assert not own & {(row["query_id"], row["sequence_id"]) for row in rows if row["kind"] == RANDOM}
    # Trained on its own, every sequence's own loss falls.
    assert all(row["loss_after"] < row["loss_before"] for row in rows)
    # One sequence is trained on once, whatever chose it.
    assert len({(row["query_id"], row["sequence_id"], row["effect"]) for row in rows}) == len(
        {(row["query_id"], row["sequence_id"]) for row in rows}
    )
    assert facts["learning_rate"] > 0


def test_the_same_seed_gives_the_same_table(run: str, opened: Run, found: tuple[pa.Table, dict[str, float]]) -> None:
    again, _ = prove(opened, ProveJob(run=run, rows=3, controls=2, cluster=HERE))
    assert again.equals(found[0])


def test_what_is_measured_on_the_way_is_what_fewer_steps_give(run: str, opened: Run) -> None:
    job = ProveJob(run=run, rows=2, controls=1, learning_rate=1e-3, cluster=HERE)
    table, _ = prove(opened, replace(job, steps=3, also_after=[1]))
    alone, _ = prove(opened, job)
    assert set(table["steps"].to_pylist()) == {1, 3}
    assert after_steps(table, 1).equals(alone)
    assert after_steps(table, 3).select(["query_id", "kind", "rank"]).equals(alone.select(["query_id", "kind", "rank"]))


def test_effects_by_query_and_over_all_have_intervals_around_their_means(found: tuple[pa.Table, Any]) -> None:
    table, _ = found
    rows = effects_table(table, 200, 0).to_pylist()
    overall = {row["kind"]: row for row in rows if row["query_id"] is None}
    assert set(overall) == set(table["kind"].to_pylist())
    for row in rows:
        mine = [
            one["effect"]
            for one in table.to_pylist()
            if one["kind"] == row["kind"] and row["query_id"] in (None, one["query_id"])
        ]
        assert row["rows"] == len(mine)
        assert row["low"] <= row["mean"] <= row["high"]
        if row["query_id"]:
            assert row["mean"] == pytest.approx(np.mean(mine))
            assert row["lead"] is None
    assert {kind: row["mean"] for kind, row in overall.items()} == {
        each.kind: each.mean for each in by_kind(table, 200, 0)
    }


def test_what_it_would_cost_is_said_before(run: str, opened: Run) -> None:
    table, facts = prove(opened, ProveJob(run=run, rows=3, controls=2, plan=True, max_hours=1e-9, cluster=HERE))
    assert not table.num_rows
    assert re.search(r"\d+ sequences of .* hours on one worker", facts["cost"])


def test_the_page_has_the_effects_beside_the_rows(run: str, found: tuple[pa.Table, Any]) -> None:
    table, _ = found
    store = Store(run)
    store.write("prove/effects.parquet", to_parquet(effects_table(table, 200, 0), {}))
    store.write("prove/prove.parquet", to_parquet(table, {}))
    archive = Archive(1 << 20)
    contents = run_contents(run, "run", archive, 100, None, None)
    chunks = {n: json.loads(zlib.decompress(base64.b64decode(text))) for n, (_, text) in archive.chunks.items()}
    assert {kind for kind, *_ in contents["proved"]["kinds"]} == set(table["kind"].to_pylist())
    seen: dict[tuple[str, str, int], float] = {}
    for query in contents["queries"]:
        assert {kind for kind, *_ in chunks[query["head"]]["proved"]["kinds"]} <= set(table["kind"].to_pylist())
        for side in (PROPONENT, OPPONENT):
            for chunk in query[side]["chunks"]:
                rows = [row for row in chunks[chunk["chunk"]] if "effect" in row]
                seen |= {(query["id"], side, row["rank"]): row["effect"] for row in rows}
    published = [row for row in table.to_pylist() if row["kind"] in (PROPONENT, OPPONENT)]
    assert seen.keys() == {(row["query_id"], row["kind"], row["rank"]) for row in published}
    for row in published:
        assert seen[row["query_id"], row["kind"], row["rank"]] == pytest.approx(row["effect"], rel=1e-5)


def test_effects_are_averaged_by_query_and_compared_in_pairs() -> None:
    def row(query: str, kind: str, effect: float, score: float | None = None) -> dict[str, object]:
        return dict.fromkeys(SCHEMA.names) | {"query_id": query, "kind": kind, "effect": effect, "score": score}

    rows = [row("a", PROPONENT, 3, 2), row("a", PROPONENT, 1, 1), row("b", PROPONENT, 4, 1)]
    rows += [row("a", RANDOM, 1), row("b", RANDOM, -1), row("a", OPPONENT, -1, -1), row("a", OPPONENT, -2, -2)]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    of = {each.kind: each for each in by_kind(table, 200, 0)}
    assert of[PROPONENT].mean == pytest.approx(3)
    assert of[PROPONENT].rows == 3
    assert of[PROPONENT].lead is None
    assert of[RANDOM].mean == pytest.approx(0)
    assert of[RANDOM].raises == 0.5
    assert of[RANDOM].lead is not None
    assert of[RANDOM].lead[0] == pytest.approx(3)
    assert of[RANDOM].lead[1] == pytest.approx(1)
    assert of[RANDOM].lead[2] == pytest.approx(5)
    assert agreement_of(table, 100, 0) == pytest.approx((1, 1, 1))
    said = " ".join(words(table, {"learning_rate": 1e-4}, ProveJob(resamples=200)))
    assert "more than random rows" in said
    assert "cannot say" in said


def test_what_cannot_be_proved_is_refused(run: str, opened: Run) -> None:
    with pytest.raises(QueryError, match="nobody"):
        prove(opened, ProveJob(run=run, query_ids=["nobody"], cluster=HERE))
    with pytest.raises(ConfigError, match=r"max_hours=1e-09.*lower rows"):
        prove(opened, ProveJob(run=run, max_hours=1e-9, learning_rate=1e-4, cluster=HERE))
    for wrong in (ProveJob(rows=0), ProveJob(learning_rate=-1.0), ProveJob(fall=1.0), ProveJob(resamples=3)):
        with pytest.raises(ConfigError, match=r"give|share"):
            wrong.check()


def _address(opened: Run):  # type: ignore[no-untyped-def]
    from infscan.corpus.addressable import CorpusAddress
    from infscan.steps.prepare import prepare_corpus

    return CorpusAddress.of(prepare_corpus(opened))
