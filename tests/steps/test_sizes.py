"""Sizes that nobody gave: a CPU's are constants, a GPU's go by its memory, and a run that is resumed keeps its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infscan.config import ON_A_CPU, Config
from infscan.engine.cluster import gpu_memory
from infscan.engine.executor import RankMemory
from infscan.influence.layers import Layer
from infscan.model.architecture import Architecture
from infscan.sizing.devices import DEVICES
from infscan.steps.factor_files import layer_groups
from infscan.steps.preconditioner import query_groups
from infscan.steps.sizes import as_stored, on_a_gpu, settled

GIB = 2**30


def llama(blocks: int, d: int, F: int, parameters: int) -> Architecture:
    layers = []
    for block in range(blocks):
        name = f"model.layers.{block}.mlp."
        layers.append(Layer(f"{name}gate_proj", F, d, False, f"{name}gate_proj"))
        layers.append(Layer(f"{name}up_proj", F, d, False, f"{name}gate_proj"))
        layers.append(Layer(f"{name}down_proj", d, F, False, f"{name}down_proj"))
    return Architecture("folder", "fingerprint", 128256, 8192, None, None, tuple(layers), parameters)


MODEL_8B = llama(32, 4096, 14336, 8_030_000_000)


def test_a_cpu_has_constants() -> None:
    found = settled(Config(), MODEL_8B, 2, 256, None)
    assert found.factors.max_group_bytes == ON_A_CPU["factors.max_group_bytes"] == 8 * GIB
    assert found.scan.query_group_bytes == ON_A_CPU["scan.query_group_bytes"] == 4 * GIB
    assert found.scan.tokens_per_batch == ON_A_CPU["scan.tokens_per_batch"] == 4096
    # Where nothing is settled, steps that are called by themselves have them too.
    config = Config()
    assert (config.group_bytes, config.query_group_bytes, config.tokens_per_batch) == tuple(ON_A_CPU.values())
    assert config.refine_group_bytes == config.query_group_bytes


@given(
    st.integers(0, 2**40), st.integers(0, 2**40), st.integers(1, 1000), st.sampled_from([1, 2, 8]), st.booleans()
)  # fmt: skip
def test_more_memory_never_makes_anything_smaller_and_more_queries_never_larger(
    one: int, other: int, queries: int, ranks: int, checkpointed: bool
) -> None:
    config = Config()
    config.cluster = replace(config.cluster, ranks_per_worker=ranks)
    config.model.gradient_checkpointing = checkpointed
    less, more = (on_a_gpu(config, MODEL_8B, 2, queries, RankMemory(memory)) for memory in sorted((one, other)))
    assert less["scan.tokens_per_batch"] <= more["scan.tokens_per_batch"]
    fewer = on_a_gpu(config, MODEL_8B, 2, queries // 2, RankMemory(max(one, other)))
    assert fewer["scan.tokens_per_batch"] >= more["scan.tokens_per_batch"]
    assert min(less.values()) > 0
    # All at once: weights, the query batch, a micro-batch, and queries at full rank.
    used = more["scan.tokens_per_batch"] * 1.7 * MODEL_8B.parameters / 4096 * 2 / (8 if checkpointed else 1)
    batch = queries * 32 * 2 * sum(layer.outputs + layer.inputs for layer in MODEL_8B.layers)
    if more["scan.query_group_bytes"] > ON_A_CPU["scan.query_group_bytes"]:
        held = MODEL_8B.parameters * 2 // ranks + batch + used + more["scan.query_group_bytes"]
        assert held <= 0.9 * max(one, other)
    # Without the batch, candidates are scored again with no fewer bytes of gradients.
    assert more["scan.refine_group_bytes"] >= more["scan.query_group_bytes"]
    if more["scan.refine_group_bytes"] > more["scan.query_group_bytes"]:
        assert MODEL_8B.parameters * 2 // ranks + used + more["scan.refine_group_bytes"] <= 0.9 * max(one, other)


def test_candidates_of_a_large_model_pass_a_few_times() -> None:
    """52B on H100s: 43 times with what the check has."""
    layers = [
        (f"l{block}.{name}", *shape)
        for block in range(64)
        for name, *shape in (("up", 32768, 8193), ("down", 8192, 32769))
    ]
    large = replace(
        llama(1, 8192, 28672, 52_400_000_000), layers=tuple(Layer(name, o, i, True, name) for name, o, i in layers)
    )
    config = replace(Config(), cluster=replace(Config().cluster, ranks_per_worker=4))
    found = settled(config, large, 2, 100, RankMemory(DEVICES["h100"].memory))
    passes = len(query_groups(100, large.layers, found.refine_group_bytes)[1])
    assert passes <= 6 < len(query_groups(100, large.layers, found.query_group_bytes)[1])


def test_ranks_that_share_a_model_leave_room_for_what_they_gather() -> None:
    """Of a model of 70B: two blocks and a matrix, 3.9 GB, beside a rank's share of 17.6."""
    config, large = Config(), llama(80, 8192, 28672, 70_600_000_000)
    config.cluster = replace(config.cluster, ranks_per_worker=8)
    large = replace(large, shapes={"model.layers.0.mlp.up_proj.weight": (28672, 8192)})
    known = replace(large, block=856_000_000)
    unknown, gathering = (on_a_gpu(config, one, 2, 10, RankMemory(80 * GIB)) for one in (large, known))
    spent = unknown["factors.max_group_bytes"] - gathering["factors.max_group_bytes"]
    tokens = unknown["scan.tokens_per_batch"] - gathering["scan.tokens_per_batch"]
    of_a_token = 1.7 * large.parameters / 8192 * 2
    assert spent + tokens * of_a_token == pytest.approx(2 * (2 * 856e6 - 10e6), rel=1e-6)


