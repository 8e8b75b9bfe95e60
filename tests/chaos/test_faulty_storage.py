"""The whole job over a faulty way to its storage: the tables of an undisturbed run, and every fault counted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from infscan.config import ClusterConfig, Config
from infscan.engine.cluster import connect
from infscan.errors import StorageError
from infscan.pipeline import answer
from infscan.results.read import read_scores, read_summary
from infscan.storage import Store
from tests.chaos.every_call import tiny_inputs, tiny_run
from tests.chaos.one_process import without_ray
from tests.chaos.proxy import Plan, Proxy, always, fault_proxy
from tests.chaos.test_every_call import SEED
from tests.conftest import Bucket
from tests.steps.runs import small_run
from tests.steps.test_end_to_end import rows_of


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inputs")
    tiny_inputs(root)
    return root


@pytest.fixture(scope="module")
def twin(inputs: Path) -> Config:
    config = tiny_run(inputs, inputs / "run")
    with without_ray():
        answer(config)
    return config


def assert_same_tables(ours: Config, twin: Config) -> None:
    assert rows_of(ours.output) == rows_of(twin.output)
    assert read_scores(ours.output).equals(read_scores(twin.output))
    assert read_summary(ours.output)["counts"] == read_summary(twin.output)["counts"]


def test_a_job_through_faults_gives_the_twin_s_tables(
    twin: Config, inputs: Path, faulty_s3: tuple[Bucket, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process: every fault that it met is in its summary, under its kind."""
    bucket, proxy = faulty_s3
    monkeypatch.setattr("infscan.storage.retry.FIRST_PAUSE_S", 0.02)
    config = tiny_run(inputs, bucket.uri())
    proxy.plan, proxy.slow_s = Plan(SEED, rate=0.2), 0.02
    with without_ray():
        answer(config)
    proxy.plan = None
    assert_same_tables(config, twin)
    faults = read_summary(config.output)["storage_faults"]
    assert set(faults) <= {"broken", "busy", "connection", "cut_off"}
    # The draw goes by the path, which differs from run to run: of some 60 faults played about 30 are errors.
    assert 4 < sum(faults.values()) <= proxy.played


def test_a_store_that_stays_away_ends_the_run_and_when_it_is_back_the_run_goes_on(
    twin: Config, inputs: Path, faulty_s3: tuple[Bucket, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = faulty_s3
    monkeypatch.setenv("INFSCAN_STORAGE_RETRY_S", "0.3")
    config = tiny_run(inputs, bucket.uri())
    away = always("503")
    done = f"{config.output.split('/', 3)[3]}/factors/factors.json"
    proxy.plan = lambda method, path: away(method, path) if any(done in seen for _, seen in proxy.requests) else None
    with without_ray():
        with pytest.raises(StorageError, match=r"answered (SlowDown|503), \d+ times; try again when it has recovered"):
            answer(config)
        proxy.plan = None
        assert not Store(config.output).exists("_SUCCESS")
        answer(config)
    assert_same_tables(config, twin)


@pytest.fixture
def ray_through_faults(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A local Ray whose driver and workers reach the real S3 server by the proxy alone."""
    with fault_proxy(s3.server, Plan(SEED, rate=0.2), slow_s=0.1) as proxy:
        for name, value in proxy.server.env.items():
            monkeypatch.setenv(name, value)
        ray.shutdown()
        connect(ClusterConfig(num_workers=2))
        yield proxy
        ray.shutdown()


@pytest.mark.slow
def test_a_job_on_ray_through_faults_to_a_real_server_gives_the_twin_s_tables(
    tmp_path: Path, s3: Bucket, ray_through_faults: Proxy
) -> None:
    overrides = ("scan.scores=all", "cluster.num_workers=2", "scan.shard_sequences=4")
    config = small_run(tmp_path, *overrides, f"output={s3.uri()}")
    answer(config)
    played = ray_through_faults.counts.copy()
    ray_through_faults.plan = None
    twin = small_run(tmp_path, *overrides, f"output={tmp_path / 'twin'}")
    with without_ray():
        answer(twin)
    assert_same_tables(config, twin)
    faults = read_summary(config.output)["storage_faults"]
    print(f"seed {SEED}: played {dict(played)}, counted {faults}")
    assert sum(faults.values()) > 20
    assert "given_up" not in faults
