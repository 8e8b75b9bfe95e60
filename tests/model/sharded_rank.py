"""One rank of a sharded worker group, for test_sharded: the logits of each checkpoint of a folder, saved.

python -m tests.model.sharded_rank <rank> <world> <port> <folder> <name> ...
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from infscan.config import Dtype, ModelConfig
from infscan.model.load import load
from infscan.model.loaded import LoadedModel
from tests.model.zero3_rank import TIGHT
from tests.ranks import one_rank


def settings(folder: Path, name: str) -> ModelConfig:
    return ModelConfig(str(folder / name), Dtype.float32, zero=TIGHT)


@torch.no_grad()
def logits(model: LoadedModel) -> Tensor:
    return model.logits(torch.arange(3, 15).view(2, 6)).float().clone()


def main(rank: int, world: int, port: str, folder: Path, names: list[str]) -> None:
    with one_rank(rank, world, port) as place:
        for name in names:
            try:
                found = logits(load(settings(folder, name), place, sharded=True))
            except Exception as error:  # said by the test, which misses the file
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            save_file({"logits": found}, folder / f"{name}-{rank}.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5:])
