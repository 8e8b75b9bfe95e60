"""A backward through the last blocks alone: the same gradients there, and nothing below is recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from infscan.config import ModelConfig
from infscan.errors import ConfigError, ModelError
from infscan.influence.layers import Layer
from infscan.influence.routed import Routed
from infscan.model.architecture import describe
from infscan.model.loaded import RankContext
from infscan.model.suffix import ends_at, last_blocks
from infscan.model.worker import Batch, ModelWorker, WorkerSettings
from tests.steps.runs import tiny_model


def worker(folder: Path, family: str, tracked: str = "mlp", *, checkpointing: bool = False) -> ModelWorker:
    architecture = describe(str(tiny_model(folder, family=family, layers=4)), tracked)
    model = ModelConfig(path=str(folder), tracked=tracked, gradient_checkpointing=checkpointing)
    return ModelWorker(WorkerSettings(model, architecture.layers, sharded=False), RankContext())


def gradients(rank: ModelWorker, layers: tuple[Layer, ...], end: str | None) -> dict[str, Tensor]:
    """g of every layer and sequence, [B, O, I]."""
    ids = torch.arange(1, 25).view(2, 12)
    batch = Batch(np.arange(2), ids, torch.ones_like(ids, dtype=torch.bool), padded=False)
    found: dict[str, Tensor] = {}

    def consume(layer: Layer, s: Tensor, a: Tensor, _routed: Routed | None) -> None:
        found[layer.name] = s.transpose(1, 2) @ a

    rank.backward(batch, layers, batch.loss(), consume, ends_at=end)
    return found


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "llama"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
def test_gradients_of_the_last_blocks_are_those_of_a_whole_backward(
    family: str, checkpointing: bool, blocks: int, tmp_path: Path
) -> None:
    rank = worker(tmp_path, family, checkpointing=checkpointing)
    some = last_blocks(rank.layers, blocks)
    whole, suffix = gradients(rank, rank.layers, None), gradients(rank, some, ends_at(some))
    assert suffix.keys() == {layer.name for layer in some}
    assert len({name.split(".")[2] for name in suffix}) == blocks
    for name, found in suffix.items():
        assert torch.equal(found, whole[name])
    # And afterwards a whole one is what it was.
    assert all(torch.equal(found, whole[name]) for name, found in gradients(rank, rank.layers, None).items())


def test_nothing_below_is_recorded(tmp_path: Path) -> None:
    rank = worker(tmp_path, "gpt_neox")
    recorded: dict[str, bool] = {}
    for number in range(4):
        block = rank.model.module.get_submodule(f"gpt_neox.layers.{number}.mlp")
        block.register_forward_hook(
            lambda _m, _a, out, number=number: recorded.update({number: out.grad_fn is not None})
        )
    some = last_blocks(rank.layers, 2)
    gradients(rank, some, ends_at(some))
    assert recorded == {0: False, 1: False, 2: True, 3: True}


def layer(name: str) -> Layer:
    return Layer(name, 3, 3, False, name)


def test_where_blocks_are_and_what_is_below() -> None:
    layers = tuple(layer(f"model.layers.{number}.mlp.{part}") for number in (0, 1, 3) for part in ("up", "down"))
    head = layer("lm_head")
    assert last_blocks((*layers, head), 1) == (*layers[4:], head)
    assert last_blocks(layers, 2) == layers[2:]
    assert ends_at(last_blocks(layers, 1)) == "model.layers.2"
    assert ends_at(last_blocks(layers, 2)) == "model.layers.0"
    assert ends_at(layers) is None
    assert ends_at([head]) is None
    assert last_blocks([layer("h.0.mlp.experts.up.11"), layer("h.2.mlp.experts.up.1")], 1)[0].name.startswith("h.2.")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["h.0.a.w", "h.1.a.w", "h.2.a.w"], "the model has 3 blocks"),
        (["encoder.0.a.w", "decoder.0.a.w"], "in 2 rows"),
        (["lm_head"], "in 0 rows"),
    ],
)
def test_a_sieve_that_leaves_nothing_out_is_refused(names: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        last_blocks([layer(name) for name in names], 3)


def test_a_layer_that_the_backward_does_not_reach_is_named(tmp_path: Path) -> None:
    rank = worker(tmp_path, "gpt_neox")
    with pytest.raises(
        ModelError, match=r"layers\.0\.mlp.*is not reached by a backward that ends at gpt_neox\.layers\.2"
    ):
        gradients(rank, rank.layers, "gpt_neox.layers.2")
