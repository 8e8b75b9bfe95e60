"""The whole job on a real local Ray: the golden numbers, and the laws that published rows obey."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import ray
import torch

from infscan.config import ClusterConfig, Config
from infscan.engine.cluster import connect
from infscan.errors import FactorsError, RunError
from infscan.pipeline import answer
from infscan.results.read import read_layers, read_scores, read_sequences, read_summary, read_tokens, read_top
from infscan.steps.factor_files import read_factors
from tests.conftest import Bucket
from tests.golden import golden
from tests.steps.runs import compose, small_run, tiny_model, token_queries, write_jsonl

Name = Literal["small", "medium"]


@pytest.fixture(scope="module", autouse=True)
def local_ray(s3: Bucket) -> Iterator[None]:
    """One Ray for the module, started after the S3 server so that its workers inherit the credentials."""
    ray.shutdown()
    connect(ClusterConfig(num_workers=2, ranks_per_worker=2))
    yield
    ray.shutdown()


def rows_of(uri: str) -> dict[str, list[dict[str, Any]]]:
    reads = {"top": read_top, "sequences": read_sequences, "layers": read_layers, "tokens": read_tokens}
    return {name: read(uri).to_pylist() for name, read in reads.items()}


def tables(config: Config) -> dict[str, list[dict[str, Any]]]:
    return rows_of(config.output)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def assert_close_rows(ours: Config, theirs: Config, tolerance: float = 1e-5) -> None:
    """Guarantee 2 across batch shapes: scores within tolerance, and rows swap only within it."""
    mine, other = read_top(ours.output).to_pylist(), read_top(theirs.output).to_pylist()
    assert len(mine) == len(other)
    scores = {(row["query_id"], row["sequence_id"]): row["score"] for row in other}
    for a, b in zip(mine, other, strict=True):
        assert (a["query_id"], a["side"], a["rank"]) == (b["query_id"], b["side"], b["rank"])
        assert a["score"] == pytest.approx(b["score"], rel=tolerance)
        if a["sequence_id"] != b["sequence_id"]:
            assert a["score"] == pytest.approx(scores.get((a["query_id"], a["sequence_id"]), b["score"]), rel=tolerance)


# --- the golden numbers -------------------------------------------------------------------------------------------


def golden_run(name: Name, tmp_path: Path, *overrides: str) -> Config:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", golden(name).corpus_rows())
    queries = write_jsonl(tmp_path / "queries.jsonl", golden(name).query_rows())
    return compose(
        "scan",
        f"model.path={golden(name).model}",
        f"corpus.path={corpus}",
        "corpus.tokens_field=tokens",
        "corpus.packing=document",
        f"queries.path={queries}",
        "factors.labels=empirical",
        f"factors.path={tmp_path / 'factors'}",
        "scan.scores=all",
        "scan.top_k=200",
        "cluster.num_workers=2",
        *overrides,
    )


def dense(config: Config) -> np.ndarray:
    """[Q, N], queries in the order of their ids."""
    scores = read_scores(config.output)
    return np.stack([scores[name].to_numpy() for name in scores.column_names if name.startswith("score_")])


@pytest.mark.parametrize(("name", "rank"), [("small", 8), pytest.param("medium", 32, marks=pytest.mark.slow)])
def test_golden_numbers_through_the_public_job(name: Name, rank: int, tmp_path: Path) -> None:
    config = golden_run(name, tmp_path, "scan.rank=null", f"output={tmp_path / 'full'}")
    answer(config)
    full = golden(name).scores("full")
    assert relative(dense(config), full) < 1e-5

    # Every sequence is published on one side or the other, so the margins can be compared whole.
    top = read_top(config.output).to_pylist()
    assert len(top) == full.size
    published = np.zeros_like(full)
    for row in top:
        published[int(row["query_id"][1:]), row["sequence_id"]] = row["score"]
    assert relative(published, full) < 1e-5
    by_layer = golden(name).by_layer("full")
    margins = {layer: np.zeros_like(full) for layer in by_layer}
    for row in read_layers(config.output).to_pylist():
        margins[row["layer"]][int(row["query_id"][1:]), row["sequence_id"]] = row["score"]
    for layer, scores in margins.items():
        assert relative(scores, by_layer[layer]) < 1e-5, layer
    per_token = golden(name).by_token("full")
    tokens = np.zeros_like(per_token)
    for row in read_tokens(config.output).to_pylist():
        tokens[int(row["query_id"][1:]), row["sequence_id"]] = row["scores"]
    assert relative(tokens, per_token) < 1e-5

    low = golden_run(name, tmp_path, f"scan.rank={rank}", "scan.compression=plain", f"output={tmp_path / 'low'}")
    answer(low)
    assert relative(dense(low), golden(name).scores(f"lr{rank}")) < 1e-4


def test_golden_factors_through_the_public_job(tmp_path: Path) -> None:
    config = golden_run("small", tmp_path, f"output={tmp_path / 'run'}", "factors.slices=3")
    answer(config)
    theirs = {kind: golden("small").factor(kind) for kind in ("A", "S", "Lambda")}
    for name, factors in read_factors(config.factors.path or "").items():
        assert relative(factors.A.dense().numpy(), theirs["A"][name]) < 1e-5
        assert relative(factors.S.dense().numpy(), theirs["S"][name]) < 1e-5
        assert relative(factors.Lambda.numpy(), theirs["Lambda"][name]) < 1e-5


# --- what published rows do not depend on ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Config:
    """One worker, one rank, dense scores; its factors serve the variants."""
    config = small_run(tmp_path_factory.mktemp("base"), "scan.scores=all")
    answer(config)
    return config


def variant(base: Config, tmp_path: Path, *overrides: str) -> Config:
    """Another run over base's prepared corpus and factors."""
    shared = (f"corpus.path={base.output}/corpus", f"factors.path={base.factors.path}")
    return small_run(Path(base.output).parent, *shared, f"output={tmp_path / 'run'}", *overrides)


