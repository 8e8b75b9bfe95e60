"""A model cut over two ranks gives each rank what the whole model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infscan.model.load import load
from infscan.model.loaded import RankContext
from tests.model.families import save
from tests.model.zero3_rank import captured, layers_of, settings
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

# Renamed keys in the checkpoint; a tied unembedding and checkpointing; Conv1D, and small parameters kept gathered;
# shards in the host's memory, and in a mapped file; documents that do not see each other, on one of the ranks; a
# backward that ends below the last block; blocks that are gathered whole.
NAMES = ["gpt_neox", "llama+checkpointing", "gpt2+kept", "llama+cpu", "gpt_neox+nvme", "gpt_neox+within", "gpt2+within"]
BLOCKS = ["gpt_neox+blocks", "llama+blocks", "llama+blocks+checkpointing", "opt+blocks", "llama+blocks+last"]
NAMES += [*BLOCKS, "llama", "opt", "llama+blocks+cpu", "gpt_neox+blocks+nvme", "llama+last"]
# The output embeddings among the tracked layers, tied to the input's (gpt2) or not, and alone.
NAMES += ["llama+head", "gpt2+head", "llama+head+alone", "gpt2+head+alone"]
WORLD = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and what each rank captured of them."""
    folder = tmp_path_factory.mktemp("zero3")
    for family in {name.partition("+")[0] for name in NAMES}:
        save(family, folder)
    run_ranks("tests.model.zero3_rank", WORLD, str(folder), *NAMES, timeout_s=600)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_captures_what_the_whole_model_gives(folder: Path, name: str) -> None:
    chosen = settings(folder, name)
    whole = load(chosen, RankContext(), sharded=False)
    layers = layers_of(chosen.path, name)
    for rank in range(WORLD):
        found = load_file(folder / f"{name}-{rank}.safetensors")
        held, parameters, _ = found.pop("held").tolist()
        assert parameters == whole.parameters
        assert parameters / WORLD <= held < 0.6 * parameters
        expected = captured(whole, layers, rank, name.partition("+")[2])
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(
                found[key], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_gathered_in_one_call(folder: Path, name: str) -> None:
    """Two blocks, embeddings and head: each once forward and once back, twice over; else every matrix by itself."""
    apart = name.replace("+blocks", "")
    together, one_by_one = (int(load_file(folder / f"{each}-0.safetensors")["held"][2]) for each in (name, apart))
    assert together < one_by_one / 3
