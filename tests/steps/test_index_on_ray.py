"""An index and its answers on a real Ray, and of a model cut over two ranks: the same codes, the same tables."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from infscan import pipeline
from infscan.api import read_run, run_ask
from infscan.config import ClusterConfig
from infscan.config.jobs import AskJob, IndexConfig, IndexJob
from infscan.engine.cluster import connect
from infscan.results.index_file import read_columns, read_manifest
from infscan.storage import Store
from tests.steps.runs import small_run
from tests.steps.test_index import HERE, make, unasked

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.shutdown()
    connect(ClusterConfig(num_workers=1, ranks_per_worker=2))
    yield
    ray.shutdown()


def test_two_ranks_of_a_worker_write_the_codes_of_one_process(tmp_path: Path) -> None:
    _, alone = make(tmp_path)
    config = small_run(tmp_path, f"factors.path={tmp_path / 'factors'}", "cluster.ranks_per_worker=2")
    job = IndexJob(**vars(unasked(config)) | {"output": str(tmp_path / "cut")}, index=IndexConfig())
    pipeline.make_index(job)
    stores = [Store(str(alone)), Store(str(tmp_path / "cut"))]
    files = [read_manifest(store).files for store in stores]
    assert list(files[0]) == list(files[1])
    layers = list(read_manifest(stores[0]).layers)
    for name in files[0]:
        columns = ["sequence_id", "loss", *(f"{kind}|{layer}" for layer in layers for kind in ("code", "scale"))]
        one, two = (read_columns(store, name, columns) for store in stores)
        assert (one["sequence_id"] == two["sequence_id"]).all()
        np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)
        for layer in layers:
            np.testing.assert_allclose(one[f"scale|{layer}"], two[f"scale|{layer}"], rtol=1e-3)
            # A coordinate within rounding of zero may have another sign.
            different = np.unpackbits(one[f"code|{layer}"] ^ two[f"code|{layer}"])
            assert different.mean() < 1e-3
    # Asked through Ray, where the search is cut into tasks, and in this process: the same rows.
    answers = []
    for name, cluster in (("ray", ClusterConfig()), ("here", HERE)):
        output, queries = str(tmp_path / name), str(tmp_path / "queries.jsonl")
        run_ask(AskJob(index=str(alone), queries=queries, top_k=5, output=output, cluster=cluster))
        answers.append(read_run(output).top().select(["query_id", "side", "rank", "sequence_id", "score"]))
    assert answers[0].equals(answers[1])