@pytest.mark.parametrize(
    "overrides",
    [("cluster.num_workers=2",), ("cluster.ranks_per_worker=2",), ("model.gradient_checkpointing=true",)],
    ids=["two workers", "two ranks, ZeRO-3", "gradient checkpointing"],
)
def test_the_same_bits_for_one_plan(base: Config, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = variant(base, tmp_path, *overrides)
    answer(config)
    assert tables(config) == tables(base)


@pytest.mark.parametrize(
    "overrides",
    [("scan.shard_sequences=5",), ("scan.tokens_per_batch=100",), ("scan.query_group_bytes=30000",)],
    ids=["shard size", "batch size", "query and layer groups"],
)
def test_the_same_rows_for_another_cut(base: Config, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = variant(base, tmp_path, *overrides, "cluster.num_workers=2")
    answer(config)
    assert_close_rows(config, base)


def test_each_rank_holds_half_of_the_parameters(base: Config, tmp_path: Path) -> None:
    config = variant(base, tmp_path, "cluster.ranks_per_worker=2")
    answer(config)
    [ranks] = read_summary(config.output)["workers"]["ranks"]
    total = read_summary(base.output)["workers"]["ranks"][0][0]["shard_parameters"]
    assert len(ranks) == 2
    for rank in ranks:
        # A parameter of odd size is padded, by one element per rank at most.
        assert total / 2 <= rank["shard_parameters"] < total / 2 * 1.01
        assert rank["peak_bytes"] > 0


@pytest.mark.parametrize("labels", ["sampled", pytest.param("empirical", marks=pytest.mark.slow)])
def test_factors_do_not_depend_on_workers_or_ranks(base: Config, tmp_path: Path, labels: str) -> None:
    fitted = {}
    for name, cluster in {"one": [], "two": ["cluster.num_workers=2"], "ranks": ["cluster.ranks_per_worker=2"]}.items():
        own = f"factors.path={tmp_path / name}"
        config = variant(base, tmp_path / name, own, f"factors.labels={labels}", *cluster)
        answer(config)
        fitted[name] = read_factors(config.factors.path or "")
    for name in ("two", "ranks"):
        for layer, factors in fitted["one"].items():
            ours = fitted[name][layer]
            for mine, other in (
                (ours.A.dense(), factors.A.dense()),
                (ours.S.dense(), factors.S.dense()),
                (ours.Lambda, factors.Lambda),
            ):
                assert float((mine - other).norm() / other.norm()) < 1e-5, (name, layer)


def test_factors_in_blocks_take_less_and_are_not_taken_for_others(base: Config, tmp_path: Path) -> None:
    path = tmp_path / "factors"
    config = variant(base, tmp_path, f"factors.path={path}", "factors.blocks=2", "scan.scores=all")
    answer(config)
    for factors in read_factors(str(path)).values():
        assert [len(m.blocks) for m in (factors.A, factors.S, factors.Q_A, factors.Q_S)] == [2, 2, 2, 2]
    assert np.isfinite(dense(config)).all()
    assert not np.array_equal(dense(config), dense(base))

    def size(folder: Path, kind: str) -> int:
        return sum(file.stat().st_size for file in (folder / kind).iterdir())

    whole = Path(base.factors.path or "")
    for kind in ("A", "S"):
        assert size(path, kind) < 0.7 * size(whole, kind)
    # Lambda is whole: no entry of a gradient is dropped.
    assert size(path, "Lambda") == size(whole, "Lambda")

    with pytest.raises(FactorsError, match=r"blocks: 2 -> 1"):
        answer(variant(base, tmp_path / "other", f"factors.path={path}"))
    with pytest.raises(RunError, match=r"factors\.blocks: 2 -> 1"):
        answer(variant(base, tmp_path, f"factors.path={path}", "scan.scores=all"))


def test_an_object_store_holds_the_same_tables(base: Config, tmp_path: Path, s3: Bucket) -> None:
    uri = s3.uri()
    config = small_run(Path(base.output).parent, f"output={uri}", "cluster.num_workers=2")
    answer(config)
    assert tables(config) == tables(base)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_other_families_are_sharded(family: str, tmp_path: Path) -> None:
    """Llama: grouped queries, no biases, gate and up share one A; GPT-2: Conv1D and tied embeddings.

    Sharded on one rank and on two: the same bits. Against the unsharded model: DeepSpeed's linear has a backward of its
    own, which may sum in another order.
    """
    tiny_model(tmp_path / "model", family=family)
    one = small_run(tmp_path, "model.tracked=linear")
    answer(one)
    shards = variant(one, tmp_path / "one", "model.tracked=linear", "model.sharding=zero3")
    answer(shards)
    two = variant(one, tmp_path / "two", "model.tracked=linear", "cluster.ranks_per_worker=2")
    answer(two)
    assert tables(two) == tables(shards)
    assert_close_rows(two, one)


@pytest.mark.slow
def test_documents_kept_apart_give_the_same_rows_on_ranks_that_share_a_model(tmp_path: Path) -> None:
    """Of a packed sequence under corpus.attention=within; the ranks' batches have documents of different lengths."""
    packed = ("corpus.packing=concat", "corpus.attention=within", "corpus.sequence_length=24")
    one = small_run(tmp_path, *packed)
    answer(one)
    shards = variant(one, tmp_path / "shards", *packed, "model.sharding=zero3")
    answer(shards)
    own = f"factors.path={tmp_path / 'fitted'}"
    two = variant(one, tmp_path / "two", *packed, "cluster.ranks_per_worker=2", own)
    answer(two)
    assert_close_rows(shards, one)
    assert_close_rows(two, one)
    across = small_run(tmp_path, *packed, "corpus.attention=across", f"output={tmp_path / 'across'}")
    answer(across)
    assert read_top(across.output)["score"].to_pylist() != read_top(one.output)["score"].to_pylist()


# --- what the tables say -----------------------------------------------------------------------------------------


def test_top_is_the_sort_of_every_score(base: Config, tmp_path: Path) -> None:
    config = variant(base, tmp_path, "scan.scores=all", "scan.rank=null")
    answer(config)
    scores = read_scores(config.output)
    for query in ("q0", "q1", "q2"):
        column = scores[f"score_{query}"].to_numpy()
        for side, sign in (("proponent", 1), ("opponent", -1)):
            rows = [r for r in read_top(config.output).to_pylist() if (r["query_id"], r["side"]) == (query, side)]
            order = np.lexsort((scores["sequence_id"].to_numpy(), -sign * column))[:5]
            wanted = [int(i) for i in order if sign * column[i] > 0]
            assert [row["sequence_id"] for row in rows] == wanted
            assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
            assert [row["scan_score"] for row in rows] == pytest.approx([row["score"] for row in rows], rel=1e-4)


def test_margins_add_up_and_counts_add_up(base: Config) -> None:
    layers: dict[tuple[str, int], float] = {}
    for row in read_layers(base.output).to_pylist():
        key = row["query_id"], row["sequence_id"]
        layers[key] = layers.get(key, 0.0) + row["score"]
    tokens = {(row["query_id"], row["sequence_id"]): row["scores"] for row in read_tokens(base.output).to_pylist()}
    sequences = {row["sequence_id"]: row for row in read_sequences(base.output).to_pylist()}
    for row in read_top(base.output).to_pylist():
        key = row["query_id"], row["sequence_id"]
        assert layers[key] == pytest.approx(row["score"], rel=1e-5)
        assert sum(tokens[key]) == pytest.approx(row["score"], rel=1e-4, abs=1e-4)
        assert len(tokens[key]) == len(sequences[row["sequence_id"]]["token_ids"])
        assert row["document_id"] == sequences[row["sequence_id"]]["document_id"]
    counts = read_summary(base.output)["counts"]
    assert counts["corpus"]["documents_read"] == 40
    assert counts["planned"]["sequences"] == counts["scanned"]["sequences"] + counts["quarantined"]["sequences"] == 40
    assert counts["scanned"]["tokens"] == counts["corpus"]["tokens"]
    assert counts["published"]["rows"] == read_top(base.output).num_rows


def test_the_summary_says_what_the_compression_cost(base: Config, tmp_path: Path) -> None:
    """On a sample that is the whole corpus, the report is the correlation of the two runs' dense scores."""
    low = variant(base, tmp_path / "low", "scan.scores=all", "scan.rank=2", "scan.check_sequences=40")
    full = variant(base, tmp_path / "full", "scan.scores=all", "scan.rank=null")
    answer(low)
    answer(full)
    assert read_summary(full.output)["approximation"] is None
    report = read_summary(low.output)["approximation"]
    assert report["sequences"] == 40
    assert report["recall"]["mean"] is None
    assert "at least 200 sequences to compare, and there were 40" in report["recall"]["reason"]
    for query, scores in enumerate(dense(low)):
        found = report["queries"][f"q{query}"]
        assert found["pearson"] == pytest.approx(np.corrcoef(scores, dense(full)[query])[0, 1], abs=1e-5)
        assert found["low"] < found["pearson"] < found["high"] < 1


def test_many_queries_share_bases_that_are_found_once(base: Config, tmp_path: Path) -> None:
    """Of a hundred queries that keep half of the squares, bases are joint; what a rerun finds is not made again."""
    path = token_queries(tmp_path / "queries.jsonl", 100)
    config = variant(base, tmp_path, f"queries.path={path}", "scan.rank=auto", "scan.energy=0.5")
    answer(config)
    files = sorted((Path(config.output) / "queries").glob("joint-*.safetensors"))
    assert files
    report = read_summary(config.output)["approximation"]
    assert report["layouts"]["joint"] > 0
    assert report["pearson"]["mean"] > 0.5
    written = {file.name: file.read_bytes() for file in files}
    files[0].unlink()
    (Path(config.output) / "approximation.json").unlink()
    answer(config)
    assert {file.name: file.read_bytes() for file in files} == written


def test_a_run_says_what_has_no_room_and_what_would_do(base: Config, tmp_path: Path) -> None:
    path = token_queries(tmp_path / "queries.jsonl", 100)
    many = (f"queries.path={path}", "scan.rank=auto", "scan.energy=1.0")
    cramped = variant(base, tmp_path / "cramped", *many, "scan.query_group_bytes=50000")
    answer(cramped)
    summary = read_summary(cramped.output)
    [said] = [warning for warning in summary["warnings"] if "have no room" in warning]
    assert summary["approximation"]["layouts"]["low"] > 0
    found = re.search(r"query_group_bytes=50000; give up to (\d+)", said)
    assert found, said
    roomy = variant(base, tmp_path / "roomy", *many, f"scan.query_group_bytes={found[1]}")
    answer(roomy)
    summary = read_summary(roomy.output)
    assert summary["approximation"]["layouts"]["low"] == 0
    assert not [warning for warning in summary["warnings"] if "have no room" in warning]


def test_token_queries_add_up_to_the_completion(base: Config, tmp_path: Path) -> None:
    config = variant(base, tmp_path, "queries.measure=tokens", "scan.scores=all", "scan.rank=null")
    whole = variant(base, tmp_path / "whole", "scan.scores=all", "scan.rank=null")
    answer(config)
    answer(whole)
    parts = read_scores(config.output)
    total = sum(parts[f"score_q0#{index}"].to_numpy() for index in range(3))
    np.testing.assert_allclose(total, read_scores(whole.output)["score_q0"].to_numpy(), rtol=1e-3, atol=1e-2)


def test_identity_is_the_gradient_dot_product(base: Config, tmp_path: Path) -> None:
    config = variant(base, tmp_path, "factors.solver=identity", "scan.rank=null", "scan.scores=all")
    answer(config)
    from transformers import AutoModelForCausalLM

    root = Path(base.output).parent
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    tracked = [parameter for name, parameter in model.named_parameters() if ".mlp." in name]

    def gradient(ids: list[int], start: int) -> torch.Tensor:
        model.zero_grad()
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum").backward()
        return torch.cat([parameter.grad.flatten() for parameter in tracked])

    queries = [json.loads(line) for line in (root / "queries.jsonl").read_text().splitlines()]
    query = gradient(queries[0]["input_ids"], queries[0]["prompt_len"])
    documents = [json.loads(line)["tokens"] for line in (root / "corpus.jsonl").read_text().splitlines()]
    wanted = np.array([float(query @ gradient(tokens, 1)) for tokens in documents])
    np.testing.assert_allclose(read_scores(config.output)["score_q0"].to_numpy(), wanted, rtol=1e-3, atol=1e-3)


# --- going on where another process stopped ------------------------------------------------------------------------


def test_a_rerun_does_only_what_is_missing(base: Config, tmp_path: Path) -> None:
    config = variant(base, tmp_path)
    answer(config)
    before = tables(config)
    output = Path(config.output)
    shards = sorted((output / "shards").iterdir())
    for path in shards[:2]:
        path.unlink()
    kept = {path: os.stat(path).st_mtime_ns for path in shards[2:]}
    answer(config)
    assert tables(config) == before
    assert {path: os.stat(path).st_mtime_ns for path in shards[2:]} == kept
    phases = read_summary(config.output)["phases"]
    assert phases["scan"]["sequences"] == 16
    assert "covariance" not in phases


def test_an_output_of_other_inputs_is_refused_by_name(base: Config) -> None:
    root = Path(base.output).parent
    queries = root / "other-queries.jsonl"
    queries.write_text((root / "queries.jsonl").read_text().replace('"q0"', '"q9"'))
    with pytest.raises(RunError, match="another queries"):
        answer(small_run(root, f"queries.path={queries}", "scan.scores=all"))


def test_factors_of_other_settings_are_refused_by_field(base: Config, tmp_path: Path) -> None:
    with pytest.raises(FactorsError, match=r"labels: 'sampled' -> 'empirical'"):
        answer(variant(base, tmp_path, "factors.labels=empirical"))
