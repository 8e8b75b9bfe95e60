"""A checkpoint is the same model whole and cut over two ranks, in every family and however it is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infscan.model.load import load
from infscan.model.loaded import RankContext
from tests.model import families, zoo
from tests.model.sharded_rank import logits, settings
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

WORLD = 2
FAMILIES = [name for name in zoo.FAMILIES if name not in zoo.NO_LANGUAGE_MODELS]


def tied_with_its_own_head(folder: Path, scale: float) -> str:
    """A checkpoint that brings a head which its configuration ties; `scale` 1: the same one."""
    name = f"own-head-{scale}"
    families.save("llama", folder / name)
    (folder / name / "llama").rename(folder / "moved")
    (folder / name).rmdir()
    (folder / "moved").rename(folder / name)
    path = folder / name / "model.safetensors"
    weights = load_file(path)
    assert json.loads((folder / name / "config.json").read_text())["tie_word_embeddings"]
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = (
        scale * weights["model.embed_tokens.weight"].flip(0)
        if scale != 1
        else (weights["model.embed_tokens.weight"].clone())
    )
    save_file(weights, path, metadata={"format": "pt"})
    return name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for name in FAMILIES:
        zoo.save(name, folder)
    names = [*FAMILIES, tied_with_its_own_head(folder, 1), tied_with_its_own_head(folder, -1)]
    run_ranks("tests.model.sharded_rank", WORLD, str(folder), *names, timeout_s=900)
    return folder


@pytest.mark.parametrize("name", [*FAMILIES, "own-head-1", "own-head--1"])
def test_logits_are_the_whole_models(folder: Path, name: str) -> None:
    expected = logits(load(settings(folder, name), RankContext(), sharded=False))
    for rank in range(WORLD):
        found = load_file(folder / f"{name}-{rank}.safetensors")["logits"]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