def test_what_is_given_wins() -> None:
    config = Config()
    config.factors.max_group_bytes, config.scan.query_group_bytes, config.scan.tokens_per_batch = 1, 2, 3
    found = settled(config, MODEL_8B, 2, 1, RankMemory(80 * GIB), {"scan": {"tokens_per_batch": 9}})
    assert found == config
    # Bytes that were given for gradients are those of refining too.
    assert found.refine_group_bytes == 2


def test_a_resumed_run_keeps_its_micro_batches_and_takes_the_devices_groups() -> None:
    kept = {"scan": {"tokens_per_batch": 777}}
    found = settled(Config(), MODEL_8B, 2, 10, RankMemory(DEVICES["h200"].memory), kept)
    assert found.scan.tokens_per_batch == as_stored(Config(), kept).scan.tokens_per_batch == 777
    assert (found.factors.max_group_bytes or 0) > ON_A_CPU["factors.max_group_bytes"]


@pytest.mark.parametrize(("device", "groups"), [("h100", 3), ("h200", 2)])
def test_8b_is_fitted_in_few_passes(device: str, groups: int) -> None:
    assert len(layer_groups(MODEL_8B.layers, ON_A_CPU["factors.max_group_bytes"])) == 14
    config = settled(Config(), MODEL_8B, 2, 256, RankMemory(DEVICES[device].memory))
    assert len(layer_groups(MODEL_8B.layers, config.group_bytes)) == groups
    assert config.tokens_per_batch >= 1024
    assert len(query_groups(256, MODEL_8B.layers, config.query_group_bytes)[1]) <= 2


def test_a_small_host_holds_groups_down_and_never_below_a_cpus() -> None:
    for host, expected in ((600, 64), (120, 20), (6, 8)):
        found = settled(Config(), MODEL_8B, 2, 0, RankMemory(200 * GIB, host * GIB))
        assert found.factors.max_group_bytes == expected * GIB


H100, L4 = {"GPU": 8.0, "memory": 800.0, "accelerator_type:H100": 1.0}, {"GPU": 1.0, "accelerator_type:L4": 1.0}


@pytest.mark.parametrize(
    ("nodes", "gpus", "expected"),
    [
        ([{"CPU": 8.0}], 0.0, None),
        ([{"CPU": 8.0}], 1.0, None),
        ([H100], 0.0, None),
        ([H100, {"CPU": 4.0, "memory": 1.0}], 1.0, RankMemory(80 * 10**9, 100)),
        ([H100], 0.5, RankMemory(40 * 10**9, 50)),
        ([H100, L4], 1.0, RankMemory(24 * 10**9, 100)),
        ([L4], 1.0, RankMemory(24 * 10**9)),
        ([H100, {"GPU": 1.0, "accelerator_type:NEW": 1.0}], 1.0, None),
        ([H100, {"GPU": 1.0}], 1.0, None),
    ],
)
def test_a_rank_has_what_the_smallest_gpu_and_the_smallest_host_give(
    nodes: list[dict[str, float]], gpus: float, expected: RankMemory | None
) -> None:
    assert gpu_memory(nodes, gpus) == expected
