"""Eigenbases rebuild their matrix; Lambda is the mean squared rotated gradient, whichever way it is computed."""

from typing import Any

import pytest
import torch

from infscan.errors import FactorsError
from infscan.influence import eigenbasis as module
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.eigenbasis import add_squared_gradients, eigenbasis, rotate_tokens_first
from tests.influence.factors import covariance, diagonal_blocks, normal

SHAPES = [(2, 3, 6, 4), (2, 40, 6, 4), (1, 7, 3, 9), (5, 1, 4, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", [1, 2, 5])
def test_eigenbasis_rebuilds_the_symmetrised_matrix(dtype: torch.dtype, blocks: int) -> None:
    moment = diagonal_blocks(covariance(0, 12).to(dtype), blocks)
    moment.blocks[0][0, 1] += 1e-3  # not quite symmetric, as sums over batches are
    values, basis = eigenbasis(moment, "A")
    vectors, dense = basis.dense(), moment.dense()
    assert values.dtype == vectors.dtype == dtype
    assert basis.sizes == moment.sizes
    assert all((part.diff() >= 0).all() for part in values.split(moment.sizes))
    torch.testing.assert_close((vectors * values) @ vectors.T, (dense + dense.T) / 2)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(12, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_moment_that_is_not_finite_is_refused_by_name(value: float) -> None:
    moment = diagonal_blocks(torch.eye(6), 2)
    moment.blocks[1][1, 2] = value
    with pytest.raises(FactorsError, match=r"S of layers\.0\.mlp has 1 entries that are NaN or infinite"):
        eigenbasis(moment, "S of layers.0.mlp")


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("B", "T", "O", "I"), SHAPES)
def test_tokens_first_equals_gradient_first_equals_einsum(
    B: int, T: int, O: int, I: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    s_bto, a_bti = normal(1, B, T, O), normal(2, B, T, I)
    Q_S, Q_A = diagonal_blocks(normal(3, O, O), blocks), diagonal_blocks(normal(4, I, I), blocks)
    expected = torch.einsum("bto,bti,op,ij->bpj", s_bto, a_bti, Q_S.dense(), Q_A.dense()).square().sum(0)
    for tokens_first in (True, False):
        monkeypatch.setattr(module, "rotate_tokens_first", lambda *_, way=tokens_first: way)
        Lambda = torch.zeros(O, I, dtype=torch.float64)
        add_squared_gradients(Lambda, s_bto, a_bti, Q_S, Q_A)
        torch.testing.assert_close(Lambda, expected)


@pytest.mark.parametrize("blocks", [1, 3, 4])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_a_1_left_out_is_a_1_appended(tokens_first: bool, blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rotate_tokens_first", lambda *_: tokens_first)
    s_bto, a_bti = normal(1, 3, 5, 4), normal(2, 3, 5, 3)
    Q_S, Q_A = diagonal_blocks(normal(3, 4, 4), blocks), diagonal_blocks(normal(4, 4, 4), blocks)
    # Padding: s is zero there, and a 1 is not.
    s_bto[1, 3:], a_bti[1, 3:] = 0, 0
    appended, left_out = torch.zeros(2, 4, 4, dtype=torch.float64)
    add_squared_gradients(appended, s_bto, torch.cat([a_bti, torch.ones_like(a_bti[..., :1])], dim=-1), Q_S, Q_A)
    add_squared_gradients(left_out, s_bto, a_bti, Q_S, Q_A)
    torch.testing.assert_close(left_out, appended)


def test_chunks_of_a_batch_give_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    s_bto, a_bti = normal(1, 5, 3, 4), normal(2, 5, 3, 6)
    Q_S, Q_A = diagonal_blocks(normal(3, 4, 4), 1), diagonal_blocks(normal(4, 6, 6), 1)
    sums = []
    for entries in (1, 50, 1 << 20):
        monkeypatch.setattr(module, "_CACHED_ENTRIES", entries)
        sums.append(torch.zeros(4, 6, dtype=torch.float64))
        add_squared_gradients(sums[-1], s_bto, a_bti, Q_S, Q_A)
    torch.testing.assert_close(sums[0], sums[1])
    torch.testing.assert_close(sums[0], sums[2])


def test_the_cheaper_order_is_taken() -> None:
    def cost(tokens_first: bool, T: int, O: int, I: int) -> int:
        return T * O * O + T * I * I if tokens_first else O * O * I + O * I * I

    for T, O, I in [(1, 4, 4), (3, 4, 4), (4, 4, 4), (100, 8, 30), (10, 8, 30), (512, 768, 3072), (512, 64, 64)]:
        assert rotate_tokens_first(T, O, I) == (cost(True, T, O, I) < cost(False, T, O, I))


def test_inputs_are_left_as_they_were() -> None:
    tensors = [normal(seed, *shape) for seed, shape in enumerate([(2, 3, 4), (2, 3, 5), (4, 4), (5, 5)])]
    before = [tensor.clone() for tensor in tensors]
    s_bto, a_bti, Q_S, Q_A = tensors
    Lambda = torch.zeros(4, 5, dtype=torch.float64)
    add_squared_gradients(Lambda, s_bto, a_bti, BlockDiagonal((Q_S,)), BlockDiagonal((Q_A,)))
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_wider_than_32_bits_count_goes_another_way_to_the_same_basis(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment = diagonal_blocks(covariance(0, 40).to(dtype), 1)
    values, basis = eigenbasis(moment, "A")
    monkeypatch.setattr(module, "_WIDEST_32", 39)
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: pytest.fail("counts in 32 bits"))
    wide_values, wide = eigenbasis(moment, "A")
    torch.testing.assert_close(wide_values, values)
    signs = (basis.dense() * wide.dense()).sum(dim=0).sign()
    torch.testing.assert_close(wide.dense() * signs, basis.dense(), rtol=1e-4, atol=1e-5)
    assert wide_values.dtype == wide.dense().dtype == dtype


def test_a_width_that_nothing_here_decomposes_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    module.check_width(32766, "A of wide")
    monkeypatch.setattr(module, "_counts_in_64_bits", lambda: False)
    module.check_width(32766, "A of wide")
    with pytest.raises(FactorsError, match=r"A of wide is 70000 x 70000.* at most 32766; give factors\.blocks=3"):
        module.check_width(70000, "A of wide")


def test_a_gpu_decomposes_in_float64_what_a_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its way, on a CPU; and it is held against the matrix."""
    moment = diagonal_blocks(covariance(0, 24), 2)
    asked: list[tuple[str, torch.dtype]] = []

    def to(block: torch.Tensor, device: str) -> torch.Tensor:
        asked.append((device, block.dtype))
        return block.clone()

    monkeypatch.setattr(module, "_to", to)
    values, vectors = eigenbasis(moment, "A", "cuda:0")
    assert asked == [("cuda:0", torch.float64)] * 2
    known_values, known = eigenbasis(moment, "A")
    assert torch.equal(values, known_values)
    assert torch.equal(vectors.dense(), known.dense())
    A_kk = moment.blocks[0]
    values_k, Q_kk = module.decomposed_on("cpu", A_kk.float())
    assert (values_k.dtype, Q_kk.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close((Q_kk * values_k) @ Q_kk.T, A_kk.float().double())
    # A moment that nothing was added to has a basis, too.
    assert module.decomposed_on("cpu", torch.zeros(3, 3))[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "found",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.linalg.LinAlgError("linalg.eigh: failed to converge"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling cusolverDnXsyevd"),
        (torch.ones(12).double(), torch.eye(12).double()),
        (torch.full((12,), torch.nan).double(), torch.eye(12).double()),
        (torch.zeros(12).double(), torch.zeros(12, 12).double()),
    ],
    ids=["no room", "no convergence", "no room in cusolver", "others", "nan", "zeros"],
)
def test_what_a_gpu_does_not_decompose_is_left_to_the_cpu(
    found: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moment = diagonal_blocks(covariance(0, 12), 1)
    known, own, done = eigenbasis(moment, "A"), torch.linalg.eigh, list[str]()

    def eigh(A_kk: torch.Tensor) -> Any:
        done.append("eigh")
        if len(done) > 1:
            return own(A_kk)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(module, "_to", lambda block, device: block)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    values, vectors = eigenbasis(moment, "A of mlp", "cuda:0")
    assert done == ["eigh", "emptied", "eigh"]
    assert torch.equal(values, known[0])
    assert torch.equal(vectors.dense(), known[1].dense())
    assert "A of mlp is decomposed on the CPU: " in caplog.text


def test_a_broken_device_is_not_left_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(A_kk: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(module, "_to", lambda block, device: block)
    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        eigenbasis(diagonal_blocks(covariance(0, 12), 1), "A", "cuda:0")


def test_threads_are_as_many_for_a_width_on_every_machine() -> None:
    assert (module.threads_for(8191), module.threads_for(8192)) == (1, 8)
