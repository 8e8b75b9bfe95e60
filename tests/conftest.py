"""The environment of every test, and the object stores that some of them use."""

import os

# Before anything is imported that reads them.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    DS_ACCELERATOR="cpu",
)

import functools
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from tests import servers
from tests.chaos.proxy import Proxy, fault_proxy
from tests.chaos.warm import WORKER, template

# The demo's jobs take a third of all the time: with two processes, the other has the rest meanwhile.
LONGEST = "test_demo.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first."""
    items.sort(key=lambda item: item.path.name != LONGEST)


@dataclass(frozen=True)
class Bucket:
    """A bucket on a test server whose environment is set."""

    server: servers.ObjectServer
    name: str

    @property
    def env(self) -> dict[str, str]:
        """What a subprocess needs in its environment to use the bucket."""
        return self.server.env

    def uri(self, prefix: str = "") -> str:
        """`s3://bucket/prefix`; a prefix of its own where none is given."""
        return f"s3://{self.name}/{prefix or uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def s3() -> Iterator[Bucket]:
    """A bucket on a real S3 server, with this process's environment set for it until the session ends."""
    with servers.seaweedfs_with("infscan-test") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield Bucket(server, "infscan-test")


@pytest.fixture(scope="session")
def moto_server() -> Iterator[servers.ObjectServer]:
    """moto's server, with the bucket `infscan-moto`; the environment is not set."""
    with servers.moto() as server:
        server.make_bucket("infscan-moto")
        yield server


@pytest.fixture
def moto_s3(moto_server: servers.ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket on moto's server, with the environment set for it during one test."""
    for name, value in moto_server.env.items():
        monkeypatch.setenv(name, value)
    return Bucket(moto_server, "infscan-moto")


@pytest.fixture
def faulty_s3(moto_server: servers.ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Bucket, Proxy]]:
    """The bucket of `moto_s3` behind a proxy that plays the faults it is given, with the environment set for it."""
    with fault_proxy(moto_server) as proxy:
        for name, value in proxy.server.env.items():
            monkeypatch.setenv(name, value)
        yield Bucket(proxy.server, "infscan-moto"), proxy


@pytest.fixture(scope="session", autouse=True)
def warm_workers() -> Iterator[None]:
    """Every Ray that a test starts in this process forks its workers from a warm template: real ones, whose imports are
    done. The template starts with the first of them."""
    from ray._private.parameter import RayParams

    cold = RayParams.__init__
    with ExitStack() as opened, pytest.MonkeyPatch.context() as patch:
        start = functools.cache(lambda: opened.enter_context(template()))

        def warm(self: RayParams, *arguments: Any, **named: Any) -> None:
            start()
            cold(self, *arguments, **{"setup_worker_path": WORKER, **named})

        patch.setattr(RayParams, "__init__", warm)
        yield
