"""No pass waits for its device within a micro-batch: told on a CPU by the operations that would wait on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from infscan.config import Labels, ModelConfig
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.model.architecture import describe
from infscan.model.loaded import RankContext
from infscan.model.worker import Batch, ModelWorker, WorkerSettings
from infscan.steps.factors import covariance_task, lambda_task
from infscan.steps.scan import scan_task
from tests.gpu.kit.agreement import REFERENCE, reference
from tests.gpu.kit.study import Study
from tests.gpu.kit.waits import Waits, counted
from tests.model import families, zoo


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    study = Study.make(tmp_path_factory.mktemp("study"))
    reference(study)
    return study


@pytest.fixture
def watched(study: Study, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelWorker, list[Waits]]:
    """A rank that is watched from its first batch to the end of its loop, and what was seen in each loop."""
    rank, found = study.rank("cpu"), list[Waits]()
    batches = rank.batches

    def watching(*arguments: object) -> Iterator[object]:
        with counted() as seen:
            yield from batches(*arguments)  # type: ignore[arg-type]
        found.append(seen)

    monkeypatch.setattr(rank, "batches", watching)
    return rank, found


def nothing_waited(found: list[Waits]) -> bool:
    return bool(found) and not [where for seen in found for where in seen.where]


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x.to("cpu"), "to"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: torch.tensor([1.0], device=x.device), "tensor"),
        (lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64)), "repeat_interleave"),
    ],
)
def test_what_waits_is_seen_and_told_where(wait: object, name: str) -> None:
    x = torch.ones(3, requires_grad=True)
    y = x * 2
    # Within a hook of the backward pass, where layers are consumed.
    y.register_hook(lambda gradient: (wait(gradient), None)[1])  # type: ignore[operator]
    with counted() as seen:
        y.sum().backward()
    assert [where.partition(" at ")[0] for where in seen.where] == [name]
    assert "test_waits.py" in seen.where[0]
    with counted() as seen:
        _ = (x * 2).sum().to(x.device), torch.zeros(3), x[:2]
    assert len(seen) == 0


@pytest.mark.parametrize("compressed", [None, 16], ids=["full rank", "rank 16"])
def test_the_scan_does_not_wait(study: Study, watched: tuple[ModelWorker, list[Waits]], compressed: int | None) -> None:
    rank, found = watched
    batch = study.query_batch(rank, REFERENCE, compressed)
    found.clear()
    assert scan_task(rank, study.scan_task(rank, compressed), batch) is not None
    assert nothing_waited(found), found


def test_refining_does_not_wait(study: Study, watched: tuple[ModelWorker, list[Waits]]) -> None:
    rank, found = watched
    assert study.refined(rank, REFERENCE).shape == (3, study.sequences)
    assert nothing_waited(found), found


@pytest.mark.parametrize("labels", list(Labels))
def test_the_fit_does_not_wait(study: Study, watched: tuple[ModelWorker, list[Waits]], labels: Labels) -> None:
    rank, found = watched
    task = study.fit_task(f"covariance-{labels.value}", labels, draw_labels=labels is Labels.sampled)
    assert covariance_task(rank, task) > 0
    assert lambda_task(rank, study.fit_task(REFERENCE, Labels.empirical)) > 0
    assert len(found) == 2
    assert nothing_waited(found), found


@pytest.mark.parametrize("family", list(families.CONFIGS))
@pytest.mark.parametrize("within", [False, True], ids=["across", "within"])
def test_no_family_waits_in_forward_and_backward(family: str, within: bool, tmp_path: Path) -> None:
    path = families.save(family, tmp_path)
    assert not waits_of(path, within).where


def test_a_mixture_of_experts_waits_to_hear_who_goes_where(tmp_path: Path) -> None:
    """How many tokens each expert has is the size of its products: the host has to know."""
    found = waits_of(zoo.save("mixtral", tmp_path), False).where
    assert found
    assert all("experts.py" in where for where in found)


def waits_of(path: Path, within: bool) -> Waits:
    architecture = describe(str(path), "mlp")
    settings = WorkerSettings(ModelConfig(str(path)), architecture.layers, sharded=False)
    rank = ModelWorker(settings, RankContext())
    ids_bt = torch.arange(16).view(2, 8) % 37 + 3
    positions_bt = torch.arange(8).repeat(2, 1) % 4 if within else None
    batch = Batch(np.arange(2), ids_bt, torch.ones_like(ids_bt, dtype=torch.bool), position_ids_bt=positions_bt)

    def consume(layer: Layer, s: torch.Tensor, a: torch.Tensor, routed: Routed | None) -> None:
        return None

    loss = batch.loss()
    with counted() as seen:
        rank.backward(batch, architecture.layers, loss, consume, ones=False)
    return seen
