"""Similarity of published rows to their query: as a dense computation has it, however it is cut into work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from infscan.corpus.plan import Selection
from infscan.errors import CorpusError
from infscan.influence.similarity import RIDGE, StateMoments, Whitening, standing
from infscan.model.hidden import hidden_states
from infscan.model.loaded import LoadedModel, RankContext
from infscan.results.read import read_summary, read_top
from infscan.steps import scan as scanning
from infscan.steps import similarity as similar
from infscan.storage import Store
from tests.steps.runs import answer_here, small_run, tiny_model, token_corpus


def states(model: torch.nn.Module, ids: list[int]) -> Tensor:
    """Of block 2 of 3, [T, d]; the first token's left out, where there are others."""
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    return found[1:] if len(found) > 1 else found


def table(output: Path) -> pa.Table:
    return read_top(str(output)).select(["query_id", "side", "rank", "sequence_id", "similarity", "similarity_z"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("similarity")
    tiny_model(root / "model", layers=3)
    # More sequences than the whitening is of.
    token_corpus(root / "corpus.jsonl", 100)
    answer_here(small_run(root, "model.dtype=float64"))
    return root


def test_it_is_the_mean_over_query_tokens_of_the_best_whitened_cosine(root: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64).eval()
    rows = [json.loads(line)["tokens"] for line in (root / "corpus.jsonl").read_text().splitlines()]
    asked = {row["id"]: row["input_ids"] for row in map(json.loads, (root / "queries.jsonl").read_text().splitlines())}
    sample = torch.cat([states(model, rows[number]) for number in Selection.of(len(rows), 64, 0).ids().tolist()])
    cov = torch.cov(sample.T, correction=0)
    values, vectors = torch.linalg.eigh(cov + RIDGE * cov.diagonal().mean() * torch.eye(len(cov)))
    whiten = vectors / values.sqrt() @ vectors.T

    def directions(ids: list[int]) -> Tensor:
        x = (states(model, ids) - sample.mean(dim=0)) @ whiten
        return x / x.norm(dim=1, keepdim=True)

    def alike(query: str, number: int) -> float:
        return float((directions(asked[query]) @ directions(rows[number]).T).amax(dim=1).mean())

    found = table(root / "run").to_pylist()
    assert len(found) == 3 * 2 * 5
    sampled = {query: [alike(query, number) for number in Selection.of(100, 64, 0).ids().tolist()] for query in asked}
    for row in found:
        expected = alike(row["query_id"], row["sequence_id"])
        assert row["similarity"] == pytest.approx(expected, abs=1e-6)
        median = np.median(sampled[row["query_id"]])
        scale = 1.4826 * np.median(np.abs(sampled[row["query_id"]] - median))
        assert row["similarity_z"] == pytest.approx((expected - median) / scale, rel=1e-3, abs=1e-3)


def test_no_block_above_the_middle_one_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as a rank has the whole model; of a model in shards all blocks run, with the same states."""
    module = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64).eval()
    model = LoadedModel(module, RankContext(), torch.float64, 1, 1)
    ids_bt = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        wanted = module(ids_bt, output_hidden_states=True).hidden_states[2]
    ran = list[int]()
    for number, block in enumerate(module.gpt_neox.layers, start=1):
        block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
    assert torch.equal(hidden_states(model, ids_bt), wanted)
    assert ran == [1, 2]
    model.parameters = 2
    assert torch.equal(hidden_states(model, ids_bt), wanted)
    assert ran == [1, 2, 1, 2, 3]
    assert not any("forward" in block.__dict__ for block in module.gpt_neox.layers)


def test_a_sample_s_states_are_computed_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are few; with or without, the same bits."""
    rows = dict[bool, int]()
    states = similar._states

    def counting(worker: Any, batch: Any) -> Tensor:
        rows[kept] += len(batch.rows)
        return states(worker, batch)

    monkeypatch.setattr(similar, "_states", counting)
    for kept in (True, False):
        rows[kept] = 0
        if not kept:
            monkeypatch.setattr(similar, "_KEPT", 0)
        answer_here(small_run(root, "model.dtype=float64", f"output={root / f'kept-{kept}'}"))
        assert table(root / f"kept-{kept}").equals(table(root / "run"))
    assert rows[False] - rows[True] == 64


def test_it_does_not_depend_on_how_the_work_is_cut(root: Path) -> None:
    """Nor do the rows: in another order of batches, padded otherwise, in shards of another size."""
    other = small_run(
        root, "model.dtype=float64", "scan.tokens_per_batch=64", "scan.shard_sequences=30", f"output={root / 'other'}"
    )
    answer_here(other)
    one, two = table(root / "run"), table(root / "other")
    names = ["similarity", "similarity_z"]
    assert one.drop_columns(names).equals(two.drop_columns(names))
    for name, most in zip(names, (1e-6, 1e-3), strict=True):
        assert np.asarray(one[name]) == pytest.approx(np.asarray(two[name]), abs=most)


def test_it_may_be_of_the_strongest_rows_alone_or_left_out(root: Path) -> None:
    answer_here(small_run(root, "model.dtype=float64", "scan.similarity=2", f"output={root / 'two'}"))
    all_of_them, strongest = table(root / "run").to_pylist(), table(root / "two").to_pylist()
    for one, two in zip(all_of_them, strongest, strict=True):
        assert two["similarity"] == (one["similarity"] if two["rank"] <= 2 else None)
    answer_here(small_run(root, "model.dtype=float64", "scan.similarity=0", f"output={root / 'none'}"))
    assert table(root / "none")["similarity"].null_count == len(all_of_them)


def test_what_cannot_be_compared_fails_the_run_unless_the_scan_gave_up_shards_too(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample is of the corpus, of which a part may be unreadable; the rows are of the run's own files."""

    def broken(*_: object) -> None:
        raise CorpusError("part-00000.parquet cannot be read")

    config = small_run(root, "model.dtype=float64", f"output={root / 'broken'}")
    with monkeypatch.context() as patched:
        patched.setattr("infscan.steps.similarity.similarity_task", broken)
        with pytest.raises(CorpusError, match="cannot be read"):
            answer_here(config)
    answer_here(config)
    assert table(root / "broken").equals(table(root / "run"))
    other = small_run(root, "model.dtype=float64", f"output={root / 'unread'}")
    monkeypatch.setattr("infscan.steps.similarity.whitening_task", broken)
    with pytest.raises(CorpusError, match="cannot be read"):
        answer_here(other)
    task = scanning.scan_task

    def poisoned(worker: Any, given: Any, batch: Any) -> Any:
        return broken() if given.shard == "shard-000003" else task(worker, given, batch)

    monkeypatch.setattr(scanning, "scan_task", poisoned)
    Store(other.output).remove("shards/shard-000003.parquet")
    other.scan.allow_quarantined = 1
    answer_here(other)
    assert table(root / "unread")["similarity"].null_count == 3 * 2 * 5
    assert any("top.similarity is null" in said for said in read_summary(str(root / "unread"))["warnings"])


def test_states_that_are_not_finite_take_no_part() -> None:
    generator = torch.Generator().manual_seed(0)
    h_md = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    whole, broken = StateMoments(6, "cpu"), StateMoments(6, "cpu")
    whole.add(h_md)
    poisoned_d = torch.tensor([[1.0, torch.nan, *[0.0] * 4], [torch.inf, *[0.0] * 5]], dtype=torch.float64)
    broken.add(torch.cat([h_md[:9], poisoned_d, h_md[9:]]))
    torch.testing.assert_close(Whitening.of(broken.total_nn).root_dd, Whitening.of(whole.total_nn).root_dd)
    Whitening.of(StateMoments(6, "cpu").total_nn)
    sampled_qn = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    values, queries = np.asarray([1, 2], np.float32), np.asarray([0, 1], np.int32)
    known = standing(values, queries, sampled_qn[:, :40])
    sampled_qn[0, 40:] = np.nan
    sampled_qn[1, 20:] = np.nan
    found = standing(values, queries, sampled_qn)
    assert found[0] == known[0]
    assert np.isnan(found[1])
