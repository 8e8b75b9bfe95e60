"""Factors in storage: byte ranges read what whole files hold, plans come back as they were, groups cover the layers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from infscan.config import ON_A_CPU
from infscan.corpus.addressable import PreparedCorpus
from infscan.corpus.plan import Selection
from infscan.errors import ConfigError, FactorsError
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.layers import Layer
from infscan.model.family import build_on_meta
from infscan.model.tracked import tracked_layers
from infscan.model.worker import ModelWorker
from infscan.results.tensor_files import read_facts, read_tensor, read_tensors, write_tensors
from infscan.steps.factor_files import (
    COMPLETE,
    FITTING,
    PLAN,
    FactorsPlan,
    layer_groups,
    read_factors,
    slice_count,
    store_plan,
)
from infscan.steps.preconditioner import Preconditioner
from infscan.storage import Store
from tests.steps.builders import fit_plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32])
def test_a_byte_range_reads_what_the_whole_file_holds(tmp_path: Path, dtype: torch.dtype) -> None:
    store = Store(str(tmp_path))
    torch.manual_seed(0)
    tensors = {
        "matrix": (100 * torch.randn(7, 5)).to(dtype),
        "turned": (100 * torch.randn(3, 4)).to(dtype).T,
        "one": (100 * torch.randn(1)).to(dtype),
        "cube": (100 * torch.randn(2, 3, 4)).to(dtype),
    }
    write_tensors(store, "file", tensors, {"who": "me"})
    whole = read_tensors(store, "file")
    assert whole.keys() == tensors.keys()
    for key, value in tensors.items():
        part = read_tensor(store, "file", key)
        assert part.dtype == dtype
        assert torch.equal(part, value)
        assert torch.equal(whole[key], value)
    assert read_facts(store, "file") == {"who": "me"}


def test_a_file_without_facts_has_none(tmp_path: Path) -> None:
    write_tensors(Store(str(tmp_path)), "file", {"x": torch.zeros(1)})
    assert read_facts(Store(str(tmp_path)), "file") == {}


_SHAPES = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.booleans()), min_size=1, max_size=8)


def layers_of(shapes: list[tuple[int, int, bool]]) -> tuple[Layer, ...]:
    return tuple(Layer(f"l{n}", outputs, inputs, bias, f"l{n}") for n, (outputs, inputs, bias) in enumerate(shapes))


@given(
    shapes=_SHAPES,
    total=st.integers(1, 1000),
    share=st.floats(0, 1),
    seed=st.integers(0, 9),
    tokens=st.integers(1, 9999),
    slices=st.integers(1, 9),
)
def test_a_plan_comes_back_from_json(
    shapes: list[tuple[int, int, bool]], total: int, share: float, seed: int, tokens: int, slices: int
) -> None:
    layers = layers_of(shapes)
    plan = FactorsPlan(
        fields={"model": "abc", "seed": seed, "tracked": [layer.name for layer in layers], "tokenizer": None},
        layers=layers,
        selection=Selection.of(total, max(1, int(share * total)), seed),
        slices=tuple((n, n + 1) for n in range(slices)),
        groups=layer_groups(layers, 1 << 20),
        tokens_per_batch=tokens,
    )
    back = FactorsPlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert back == plan
    assert back.fingerprint == plan.fingerprint
    assert back.selection.ids().tolist() == plan.selection.ids().tolist()
    assert [layer for index in range(len(back.groups)) for layer in back.group(index)] == list(layers)


def bytes_of(layer: Layer, blocks: int) -> int:
    """Literally: the entries of A, S and Lambda that lie in a block, in float32."""
    sides = [BlockDiagonal.zeros(n, blocks, dtype=torch.float32) for n in (layer.inputs, layer.outputs)]
    return sum(block.nbytes for side in sides for block in side.blocks) + 4 * layer.size


@given(shapes=_SHAPES, max_bytes=st.integers(1, 100_000), wanted=st.integers(1, 5))
def test_layer_groups_cover_in_order_within_the_bound(
    shapes: list[tuple[int, int, bool]], max_bytes: int, wanted: int
) -> None:
    layers = layers_of(shapes)
    most = min(min(layer.outputs, layer.inputs) for layer in layers)
    blocks = min(wanted, most)
    need = {layer.name: bytes_of(layer, blocks) for layer in layers}
    if max(need.values()) > max_bytes:
        with pytest.raises(FactorsError, match=rf"factors\.max_group_bytes={max_bytes}; raise it") as refused:
            layer_groups(layers, max_bytes, blocks)
        # The fix that is named works, and no smaller one does.
        fix = re.search(r"factors\.blocks=(\d+)", str(refused.value))
        enough = [n for n in range(1, most + 1) if all(bytes_of(layer, n) <= max_bytes for layer in layers)]
        assert (fix and int(fix[1])) == (enough[0] if enough else None)
        return
    groups = layer_groups(layers, max_bytes, blocks)
    assert [name for group in groups for name in group] == [layer.name for layer in layers]
    assert all(groups)
    for group, following in zip(groups, (*groups[1:], None), strict=True):
        used = sum(need[name] for name in group)
        assert used <= max_bytes
        # No group ends early.
        assert following is None or used + need[following[0]] > max_bytes


def test_more_blocks_than_a_layer_has_sides_are_refused_by_name() -> None:
    layers = layers_of([(8, 9, True), (7, 3, False)])
    assert layer_groups(layers, 1 << 20, 3)
    with pytest.raises(ConfigError, match=r"factors\.blocks=4: l1 is 7 x 3 .* give at most 3"):
        layer_groups(layers, 1 << 20, 4)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "tracked", "refusal"),
    [
        (4096, 14336, "linear", None),  # Llama 3.1 8B
        (8192, 28672, "linear", None),  # 70B
        (16384, 53248, "mlp", r"_proj \(53248 x 16384\) needs 14\.8 GiB .*factors\.blocks=3 \(7\.\d GiB\)"),  # 405B
        (4096, 14336, "lm_head", r"lm_head \(128256 x 4096\) needs 63\.3 GiB .*factors\.blocks=11 "),
    ],
)
def test_real_models_are_grouped_or_refused_with_what_they_need_before_a_weight_is_loaded(
    hidden: int, intermediate: int, tracked: str, refusal: str | None
) -> None:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=hidden // 128,
        num_key_value_heads=8,
    )
    layers = tracked_layers(build_on_meta(config), tracked)
    bound = ON_A_CPU["factors.max_group_bytes"]
    if refusal is None:
        groups = layer_groups(layers, bound)
        assert [name for group in groups for name in group] == [layer.name for layer in layers]
        return
    with pytest.raises(FactorsError, match=refusal) as refused:
        layer_groups(layers, bound)
    assert "model.tracked=<regex>" in str(refused.value)
    fix = re.search(r"factors\.blocks=(\d+)", str(refused.value))
    assert fix
    assert layer_groups(layers, bound, int(fix[1]))


def test_a_plan_that_does_not_say_has_one_block() -> None:
    plan = FactorsPlan({}, layers_of([(4, 4, False)]), Selection.of(1), ((0, 1),), (("l0",),), 1)
    assert plan.blocks == 1
    assert replace(plan, fields={"blocks": 2}).fingerprint != replace(plan, fields={"blocks": 3}).fingerprint


def test_factors_of_an_earlier_fitting_are_not_taken_for_the_same(tmp_path: Path) -> None:
    """A sharded model was once read without its tied head: what was fitted on it has the same inputs."""
    store = Store(str(tmp_path))
    old = FactorsPlan({"model": "abc"}, layers_of([(4, 4, False)]), Selection.of(1), ((0, 1),), (("l0",),), 1)
    store_plan(store, old)
    now = replace(old, fields={"fitting": FITTING, "model": "abc"})
    with pytest.raises(
        FactorsError, match=r"holds factors for something else \(fitting: 1 -> \d\)\. Give another factors"
    ):
        store_plan(store, now)
    assert store_plan(Store(str(tmp_path / "new")), now) == now


def test_only_complete_factors_are_read(
    rank: ModelWorker, corpus: PreparedCorpus, inverse: Preconditioner, tmp_path: Path
) -> None:
    with pytest.raises(FactorsError, match=r"has no factors\.json.*infscan fit"):
        read_factors(str(tmp_path))
    plan = fit_plan(rank, corpus)
    inverse.factors.write_json(PLAN, plan.to_json())
    inverse.factors.write_json(COMPLETE, {"fingerprint": plan.fingerprint})
    factors = read_factors(inverse.factors.uri)
    assert list(factors) == [layer.name for layer in rank.layers]
    for layer in rank.layers:
        found = factors[layer.name]
        [A], [Q_A], [S], [Q_S] = found.A.blocks, found.Q_A.blocks, found.S.blocks, found.Q_S.blocks
        assert A.shape == Q_A.shape == (layer.inputs, layer.inputs)
        assert S.shape == Q_S.shape == (layer.outputs, layer.outputs)
        assert found.Lambda.shape == (layer.outputs, layer.inputs)
        torch.testing.assert_close(Q_A @ found.A_eigenvalues.diag() @ Q_A.T, A, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(Q_S.T @ Q_S, torch.eye(layer.outputs), rtol=1e-4, atol=1e-4)


def test_a_small_fit_of_a_large_model_has_fewer_slices() -> None:
    """Of 64 sequences, 8 slices of a 135M model's partial sums took 9.5 GB."""
    large = [Layer(f"layer{n}", 1536, 576, False, f"layer{n}") for n in range(90)]
    small = [Layer("layer", 64, 64, False, "layer")]
    for sequences, layers, expected in (
        (64, large, 2), (200, large, 4), (10_000, large, 8), (64, small, 8), (1, small, 8)
    ):  # fmt: skip
        assert slice_count(None, sequences, layers, 1) == expected
        assert slice_count(5, sequences, layers, 1) == 5
