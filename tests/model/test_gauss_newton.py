"""Laws of Gauss-Newton products: equal to a dense G written out in float64, symmetric, positive semi-definite."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from infscan.config import Dtype, ModelConfig
from infscan.corpus.sequences import Sequence
from infscan.influence.layers import Layer
from infscan.model.architecture import describe
from infscan.model.experts import is_transposed
from infscan.model.gauss_newton import GaussNewton, damping_vector, join, split
from infscan.model.loaded import RankContext
from infscan.model.worker import ModelWorker, WorkerSettings
from tests.model import zoo
from tests.model.families import CONFIGS, VOCAB, save

LENGTHS = (5, 3, 2)


def double_rank(folder: Path, family: str, tracked: str) -> ModelWorker:
    path = str(zoo.save(family, folder) if family in zoo.FAMILIES and family not in CONFIGS else save(family, folder))
    config = ModelConfig(path=path, tracked=tracked, dtype=Dtype.float64)
    return ModelWorker(WorkerSettings(config, describe(path, tracked).layers, sharded=False), RankContext())


def some_sequences(lengths: tuple[int, ...] = LENGTHS) -> list[Sequence]:
    rng = np.random.default_rng(0)
    return [Sequence(n, rng.integers(1, VOCAB, length), (), 0, "") for n, length in enumerate(lengths)]


def names_of(layer: Layer) -> tuple[str, str]:
    """The parameters that are a layer's weight and bias, or hold an expert's."""
    return (layer.stack, f"{layer.stack}_bias") if layer.stack else (f"{layer.name}.weight", f"{layer.name}.bias")


def dense(rank: ModelWorker, sequences: list[Sequence], tied: str | None = None) -> Tensor:
    """G [P, P] written out: J by reverse mode from the parameters, one sequence at a time.

    tied: a tracked layer whose weight is an embedding's too; it is perturbed in the layer alone.
    """
    module = rank.model.module
    parameters = dict(module.named_parameters())
    chosen = {}
    for layer in rank.layers:
        weight, bias = names_of(layer)
        chosen[weight] = (module.get_submodule(layer.name).weight if tied else parameters[weight]).detach()
        if layer.bias:
            chosen[bias] = parameters[bias].detach()
    total = torch.zeros(0)
    for sequence in sequences:
        ids = torch.from_numpy(sequence.token_ids)[None]

        def logits(moved: dict[str, Tensor], ids: Tensor = ids) -> Tensor:
            return functional_call(module, moved, (ids,), {"use_cache": False}, tie_weights=tied is None).logits[0]

        with sdpa_kernel(SDPBackend.MATH):
            jacobians = torch.func.jacrev(logits)(chosen)
        columns = []
        for layer in rank.layers:
            weight, bias = names_of(layer)
            J, one = jacobians[weight], jacobians[bias] if layer.bias else None
            if layer.stack:
                expert = int(layer.name.rpartition(".")[2])
                J, one = J[:, :, expert], None if one is None else one[:, :, expert]
            owner = module.get_submodule(weight.rpartition(".")[0])
            if isinstance(owner, Conv1D) or (layer.stack and is_transposed(owner)):
                J = J.transpose(2, 3)
            columns.append((J if one is None else torch.cat([J, one[..., None]], dim=-1)).flatten(2))
        J_tvp = torch.cat(columns, dim=2)
        p_tv = torch.softmax(logits(chosen), dim=-1)
        H_tvv = torch.diag_embed(p_tv) - p_tv[:, :, None] * p_tv[:, None, :]
        G = torch.einsum("tvp,tvw,twq->pq", J_tvp, H_tvv, J_tvp)
        total = G if not total.numel() else total + G
    return total / len(sequences)


# Families with RMSNorm normalise in float32 whatever the model's dtype, so forward and reverse mode round apart.
FAMILIES = [
    ("gpt_neox", r"layers\.0\.(mlp|attention\.query)", 1e-9),
    ("gpt2", r"h\.1\.(mlp|attn)\.c_proj", 1e-9),
    ("opt", r"layers\.0\.fc[12]", 1e-9),
    ("llama", r"layers\.0\.(mlp\.(gate|up)_proj|self_attn\.[kv]_proj)", 1e-5),
    ("qwen2", r"layers\.1\.(self_attn|mlp\.down)", 1e-5),
    ("qwen3_moe", r"layers\.1\.mlp\.experts", 1e-5),
    ("gpt_oss", r"layers\.0\.mlp\.experts\.down", 1e-5),
]


@pytest.mark.parametrize(("family", "tracked", "close"), FAMILIES)
def test_products_equal_the_dense_matrix(tmp_path: Path, family: str, tracked: str, close: float) -> None:
    rank, sequences = double_rank(tmp_path, family, tracked), some_sequences()
    ggn = GaussNewton(rank, sequences, tokens_per_batch=8)
    x_kp = torch.randn(3, ggn.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for rows in (None, np.array([2])):  # of all sequences, and of some alone
        G = dense(rank, sequences if rows is None else [sequences[2]])
        expected = x_kp @ G
        assert float(expected.norm()) > 0
        torch.testing.assert_close(
            ggn.product(x_kp, rows), expected, rtol=close, atol=close * float(expected.abs().max())
        )


def test_a_weight_tied_to_the_embedding_moves_in_its_layer_alone(tmp_path: Path) -> None:
    rank, sequences = double_rank(tmp_path, "llama", "^lm_head$"), some_sequences()
    module = rank.model.module
    assert module.lm_head.weight is module.get_input_embeddings().weight
    ggn = GaussNewton(rank, sequences, tokens_per_batch=64)
    x_kp = torch.randn(2, ggn.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ggn.product(x_kp), x_kp @ dense(rank, sequences, tied="lm_head"))


def test_products_are_symmetric_and_not_negative(tmp_path: Path) -> None:
    ggn = GaussNewton(double_rank(tmp_path, "gpt_neox", "linear"), some_sequences(), tokens_per_batch=64)
    x_kp = torch.randn(4, ggn.size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    K_kk = x_kp @ ggn.product(x_kp).T
    torch.testing.assert_close(K_kk, K_kk.T, rtol=1e-9, atol=1e-9 * float(K_kk.abs().max()))
    assert float(torch.linalg.eigvalsh((K_kk + K_kk.T) / 2).min()) > 0


def test_padding_and_other_vectors_change_nothing(tmp_path: Path) -> None:
    rank, sequences = double_rank(tmp_path, "gpt_neox", "mlp"), some_sequences((9, 4, 7, 2))
    x_kp = torch.randn(3, sum(layer.size for layer in rank.layers), dtype=torch.float64)
    together = GaussNewton(rank, sequences, tokens_per_batch=1024).product(x_kp)
    alone = GaussNewton(rank, sequences, tokens_per_batch=1).product(x_kp[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-9, atol=1e-12)


def test_no_hook_is_left_behind(tmp_path: Path) -> None:
    rank = double_rank(tmp_path, "gpt_neox", "mlp")
    ggn = GaussNewton(rank, some_sequences(), tokens_per_batch=64)
    ggn.product(torch.ones(1, ggn.size, dtype=torch.float64))
    assert not any(module._forward_hooks for module in rank.model.module.modules())


def test_vectors_and_matrices_are_one_another(tmp_path: Path) -> None:
    layers = double_rank(tmp_path, "gpt_neox", "mlp").layers
    x_kp = torch.randn(2, sum(layer.size for layer in layers))
    assert torch.equal(join(layers, split(layers, x_kp)), x_kp)
    lambdas = {layer.name: float(index + 1) for index, layer in enumerate(layers)}
    by_layer = split(layers, damping_vector(layers, lambdas, x_kp)[None])
    assert all(bool((by_layer[name] == value).all()) for name, value in lambdas.items())
