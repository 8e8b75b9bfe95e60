"""What a GPU computes is what a CPU computes, to the last bits of float32, and nearly so in bfloat16."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infscan.config import Dtype, Labels
from infscan.model.worker import ModelWorker
from infscan.results.tensor_files import read_tensors
from infscan.steps.factors import covariance_task
from infscan.storage import Store
from tests.gpu.study import Study

GPU = "cuda:0"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study.make(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def cpu(study: Study) -> ModelWorker:
    """A float32 rank on the CPU, which has fitted the factors `cpu`."""
    rank = study.rank("cpu")
    study.fit(rank, "cpu")
    return rank


def relative(ours: np.ndarray | torch.Tensor, theirs: np.ndarray | torch.Tensor) -> float:
    """Difference over norm. Single scores that nearly cancel have no relative accuracy of their own."""
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("compressed", [None, 16], ids=["full rank", "rank 16"])
def test_float32_scores_are_the_cpus(study: Study, cpu: ModelWorker, compressed: int | None) -> None:
    """The same factors on both: eigenvectors of nearly equal eigenvalues may turn freely, and are not at question."""
    ours = study.scores(study.rank(GPU), "cpu", compressed)
    theirs = study.scores(cpu, "cpu", compressed)
    for query in range(len(theirs)):
        assert relative(ours[query], theirs[query]) < 1e-4


def test_factors_fitted_on_the_gpu_are_the_cpus(study: Study, cpu: ModelWorker) -> None:
    """A, S and Lambda's mean do not depend on how the eigenvectors of one eigenvalue are turned."""
    study.fit(study.rank(GPU), "gpu")
    ours, theirs = study.factors("gpu"), study.factors("cpu")
    for layer in study.architecture.layers:
        for kind in ("A", "S"):
            assert relative(_tensor(ours, kind, layer.name), _tensor(theirs, kind, layer.name)) < 1e-5
        Lambda, known = _tensor(ours, "Lambda", layer.name), _tensor(theirs, "Lambda", layer.name)
        # |g|^2 summed: a rotation keeps it.
        assert float(Lambda.sum()) == pytest.approx(float(known.sum()), rel=1e-4)


def _tensor(store: Store, kind: str, layer: str) -> torch.Tensor:
    return read_tensors(store, f"{kind}/{layer}.safetensors")[kind]


def test_labels_drawn_on_the_gpu_are_the_cpus(study: Study, cpu: ModelWorker) -> None:
    """The numbers come from (seed, sequence, position); rounding may move a boundary of the distribution past a few."""
    drawn = {}
    for name, rank in (("labels-cpu", cpu), ("labels-gpu", study.rank(GPU))):
        covariance_task(rank, study.fit_task(name, Labels.sampled, draw_labels=True))
        drawn[name] = read_tensors(study.factors(name), "labels/slice-0000.safetensors")["labels"]
    differing = (drawn["labels-cpu"] != drawn["labels-gpu"]).float().mean()
    assert float(differing) < 1e-3


def test_bfloat16_scores_follow_float32(study: Study, cpu: ModelWorker) -> None:
    ours = study.scores(study.rank(GPU, Dtype.bfloat16), "cpu", None)
    theirs = study.scores(cpu, "cpu", None)
    for query in range(len(theirs)):
        assert np.corrcoef(ours[query], theirs[query])[0, 1] >= 0.99
