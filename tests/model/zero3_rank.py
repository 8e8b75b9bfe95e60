"""One rank of a sharded worker group, for test_zero3: capture each model's layers and save them.

python -m tests.model.zero3_rank <rank> <world> <port> <folder> <family>[+<option>...] ...

option: checkpointing, kept, cpu, nvme, blocks, within or last.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from infscan.config import Dtype, ModelConfig, Offload, ZeroConfig
from infscan.influence.layers import Layer
from infscan.model.architecture import describe
from infscan.model.capture import backward, capturing
from infscan.model.load import load
from infscan.model.loaded import LoadedModel
from infscan.model.losses import Loss, sequence_losses
from infscan.model.measure import next_tokens
from infscan.model.suffix import ends_at, last_blocks
from tests.ranks import one_rank

# Nothing stays gathered: every parameter is really partitioned and fetched when it is used.
TIGHT = ZeroConfig(max_live_parameters=1, max_reuse_distance=0, prefetch_bucket_size=1, param_persistence_threshold=0)


def settings(folder: Path, name: str) -> ModelConfig:
    family, _, option = name.partition("+")
    offload = next((Offload(one) for one in option.split("+") if one in ("cpu", "nvme")), Offload.none)
    zero = ZeroConfig() if option == "kept" else replace(TIGHT, offload=offload)
    if option.startswith("blocks"):
        # Partitioned as tightly, but for a block at a time.
        zero = replace(zero, max_live_parameters=None, prefetch_bucket_size=0)
    checkpointing = option.endswith("checkpointing")
    return ModelConfig(str(folder / family), Dtype.float32, zero=zero, gradient_checkpointing=checkpointing)


def captured(model: LoadedModel, layers: tuple[Layer, ...], rank: int, option: str = "") -> dict[str, Tensor]:
    """Losses, logits, and a and s of every layer, on this rank's own batch (shapes differ between ranks).

    last: of the last block alone, below which the backward ends; alone: of the head alone,
    likewise. within: rank 0's sequences are of three documents that do not see each other; the other ranks' of one.
    """
    ids_bt = (torch.arange(2 * (6 + rank)) * 7 % 40).view(2, -1)
    positions_bt = torch.tensor([[0, 1, 0, 0, 1, 2]] * 2) if option == "within" and rank == 0 else None
    layers = last_blocks(layers, 1) if option.endswith("last") else layers
    end = ends_at(layers) if option.endswith("last") else layers[0].name if option.endswith("alone") else None
    found: dict[str, Tensor] = {}

    def consume(layer: Layer, a_bti: Tensor, s_bto: Tensor, _routed: object) -> None:
        found[f"{layer.name}|a"], found[f"{layer.name}|s"] = a_bti.clone(), s_bto.clone()

    for _ in range(2):  # a second pass re-gathers what the first released
        found.clear()
        with capturing(model.module, layers, consume, ends_at=end):
            loss = Loss(*next_tokens(ids_bt, torch.ones_like(ids_bt, dtype=torch.bool)))
            losses_b = sequence_losses(model, ids_bt, positions_bt, loss, whole=option.startswith("head"))
            backward(losses_b.sum())
    with torch.no_grad():
        return found | {"losses": losses_b.detach().clone(), "logits": model.logits(ids_bt, positions_bt).clone()}


def layers_of(path: str, name: str) -> tuple[Layer, ...]:
    """What is tracked: the blocks' linears, and the output embeddings where the name says so."""
    option = name.partition("+")[2]
    return describe(path, {"head": "linear+head", "head+alone": "head"}.get(option, "linear")).layers


def main(rank: int, world: int, port: str, folder: Path, names: list[str]) -> None:
    with one_rank(rank, world, port) as place:
        for name in names:
            chosen = settings(folder, name)
            model = load(chosen, place, sharded=True)
            with gathers() as seen:
                tensors = captured(model, layers_of(chosen.path, name), rank, name.partition("+")[2])
            held = torch.tensor([model.shard_parameters, model.parameters, len(seen)])
            save_file(tensors | {"held": held}, folder / f"{name}-{rank}.safetensors")


@contextmanager
def gathers() -> Iterator[list[int]]:
    """The collectives that bring parameters together, by their entries."""
    from deepspeed.runtime.zero import partition_parameters

    seen: list[int] = []
    own = partition_parameters._dist_allgather_fn

    def counted(mine: Tensor, whole: Tensor, group: Any = None) -> Any:
        seen.append(whole.numel())
        return own(mine, whole, group)

    with mock.patch.object(partition_parameters, "_dist_allgather_fn", counted):
        yield seen


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5:])
