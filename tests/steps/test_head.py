"""The output embeddings tracked through a whole job, against plain autograd; eigenbases found on ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

from infscan.model.worker import ModelWorker
from infscan.results.read import read_scores
from infscan.steps import factors
from infscan.steps.factors import _Fitting
from tests.steps.builders import as_rank
from tests.steps.runs import answer_here, small_run, tiny_model


def gradient(model: PreTrainedModel, ids: list[int], first: int = 1) -> Tensor:
    """Of the loss of the tokens from `first` on, with respect to the head and the MLPs, in one row."""
    parameters = [p for name, p in model.named_parameters() if "mlp" in name or name.startswith("lm_head")]
    ids_t = torch.tensor(ids)
    logits_tv = model(ids_t[None]).logits[0]
    loss = cross_entropy(logits_tv[first - 1 : -1], ids_t[first:], reduction="sum")
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)])


def test_a_job_that_tracks_the_head_gives_the_gradients_of_autograd(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model", family="llama")
    config = small_run(
        tmp_path,
        "model.tracked=mlp+head",
        "model.dtype=float64",
        "factors=identity",
        "scan.rank=null",
        "scan.scores=all",
    )
    answer_here(config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    rows = [json.loads(line)["tokens"] for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()]
    sequences = torch.stack([gradient(model, row) for row in rows])
    ours = read_scores(config.output).sort_by("sequence_id")
    for query in asked:
        expected = (sequences @ gradient(model, query["input_ids"], query["prompt_len"])).numpy()
        found = np.asarray(ours[f"score_{query['id']}"])
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_ranks_find_the_eigenbases_that_tasks_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs: one unit for as many layers as a worker has ranks, and each rank decomposes its own."""
    first = small_run(tmp_path)
    answer_here(first)
    decompose = _Fitting.decompose
    monkeypatch.setattr(_Fitting, "decompose", lambda fitting, executor, **_: decompose(fitting, executor, gpus=2))
    alone = factors.decompose_task
    shares: list[int] = []

    def on_two_ranks(worker: ModelWorker, task: factors.DecomposeTask) -> None:
        for number in range(2):
            alone(as_rank(worker, number, 2), task)
            shares.append(len(list((Path(task.factors.uri) / "S").glob("*.safetensors"))))

    monkeypatch.setattr(factors, "decompose_task", on_two_ranks)
    second = small_run(tmp_path, f"output={tmp_path / 'again'}")
    answer_here(second)
    one, other = (Path(str(config.factors.path)) for config in (first, second))
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert {path.parts[0] for path in files} >= {"A", "S", "Lambda"}
    assert shares == [*range(1, len(shares) + 1)]
    assert all((one / path).read_bytes() == (other / path).read_bytes() for path in files)
