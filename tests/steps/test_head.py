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

from infscan.config import Config, Dtype, ModelConfig
from infscan.influence.layers import Layer
from infscan.model.architecture import describe
from infscan.model.gathered import blocks
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.results.read import read_scores
from infscan.steps import factors
from infscan.steps.factor_files import read_factors
from infscan.steps.factors import CovarianceSums, _Fitting
from tests.steps.builders import as_rank, small_corpus
from tests.steps.runs import VOCAB, answer_here, small_run, tiny_model


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


def scores(config: Config) -> np.ndarray:
    table = read_scores(config.output).sort_by("sequence_id")
    return np.stack([np.asarray(table[f"score_q{query}"]) for query in range(3)])


HEAD = ("model.tracked=mlp+head", "model.dtype=float64", "scan.rank=null", "scan.scores=all", "scan.similarity=0")


def test_a_span_of_all_outputs_gives_the_scores_of_the_whole_factors(tmp_path: Path) -> None:
    """S of the head seen through a Gaussian matrix, slice by slice, against S itself; of half of it they are near."""
    tiny_model(tmp_path / "model", family="llama")
    answer_here(whole := small_run(tmp_path, *HEAD))
    exact = scores(whole)
    agreement = []
    for span in (48, VOCAB):
        config = small_run(
            tmp_path, *HEAD, "factors.span_from=8", f"factors.span={span}", f"output={tmp_path / f'span{span}'}"
        )
        answer_here(config)
        agreement.append(np.corrcoef(scores(config).ravel(), exact.ravel())[0, 1])
        ours, theirs = (read_factors(str(one.factors.path))["lm_head"] for one in (config, whole))
        assert ours.S is None
        assert ours.Lambda.shape == (VOCAB, 32)
        # Whatever the basis of the outputs, each input axis has the gradients' squares in all.
        torch.testing.assert_close(ours.Lambda.sum(dim=0), theirs.Lambda.sum(dim=0), rtol=1e-5, atol=0.0)
    assert scores(config) == pytest.approx(exact, rel=1e-6, abs=1e-6 * float(np.abs(exact).max()))
    assert agreement[0] > 0.9
    # The MLPs' factors are the same files.
    files = [path for path in (Path(str(whole.factors.path)) / "S").iterdir() if "lm_head" not in path.name]
    assert files
    for path in files:
        assert path.read_bytes() == (Path(str(config.factors.path)) / "S" / path.name).read_bytes()


def test_two_ranks_sketches_add_up_to_one_ranks(tmp_path: Path) -> None:
    corpus = small_corpus(tmp_path)
    architecture = describe(str(tiny_model(tmp_path / "model", family="llama")), "head").with_span(8, 16)
    model = ModelConfig(architecture.folder, Dtype.float64, tracked="head")
    alone = ModelWorker(WorkerSettings(model, architecture.layers, sharded=False), RankContext())
    sequences = corpus.read(np.arange(corpus.sequences))

    def summed(worker: ModelWorker) -> Tensor:
        sums = CovarianceSums(architecture.layers, 1, torch.float64, "cpu")
        for batch in worker.batches(sequences, 64):
            worker.backward(batch, architecture.layers, batch.loss(), sums.consumer(batch), ones=False)
        ((sketch, trace),) = sums.sketches.values()
        return torch.cat([sketch.flatten(), trace])

    torch.testing.assert_close(sum(summed(as_rank(alone, number, 2)) for number in range(2)), summed(alone))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_head_alone_takes_no_backward_pass(tmp_path: Path, family: str, checkpointing: bool) -> None:
    """Nothing in the blocks has a graph; a and s are those that a backward through all of them gives."""
    folder = tiny_model(tmp_path / "model", family=family)
    both = describe(str(folder), "mlp+head").layers
    alone = both[-1:]
    model = ModelConfig(str(folder), Dtype.float64, tracked="mlp+head", gradient_checkpointing=checkpointing)
    worker = ModelWorker(WorkerSettings(model, both, sharded=False), RankContext())
    sequences = small_corpus(tmp_path, 4)
    (batch,) = worker.batches(sequences.read(np.arange(2)), 1 << 20)
    graphs: list[bool] = []
    for block in blocks(worker.model.module):
        block.register_forward_hook(
            lambda _module, _args, out: graphs.append((out if isinstance(out, Tensor) else out[0]).requires_grad)
        )

    def seen(layers: tuple[Layer, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        found: dict[str, tuple[Tensor, Tensor]] = {}
        worker.backward(batch, layers, batch.loss(), lambda layer, s, a, _: found.update({layer.name: (s, a)}))
        return found

    mine = seen(alone)
    assert graphs == [False] * 2
    theirs = seen(both)
    for one, other in zip(mine[alone[0].name], theirs[alone[0].name], strict=True):
        torch.testing.assert_close(one, other)


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
