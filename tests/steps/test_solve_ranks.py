"""A worker group iterates as one rank does, with the model whole on every rank or cut over them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infscan.config import Packing
from infscan.influence.layers import Layer
from infscan.model.gauss_newton import owners
from infscan.model.loaded import RankContext
from infscan.storage import Store
from tests.corpus.builders import prepare, settings, token_rows, write_rows
from tests.model import families, zoo
from tests.ranks import run_ranks
from tests.steps.builders import fit, fit_plan
from tests.steps.solve_rank import found_by, opened


def together(folder: Path, names: list[str], *, sharded: bool) -> None:
    """Two ranks' results against one's. sharded: with ZeRO-3, in float32."""
    rows = [row for row in token_rows(24, seed=1, longest=24) if row["tokens"]]
    rows = [row | {"tokens": [token % families.VOCAB for token in row["tokens"]]} for row in rows]
    write_rows(folder / "in.jsonl", rows)
    corpus = prepare(folder / "in.jsonl", folder / "out", settings(Packing.document, 24))[1]
    for name in names:
        (families.save if name in families.CONFIGS else zoo.save)(name, folder)
        alone = opened(folder, name, RankContext(), sharded=False)
        fit(alone, Store(str(folder / f"{name}-factors")), corpus, fit_plan(alone, corpus))
    run_ranks("tests.steps.solve_rank", 2, str(int(sharded)), str(folder), *names, timeout_s=240)
    for name in names:
        expected = found_by(opened(folder, name, RankContext(), sharded=False), folder, name)
        found = load_file(folder / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        for kind in ("product", "cg", "astra", "targets"):
            ours, theirs = (
                torch.cat([each[key].flatten().double() for key in expected if key.startswith(kind)])
                for each in (found, expected)
            )
            assert float((ours - theirs).norm() / theirs.norm()) < (1e-4 if sharded else 1e-10), (name, kind)


def test_two_ranks_that_share_the_work_find_what_one_finds(tmp_path: Path) -> None:
    """Vectors in parts, micro-batches dealt, a dummy among them."""
    together(tmp_path, ["gpt_neox"], sharded=False)


@pytest.mark.slow
def test_two_ranks_share_the_work_of_a_mixture(tmp_path: Path) -> None:
    """An expert may have tokens on one rank alone."""
    together(tmp_path, ["qwen3_moe"], sharded=False)


@pytest.mark.slow
def test_two_ranks_that_share_a_model_find_what_one_finds(tmp_path: Path) -> None:
    """ZeRO-3: parameters are gathered under forward-mode differentiation, and for a backward of several vectors."""
    together(tmp_path, ["gpt_neox", "gpt2", "llama", "qwen3_moe"], sharded=True)


def test_layers_go_to_whoever_has_least() -> None:
    sizes = {"a": 10, "b": 40, "c": 20, "d": 15}
    layers = [Layer(name, size, 1, False, name) for name, size in sizes.items()]
    assert owners(layers, 2) == {"b": 0, "c": 1, "d": 1, "a": 1}
    assert owners(layers, 1) == dict.fromkeys(sizes, 0)
    # More ranks than layers: some have none.
    assert sorted(owners(layers, 6).values()) == [0, 1, 2, 3]
