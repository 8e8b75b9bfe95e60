"""What a dry run weighs and counts, against what is known of it, and against the real thing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infscan.config import MOST_RANK, Config, Dtype, Sharding
from infscan.errors import ModelError
from infscan.influence import layout
from infscan.influence.layout import Factored, Spectrum, plan_layouts, without_content
from infscan.model.architecture import Architecture, describe
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from infscan.sizing import memory
from infscan.sizing.dry import Dry, dry
from infscan.sizing.memory import (
    DryWorker,
    PassCost,
    PassMemory,
    other_passes,
    pass_costs,
    scan_cost,
    scan_memory,
)
from infscan.sizing.reserve import device_need, larger_pass, memory_line, over_memory
from infscan.steps.queries import on_device
from tests.steps.runs import CONTEXT, tiny_model

FAMILIES = ("gpt_neox", "gpt2", "llama")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Architecture]:
    folder = tmp_path_factory.mktemp("models")
    return {name: describe(str(tiny_model(folder / name, family=name)), "mlp") for name in FAMILIES}


def config_for(architecture: Architecture, tokens_per_batch: int = 4 * CONTEXT) -> Config:
    config = Config()
    config.model.path, config.scan.tokens_per_batch, config.scan.rank = architecture.folder, tokens_per_batch, 4
    return config


def test_what_is_alive_at_once_is_weighed_and_what_came_in_is_not() -> None:
    given = torch.empty(1000, 10, device="meta")
    with dry() as seen:
        first = given + 1
        second = first * 2
        del first
        third = second @ torch.empty(10, 5)
        del second
    assert seen.peak == 4 * (1000 * 10 + 1000 * 10)
    assert seen.live == third.nbytes
    assert seen.flop == 2 * 1000 * 10 * 5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scan_is_a_forward_an_activation_gradient_and_two_thin_products(
    models: dict[str, Architecture], family: str
) -> None:
    """2 N and 2 N for every weight that is multiplied with, 4 and 8 T d for attention, 2 R (O + I) for the queries."""
    architecture = models[family]
    found = scan_cost(DryWorker(config_for(architecture), architecture, CONTEXT, 0.0), 3).flop_per_token
    rank = ModelWorker(
        WorkerSettings(config_for(architecture).model, architecture.layers, sharded=False), RankContext(device="meta")
    )
    weights = [p for name, p in rank.model.module.named_parameters() if p.dim() == 2]
    embeddings = [m.weight for m in rank.model.module.modules() if isinstance(m, torch.nn.Embedding)]
    tied = rank.model.module.get_output_embeddings().weight is rank.model.module.get_input_embeddings().weight
    multiplied = sum(p.numel() for p in weights) - sum(p.numel() for p in embeddings)
    multiplied += embeddings[0].numel() if tied else 0
    d, blocks = 32, 2
    attention = (4 + 10) * CONTEXT * d * blocks
    scoring = sum(2 * 3 * 4 * (layer.outputs + layer.inputs) for layer in architecture.layers)
    assert found == pytest.approx(4 * multiplied + attention + scoring, rel=0.02)


class _Forgets(dict[Any, Any]):
    """Remembers nothing that is put into it."""

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


def test_what_has_content_is_computed_and_counted_every_time() -> None:
    """Of two operations of one shape, and of one in place."""
    x, y = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)), torch.ones(3, 3)
    with (seen := Dry()):
        first, second, third = x @ x, y @ y, torch.ones(3, 3).mul_(2).mul_(2)
    assert torch.equal(first, x @ x)
    assert torch.equal(second, y @ y)
    assert torch.equal(third, 4 * y)
    assert seen.flop == 2 * 2 * 27


@pytest.mark.parametrize("family", FAMILIES)
def test_an_operation_that_is_remembered_weighs_and_counts_as_one_that_runs(
    models: dict[str, Architecture], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(models[family])
    costs = pass_costs(config, models[family], 3, CONTEXT, 0.0, masked=True)
    monkeypatch.setattr(memory, "dry", lambda _: dry(_Forgets()))
    assert pass_costs(config, models[family], 3, CONTEXT, 0.0, masked=True) == costs


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_what_many_queries_take_is_no_more_than_was_said(tmp_path: Path, share: float) -> None:
    """With scan.rank=auto, whatever ranks are allocated and whatever bases are found."""
    architecture, queries = describe(str(tiny_model(tmp_path, width=128)), "mlp"), 300
    config, layers = config_for(architecture), architecture.layers
    entries = int(share * queries * sum(layer.size for layer in layers))
    config.scan.rank, config.scan.query_group_bytes = "auto", 4 * entries
    said = scan_cost(DryWorker(config, architecture, CONTEXT, 0.0), queries).memory.queries
    spectra = {layer.name: Spectrum.largest(queries, MOST_RANK) for layer in layers}
    for energy in (0.1, 0.6, 1.0):
        plan = plan_layouts(spectra, layers, CONTEXT, entries, energy, share=True)
        few = {name: (3, 3) for name in list(plan.candidates)[::2] if 9 * queries <= plan.candidates[name]}
        for found in (plan, plan.with_bases(few), plan.with_largest_bases()):
            batch = layout.on_device(without_content(found, queries, torch.float32), layers, "meta", torch.float32)
            assert 0 < sum(one.nbytes for one in batch.values()) <= said


def test_what_a_dry_rank_holds_is_what_a_rank_holds(models: dict[str, Architecture]) -> None:
    architecture = models["gpt_neox"]
    config = config_for(architecture)
    rank = ModelWorker(WorkerSettings(config.model, architecture.layers, sharded=False), RankContext())
    made = np.random.default_rng(0)
    batch = {
        layer.name: Factored(made.random((12, layer.outputs)), made.random((12, layer.inputs)), (4,) * 3)
        for layer in architecture.layers
    }
    laid_out = on_device(rank, batch)
    held = sum(one.nbytes for one in laid_out.values())
    memory = scan_memory(config, architecture, 3, CONTEXT, 0.0)
    assert memory.queries == held
    module = rank.model.module
    assert memory.weights == sum(x.nbytes for x in (*module.parameters(), *module.buffers()))
    assert memory_line(memory).startswith("a rank of the scan holds at most ")


def test_the_line_names_the_largest_pass_as_the_plan_finds_it(models: dict[str, Architecture]) -> None:
    architecture = models["gpt_neox"]
    config = config_for(architecture)
    scan = scan_memory(config, architecture, 3, CONTEXT, 0.0)
    costs = pass_costs(config, architecture, 3, CONTEXT, 0.0)
    found = other_passes(config, architecture, 3, scan, 0.0)
    assert set(found) == {"refine", "check", "covariance", "lambda"}
    for name, held in found.items():
        assert held == pytest.approx(costs[name].memory.total, rel=0.02 if name in ("refine", "check") else 0.15)
    assert larger_pass(scan, "check", found["check"]).startswith("; check, the largest pass, ")
    assert larger_pass(scan, "scan", scan.total) == ""
    config.scan.check_sequences = 0
    assert set(other_passes(config, architecture, 3, scan, 0.0, fitting=False)) == {"refine"}


def test_activations_grow_with_the_tokens_and_shrink_with_checkpointing(models: dict[str, Architecture]) -> None:
    architecture = models["gpt_neox"]
    config = config_for(architecture)
    once, twice = (
        scan_memory(config_for(architecture, n * CONTEXT), architecture, 3, CONTEXT, 0.0).activations for n in (4, 8)
    )
    assert twice == pytest.approx(2 * once, rel=0.02)
    config.model = replace(config.model, gradient_checkpointing=True)
    assert scan_memory(config, architecture, 3, CONTEXT, 0.0).activations < once
    alone = scan_memory(config_for(architecture, 1), architecture, 3, CONTEXT, 0.0).activations
    assert alone == scan_memory(config_for(architecture, CONTEXT), architecture, 3, CONTEXT, 0.0).activations


def test_sharding_divides_the_weights_and_adds_what_is_gathered(models: dict[str, Architecture]) -> None:
    architecture = models["gpt_neox"]
    config = config_for(architecture)
    whole = scan_memory(config, architecture, 3, CONTEXT, 0.0)
    config.model = replace(config.model, sharding=Sharding.zero3)
    config.model.zero = replace(config.model.zero, max_live_parameters=0, prefetch_bucket_size=0)
    config.cluster = replace(config.cluster, ranks_per_worker=4)
    shard = scan_memory(config, architecture, 3, CONTEXT, 0.0)
    largest = max(p.numel() for p in DryWorker(config, architecture, CONTEXT, 0.0).worker.model.module.parameters())
    parameters = architecture.parameters
    assert whole.weights - shard.weights == 4 * (parameters - -(-parameters // 4) - largest)
    assert shard.activations == whole.activations


def test_on_a_gpu_a_model_has_its_own_dtype_and_no_heap(tmp_path: Path) -> None:
    architecture = describe(str(tiny_model(tmp_path, family="llama", dtype=torch.bfloat16)), "mlp")
    config = config_for(architecture)
    gpu, cpu = (scan_memory(config, architecture, 3, CONTEXT, gpus) for gpus in (1.0, 0.0))
    assert cpu.queries == 2 * gpu.queries
    assert gpu.activations < cpu.activations
    widest = max(max(layer.outputs, layer.inputs) for layer in architecture.layers)
    assert (gpu.allocator, cpu.allocator) == (0, 7 * 4 * CONTEXT * widest * 4)


def test_code_that_does_not_run_on_shapes_alone_is_said_to(models: dict[str, Architecture]) -> None:
    architecture = models["gpt_neox"]
    sized = DryWorker(config_for(architecture), architecture, CONTEXT, 0.0)
    with pytest.raises(ModelError, match=r"does not run on shapes alone \(TypeError: .*meta.*measure a small run"):
        sized.backward(sized.layers, lambda _: lambda layer, s_bto, a_bti, routed: s_bto.numpy(), sized.batch())


def test_every_pass_is_sized_and_the_identity_has_no_factors(models: dict[str, Architecture]) -> None:
    architecture = models["llama"]
    config = config_for(architecture)
    costs = pass_costs(config, architecture, 3, CONTEXT, 0.0)
    assert list(costs) == ["covariance", "lambda", "check", "scan", "refine"]
    entries = sum(layer.outputs**2 + (layer.input_of == layer.name) * layer.inputs**2 for layer in architecture.layers)
    assert costs["covariance"].memory.factors == 4 * entries
    assert costs["refine"].memory.gradients == 4 * 3 * sum(layer.size for layer in architecture.layers)
    config.model.dtype, config.scan.refine_dtype = Dtype.bfloat16, Dtype.float32
    mixed = pass_costs(config, architecture, 3, CONTEXT, 0.0)
    assert mixed["refine"] == costs["refine"]
    assert mixed["scan"].memory.weights < costs["scan"].memory.weights
    config.factors.solver = type(config.factors.solver).identity
    assert list(pass_costs(config, architecture, 3, CONTEXT, 0.0)) == ["check", "scan", "refine"]


def test_a_pass_that_does_not_fit_is_said_to_with_what_would_mend_it() -> None:
    costs = {
        "scan": PassCost(PassMemory(weights=50, queries=10, activations=40), 1.0),
        "lambda": PassCost(PassMemory(weights=50, factors=20), 1.0),
    }
    assert over_memory(costs, 100) is None
    said = over_memory(costs, 80)
    assert said is not None
    assert "holds 100 bytes in scan, and its device has 80 bytes" in said
    assert "scan.tokens_per_batch lower by 2 times, model.gradient_checkpointing=true" in said
    # No micro-batch is small enough where the rest alone is too much.
    assert "tokens_per_batch" not in (over_memory(costs, 60) or "")


def test_what_a_gpu_needs_is_what_stays_and_what_a_micro_batch_takes(models: dict[str, Architecture]) -> None:
    """A decomposition is one of the passes there, and halving does nothing for it."""
    architecture = models["llama"]
    costs = pass_costs(config_for(architecture), architecture, 3, CONTEXT, 1.0)
    assert list(costs) == ["covariance", "eigenbasis", "lambda", "check", "scan", "refine"]
    needs = {name: device_need(cost.memory) for name, cost in costs.items()}
    for name, need in needs.items():
        assert need.stays + need.batch == costs[name].memory.total
        assert (need.batch > 0) == (name != "eigenbasis")
    widest = max(max(layer.outputs, layer.inputs) for layer in architecture.layers)
    assert costs["eigenbasis"].memory.factors == 41 * widest**2


def test_what_a_pass_does_beside_forward_and_backward_is_counted_apart(models: dict[str, Architecture]) -> None:
    costs = pass_costs(config_for(models["llama"]), models["llama"], 3, CONTEXT, 0.0)
    own = {name: cost.own_flop_per_token for name, cost in costs.items()}
    floors = {name: cost.flop_per_token - own[name] for name, cost in costs.items()}
    assert floors["scan"] == floors["refine"] == floors["check"] == floors["lambda"]
    layers = models["llama"].layers
    assert own["scan"] == sum(2 * 3 * 4 * (layer.outputs + layer.inputs) for layer in layers)
    assert own["refine"] == 2 * sum(layer.size for layer in layers)
