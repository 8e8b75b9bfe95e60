"""Masks of the loss: a corpus without the losses of the strongest tokens scores less by just their influence."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from infscan.api import run_masks
from infscan.config import Backend, ClusterConfig, Sides
from infscan.config.jobs import ExplainJob, MasksJob
from infscan.errors import ConfigError, QueryError, RunError
from infscan.results.masks import write_masks
from infscan.results.read import read_layers, read_scores, read_tokens, read_top
from infscan.steps.explain import explain
from infscan.steps.finished import reopen
from infscan.steps.targets import passes
from tests.steps.runs import EOS, answer_here, compose, tiny_model, token_corpus, token_queries, write_jsonl

DOCUMENTS, QUERIES = 12, 2


def scan(root: Path, corpus: Path, name: str, *overrides: str) -> str:
    config = compose(
        "scan",
        f"model.path={root / 'model'}",
        "model.dtype=float64",
        f"corpus.path={corpus}",
        "corpus.tokens_field=tokens",
        "corpus.packing=document",
        f"queries.path={root / 'queries.jsonl'}",
        "factors=identity",
        "scan.rank=null",
        "scan.scores=all",
        "scan.top_k=12",
        f"output={root / name}",
        *overrides,
    )
    answer_here(config)
    return config.output


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("masks")
    tiny_model(root / "model")
    token_queries(root / "queries.jsonl", QUERIES)
    rows = [json.loads(line) for line in token_corpus(root / "made.jsonl", DOCUMENTS, T=16).read_text().splitlines()]
    # Documents that end with an EOS of their own get no other, so that every token has a place in the mask.
    whole = [{**row, "tokens": [*row["tokens"], EOS]} for row in rows]
    uri = scan(root, write_jsonl(root / "corpus.jsonl", whole), "run")
    job = ExplainJob(run=uri, rows=DOCUMENTS, cluster=ClusterConfig(backend=Backend.in_process))
    with reopen(uri, job.cluster) as opened:
        explain(opened, job)
    return uri


@pytest.mark.parametrize("overrides", [(), ("model.tracked=mlp+head",)])
def test_a_run_that_takes_its_rows_apart_gives_the_masks_that_an_explanation_gives(
    run: str, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    root = Path(run).parent
    name = f"apart-{len(overrides)}"
    apart = scan(root, root / "corpus.jsonl", name, "scan.targets=null", "scan.scores=top", *overrides)
    rows = {(row["query_id"], row["sequence_id"]): row for row in read_tokens(apart).to_pylist()}
    assert len(rows) == read_top(apart).num_rows
    for row in read_top(apart).to_pylist():
        targets = rows[row["query_id"], row["sequence_id"]]["targets"]
        assert targets[0] == 0
        assert sum(targets) == pytest.approx(row["score"], rel=1e-4)
    by_layer: dict[tuple[str, int], float] = defaultdict(float)
    for row in read_layers(apart).to_pylist():
        by_layer[row["query_id"], row["sequence_id"]] += row["score"]
    for row in read_top(apart).to_pylist():
        assert by_layer[row["query_id"], row["sequence_id"]] == pytest.approx(row["score"], rel=1e-4)
    if not overrides:
        mine, theirs = MasksJob(run=apart, share=0.1), MasksJob(run=run, share=0.1)
        found, expected = write_masks(mine), write_masks(theirs)
        assert found.select(["sequence_id", "positions"]).equals(expected.select(["sequence_id", "positions"]))
        for one, other in zip(found["scores"].to_pylist(), expected["scores"].to_pylist(), strict=True):
            assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("sides", [Sides.proponents, Sides.opponents, Sides.both])
def test_without_the_masked_losses_scores_fall_by_their_influence(run: str, tmp_path: Path, sides: Sides) -> None:
    root = Path(run).parent
    result = run_masks(MasksJob(run=run, tokens=9, sides=sides, query_ids=["q0"]))
    masked = {row["sequence_id"]: row for row in result.table.to_pylist()}
    assert sum(len(row["positions"]) for row in masked.values()) == 9
    before = read_scores(run).sort_by("sequence_id")
    rows = [json.loads(line) for line in (root / "corpus.jsonl").read_text().splitlines()]
    of_document = dict(zip(before["sequence_id"].to_pylist(), rows, strict=True))
    for number, row in of_document.items():
        off = masked.get(number, {"positions": []})["positions"]
        row["mask"] = [int(position not in off) for position in range(len(row["tokens"]))]
    corpus = write_jsonl(tmp_path / "masked.jsonl", rows)
    after = read_scores(scan(root, corpus, f"masked-{sides.value}", "corpus.mask_field=mask")).sort_by("sequence_id")
    fallen = before["score_q0"].to_numpy() - after["score_q0"].to_numpy()
    expected = np.asarray([float(sum(masked.get(number, {"scores": []})["scores"])) for number in of_document])
    assert np.abs(fallen - expected).max() < 1e-6 * np.abs(before["score_q0"].to_numpy()).max()
    signs = [score for row in masked.values() for score in row["scores"]]
    assert sides is Sides.both or all((score > 0) == (sides is Sides.proponents) for score in signs)


def test_a_share_is_of_the_explained_tokens_and_queries_are_added_up(run: str) -> None:
    both = run_masks(MasksJob(run=run, share=1.0, sides=Sides.both, output=f"{run}/all.parquet")).table
    ones = [run_masks(MasksJob(run=run, share=1.0, sides=Sides.both, query_ids=[q])).table for q in ("q0", "q1")]

    def scores(table):  # type: ignore[no-untyped-def]
        return {
            (row["sequence_id"], at): score
            for row in table.to_pylist()
            for at, score in zip(row["positions"], row["scores"], strict=True)
        }

    first, second = map(scores, ones)
    for at, score in scores(both).items():
        assert score == pytest.approx(first.get(at, 0.0) + second.get(at, 0.0))
    tenth = run_masks(MasksJob(run=run, share=0.1, sides=Sides.both)).table
    assert sum(map(len, tenth["positions"].to_pylist())) == round(0.1 * len(scores(both)))


def test_rows_that_share_their_queries_share_a_pass_and_every_pair_is_once() -> None:
    draw = np.random.default_rng(0)
    wanted = [tuple(np.flatnonzero(draw.random(20) < 0.2).tolist()) for _ in range(30)]
    wanted += [(0, 2, 3, 9)] * 4
    found = passes(wanted)
    pairs = [(row, query) for queries, rows in found for row in rows for query in queries]
    assert sorted(pairs) == [(row, query) for row, queries in enumerate(wanted) for query in queries]
    assert ((0, 2, 3), [30, 31, 32, 33]) in found
    assert passes([tuple(range(12))] * 5) == [(tuple(range(8)), [*range(5)]), (tuple(range(8, 12)), [*range(5)])]
    assert [queries for queries, _ in passes([(0, 1), (1, 2)])] == [(0,), (1,), (2,)]


def test_what_cannot_be_masked_is_refused(run: str) -> None:
    with pytest.raises(QueryError, match=r"nobody.*q0, q1"):
        run_masks(MasksJob(run=run, query_ids=["nobody"]))
    with pytest.raises(RunError, match=r"no explanation, and .*: explain rows first, infscan explain"):
        run_masks(MasksJob(run=run, name="other"))
    for wrong in (MasksJob(run=run, share=0.0), MasksJob(run=run, tokens=0)):
        with pytest.raises(ConfigError, match="tokens"):
            run_masks(wrong)
