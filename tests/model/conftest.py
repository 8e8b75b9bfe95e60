"""The tiny model and small corpus of the steps' tests."""

from tests.steps.conftest import corpus, rank  # noqa: F401
