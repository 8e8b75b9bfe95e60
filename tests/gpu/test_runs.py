"""The whole job on GPUs: one gives the CPU's rows, two hold half of the model each (ZeRO-3 over NCCL) and agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from infscan.config import ClusterConfig, Config
from infscan.engine.cluster import connect
from infscan.pipeline import answer
from infscan.results.read import read_layers, read_summary, read_top
from tests.steps.runs import small_run

# Guarantee 2 (other kernels: 1e-5 relative), taken of the strongest score of the query and side: float32 sums of some
# thousand terms in another order differ by about 1e-6 of that, and a weaker score may be a sum that nearly cancels.
TOLERANCE = 1e-5

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """A Ray that knows this machine's GPUs, with room for a CPU worker beside them."""
    ray.shutdown()
    connect(ClusterConfig(num_workers=2, ranks_per_worker=2))
    yield
    ray.shutdown()


def run(base: Path, name: str, *overrides: str) -> Config:
    """A finished run over the inputs in `base`; all runs share the CPU's factors, fitted by the first.

    Sampled labels and eigenvectors of nearly equal eigenvalues depend on rounding: shared factors leave the scan, the
    query gradients and the refined scores to be compared.
    """
    config = small_run(
        base,
        "model.dtype=float32",
        f"factors.path={base / 'factors'}",
        f"output={base / name}",
        *overrides,
    )
    answer(config)
    return config


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Config:
    return run(tmp_path_factory.mktemp("runs"), "cpu", "cluster.gpus_per_rank=0")


def assert_same_rows(ours: Config, theirs: Config) -> None:
    """Each rank's score within tolerance; another sequence may stand there only where its score is as near."""
    mine, other = read_top(ours.output).to_pylist(), read_top(theirs.output).to_pylist()
    known = {(row["query_id"], row["sequence_id"]): row["score"] for row in other}
    assert [(row["query_id"], row["side"], row["rank"]) for row in mine] == [
        (row["query_id"], row["side"], row["rank"]) for row in other
    ]
    strongest = {(row["query_id"], row["side"]): abs(row["score"]) for row in other if row["rank"] == 1}
    for a, b in zip(mine, other, strict=True):
        near = TOLERANCE * strongest[b["query_id"], b["side"]]
        assert a["score"] == pytest.approx(b["score"], rel=0, abs=near)
        assert known.get((a["query_id"], a["sequence_id"]), b["score"]) == pytest.approx(b["score"], rel=0, abs=near)


def test_one_gpu_publishes_the_cpus_rows(on_cpu: Config) -> None:
    ours = run(Path(on_cpu.output).parent, "gpu", "cluster.gpus_per_rank=1")
    assert_same_rows(ours, on_cpu)
    assert read_layers(ours.output).num_rows == read_layers(on_cpu.output).num_rows
    assert read_summary(ours.output)["counts"]["scanned"]["nonfinite"] == 0


def test_gpus_are_used_where_there_are_some(on_cpu: Config) -> None:
    """cluster.gpus_per_rank=null finds them: the model's dtype `auto` is then the checkpoint's, float32 here."""
    base = Path(on_cpu.output).parent
    assert_same_rows(run(base, "found", "model.dtype=auto"), on_cpu)


@two_gpus
def test_two_gpus_hold_half_of_the_model_each(on_cpu: Config) -> None:
    base = Path(on_cpu.output).parent
    ours = run(base, "zero3", "cluster.ranks_per_worker=2", "cluster.gpus_per_rank=1")
    assert_same_rows(ours, on_cpu)
    summary = read_summary(ours.output)["workers"]
    [ranks] = summary["ranks"]
    assert len(ranks) == 2
    for rank in ranks:
        # A parameter of odd size is padded, by one element per rank at most.
        assert summary["parameters"] / 2 <= rank["shard_parameters"] < summary["parameters"] / 2 * 1.01


@two_gpus
def test_two_workers_of_one_gpu_publish_the_same_rows(on_cpu: Config) -> None:
    base = Path(on_cpu.output).parent
    ours = run(base, "workers", "cluster.num_workers=2", "cluster.gpus_per_rank=1")
    assert_same_rows(ours, on_cpu)
