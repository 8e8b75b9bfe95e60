"""Ray's workers are forked from a warm template here: real ones, but for the seconds of their imports."""

from collections.abc import Iterator
from functools import partialmethod

import pytest
from ray._private.parameter import RayParams

from tests.chaos.warm import WORKER, template


@pytest.fixture(scope="session", autouse=True)
def warm_workers() -> Iterator[None]:
    """For every Ray that a test of this folder starts in its own process."""
    with template(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(RayParams, "__init__", partialmethod(RayParams.__init__, setup_worker_path=WORKER))
        yield
