"""One tiny model and one small corpus for all tests of the passes."""

from __future__ import annotations

import pytest

from infscan.corpus.addressable import PreparedCorpus
from infscan.model.worker import ModelWorker
from infscan.steps.preconditioner import Preconditioner
from infscan.storage import Store
from tests.steps.builders import fit, fit_plan, one_rank, small_corpus


@pytest.fixture(scope="package")
def rank(tmp_path_factory: pytest.TempPathFactory) -> ModelWorker:
    return one_rank(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="package")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="package")
def inverse(tmp_path_factory: pytest.TempPathFactory, rank: ModelWorker, corpus: PreparedCorpus) -> Preconditioner:
    """Factors of the whole corpus, in one slice and one layer group."""
    return fit(rank, Store(str(tmp_path_factory.mktemp("factors"))), corpus, fit_plan(rank, corpus))
