"""What ranks gather of a shared model at a time follows from its largest block."""

from __future__ import annotations

from pathlib import Path

import pytest

from infscan.config import ZeroConfig
from infscan.model.architecture import describe, load_config
from infscan.model.family import build_on_meta
from infscan.model.gathered import GatherLimits, blocks, largest_block
from tests.model import zoo
from tests.model.families import CONFIGS, save


def test_a_small_models_limits_are_a_number_and_a_large_ones_are_blocks() -> None:
    assert GatherLimits.of(ZeroConfig(), 0) == GatherLimits(30_000_000, 10_000_000, 0)
    assert GatherLimits.of(ZeroConfig(), 7_000_000) == GatherLimits(30_000_000, 10_000_000, 7_000_000)
    # A Llama of 70B: a block of 856 million, where one matrix of it has 235.
    assert GatherLimits.of(ZeroConfig(), 856_000_000) == GatherLimits(1_712_000_000, 856_000_000, 856_000_000)
    given = GatherLimits.of(ZeroConfig(max_live_parameters=5, prefetch_bucket_size=0), 856_000_000)
    assert (given.live, given.ahead, given.most(235), given.most(2)) == (5, 0, 235, 5)
    # One matrix more than two blocks: with it what is gathered ahead reaches its limit.
    assert GatherLimits.of(ZeroConfig(), 856_000_000).most(235_000_000) == 1_947_000_000


def test_a_block_is_gathered_whole_where_it_may_be() -> None:
    limits = {live: GatherLimits.of(ZeroConfig(max_live_parameters=live), 100) for live in (None, 99, 100, 0)}
    assert {live: one.by_block for live, one in limits.items()} == {None: True, 99: False, 100: True, 0: False}
    assert not GatherLimits.of(ZeroConfig(), 0).by_block


@pytest.mark.parametrize("family", [*CONFIGS, "mixtral", "gemma3", "gptj"])
def test_every_familys_blocks_are_found(family: str, tmp_path: Path) -> None:
    folder = save(family, tmp_path) if family in CONFIGS else zoo.save(family, tmp_path)
    module = build_on_meta(load_config(folder))
    found = blocks(module)
    text = module.config.get_text_config()
    assert len([one for one in found if "Vision" not in type(one).__name__]) >= text.num_hidden_layers
    within = sum(parameter.numel() for block in found for parameter in block.parameters())
    assert within <= sum(parameter.numel() for parameter in module.parameters())
    assert describe(str(folder), "mlp").block == largest_block(module) > 0
