"""Every quantity on a device against a CPU in float64: relative difference |ours - theirs| / |theirs|, and its limit.

Eigenvectors of nearly equal eigenvalues may turn freely: bases are held by what they are to do, and scores are
compared in the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infscan.config import Dtype, Labels
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.covariance import add_second_moment, mirror
from infscan.influence.eigenbasis import add_squared_gradients, decomposed_on, eigenbasis
from infscan.influence.precision import Multiply, multiplying
from infscan.influence.score import LayerQueries, score_layer, score_tokens
from infscan.model.attention import repeat_grouped_heads
from infscan.model.worker import ModelWorker
from infscan.results.tensor_files import read_tensors
from infscan.steps.factors import covariance_task
from infscan.storage import Store
from tests.gpu.kit.device import peak_bytes
from tests.gpu.kit.record import Check
from tests.gpu.kit.shapes import Shape, random_module
from tests.gpu.kit.study import Study

FLOAT64, EXACT, TF32, BFLOAT16 = 1e-12, 1e-5, 2e-3, 3e-2
REFERENCE = "reference"
# Of a bfloat16 scan: how many of the strongest are among so many candidates.
_TOP, _CANDIDATES = 100, 400


def relative(ours: Any, theirs: Any) -> float:
    """Difference over norm. Single scores that nearly cancel have no relative accuracy of their own."""
    ours, theirs = (torch.as_tensor(x).detach().double().cpu() for x in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


def reference(study: Study) -> ModelWorker:
    """A CPU rank in float64, which has fitted the factors that all scores are made with."""
    rank = study.rank("cpu", Dtype.float64)
    study.fit(rank, REFERENCE)
    return rank


def float32_scores(study: Study, theirs: ModelWorker, device: str) -> Iterator[Check]:
    """The scan at full rank and compressed, and refining."""
    ours = study.rank(device, Dtype.float32)
    for compressed in (None, 16):
        made, known = (study.scores(rank, REFERENCE, compressed) for rank in (ours, theirs))
        yield Check(f"scores, rank {compressed or 'full'}", "float32", _worst(made, known), EXACT)
    refined = study.refined(theirs, REFERENCE)
    yield Check("refined scores", "float32", _worst(study.refined(ours, REFERENCE), refined), EXACT)
    made = study.refined(ours, REFERENCE, "tf32")
    yield Check("refined scores", "tf32", _worst(made, refined), TF32)
    yield Check("refined scores, Pearson", "tf32", _pearson(made, refined), 0.9999, least=True)


def bfloat16_scores(study: Study, theirs: ModelWorker, device: str) -> Iterator[Check]:
    """A model of bfloat16 ranks as the same model in float64 does."""
    made, known = (study.scores(rank, REFERENCE, None) for rank in (study.rank(device, Dtype.bfloat16), theirs))
    yield Check("scores, Pearson", "bfloat16", _pearson(made, known), 0.999, least=True)
    top = min(_TOP, study.sequences // 10)
    candidates = _CANDIDATES * top // _TOP
    yield Check(f"top {top} in {candidates}", "bfloat16", _recall(made, known, top, candidates), 0.98, least=True)


def float32_factors(study: Study, theirs: ModelWorker, device: str) -> Iterator[Check]:
    """A, S and Lambda's sum, which a rotation of the eigenvectors keeps: |g|^2 summed."""
    study.fit(study.rank(device, Dtype.float32), "float32")
    ours, theirs = study.factors("float32"), study.factors(REFERENCE)
    for kind in ("A", "S", "Lambda"):
        names = [one.input_of if kind == "A" else one.name for one in study.architecture.layers]
        pairs = [(_factor(ours, kind, name), _factor(theirs, kind, name)) for name in names]
        sums = [(a.sum(), b.sum()) if kind == "Lambda" else (a, b) for a, b in pairs]
        yield Check(f"{kind}{' sum' * (kind == 'Lambda')}", "float32", max(relative(*pair) for pair in sums), EXACT)
    layer = study.architecture.layers[0].name
    moment, Q_S = _factor(ours, "S", layer), read_tensors(ours, f"S/{layer}.safetensors")["Q_S"].double()
    values = read_tensors(ours, f"S/{layer}.safetensors")["eigenvalues"].double()
    yield Check("eigenbasis, A Q = Q values", "float32", relative((Q_S * values) @ Q_S.T, moment), EXACT)
    yield Check("eigenbasis, Q^T Q = 1", "float32", relative(Q_S.T @ Q_S, torch.eye(len(Q_S))), EXACT)


def drawn_labels(study: Study, theirs: ModelWorker, device: str) -> Iterator[Check]:
    """Labels come from (seed, sequence, position); rounding may move a boundary of the distribution past a few."""
    found = {}
    for name, rank in (("labels-reference", theirs), ("labels", study.rank(device, Dtype.float32))):
        covariance_task(rank, study.fit_task(name, Labels.sampled, draw_labels=True))
        found[name] = read_tensors(study.factors(name), "labels/slice-0000.safetensors")["labels"]
    differing = (found["labels-reference"] != found["labels"]).float().mean()
    yield Check("labels that differ", "float32", float(differing), 1e-3)


# (study, a rank of `reference`, device) -> checks, by name.
OF_A_STUDY = {
    "float32 scores": float32_scores,
    "bfloat16 scores": bfloat16_scores,
    "float32 factors": float32_factors,
    "labels": drawn_labels,
}


def products(device: str, *, d: int = 256, tokens: int = 1024) -> Iterator[Check]:
    """The passes' own products on random tensors: what each adds in every precision that it may be given."""
    made = torch.Generator().manual_seed(0)
    s_bto, a_bti, P_oi = (
        torch.randn(*shape, generator=made) for shape in ((4, tokens // 4, d), (4, tokens // 4, 2 * d), (d, 2 * d))
    )
    on = [x.to(device) for x in (s_bto, a_bti, P_oi)]
    low = [x.bfloat16() for x in on]
    modes: tuple[tuple[Multiply, float], ...] = (("exact", EXACT), ("tf32", TF32))
    Q_S, Q_A = (torch.linalg.qr(torch.randn(n, n, generator=made).double())[0] for n in (d, 2 * d))
    wide = [x.double() for x in (s_bto, a_bti, P_oi)]
    scores_bt, Lambda = score_tokens(*wide), _lambda(wide[0], wide[1], Q_S, Q_A)
    for mode, limit in modes:
        with multiplying(mode):
            ours = score_tokens(*on), _lambda(on[0], on[1], Q_S, Q_A, torch.float32)
        yield Check("token scores", mode, relative(ours[0], scores_bt), limit)
        yield Check("Lambda", mode, relative(ours[1], Lambda), limit)
    with multiplying("exact"):
        yield Check("second moment", "float32", relative(_moment(on[1]), _moment(a_bti.double())), EXACT)
        # Products of bfloat16 are exact in float32: only sums round.
        yield Check("second moment", "bfloat16", relative(_moment(low[1]), _moment(low[1].cpu().double())), 1e-6)
        yield from _layouts(on, low)


def _layouts(on: list[Tensor], low: list[Tensor]) -> Iterator[Check]:
    """The same score by every layout."""
    s_bto, a_bti, P_oi = on
    U, sigma, V = torch.linalg.svd(P_oi, full_matrices=False)
    layouts = {
        "factored": LayerQueries.factored((U * sigma).T, V, (len(sigma),)),
        "dense": LayerQueries.dense(P_oi[None]),
        "shared basis": LayerQueries.shared_basis(torch.diag(sigma)[None], U.T, V),
    }
    theirs = score_layer(s_bto.cpu().double(), a_bti.cpu().double(), LayerQueries.dense(P_oi[None].cpu().double()))
    for name, laid_out in layouts.items():
        yield Check(f"score, {name}", "float32", relative(score_layer(s_bto, a_bti, laid_out), theirs), EXACT)
    ours = score_layer(low[0], low[1], LayerQueries.dense(low[2][None]))
    known = score_layer(*(x.cpu().double() for x in low[:2]), LayerQueries.dense(low[2][None].cpu().double()))
    yield Check("score, dense", "bfloat16", relative(ours, known), BFLOAT16)


def decomposition(device: str, n: int) -> Iterator[Check]:
    """A random second moment, decomposed in float64 and kept in float32."""
    x_mn = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(0)).to(device)
    moment = BlockDiagonal((x_mn.T @ x_mn / len(x_mn),))
    # In float64, where it was decomposed; nothing is left to the CPU here.
    values, Q = decomposed_on(device, moment.blocks[0])
    symmetric = (moment.blocks[0].double() + moment.blocks[0].double().T) / 2
    yield Check(f"Q values Q^T, n = {n}", "float64", relative((Q * values) @ Q.T, symmetric), FLOAT64)
    yield Check(f"Q^T Q, n = {n}", "float64", relative(Q.T @ Q, torch.eye(n)), FLOAT64)
    values, vectors = eigenbasis(moment, "a random moment", device)
    (Q,), (A,) = vectors.blocks, moment.blocks
    Q, values = Q.double(), values.double()
    yield Check(f"eigenbasis as stored, Q values Q^T, n = {n}", "float32", relative((Q * values) @ Q.T, A), EXACT)
    yield Check(f"eigenbasis as stored, Q^T Q, n = {n}", "float32", relative(Q.T @ Q, torch.eye(n)), EXACT)


def grouped_heads(folder: Path, device: str, T: int) -> Iterator[Check]:
    """Attention whose heads share keys, in float32: the gradient of a CPU in float64, and no [T, T] for every head."""
    shape = Shape("grouped heads", 1, 512, 512, 8, 2, 256, T=T)
    wide = random_module(shape.write(folder), "cpu", torch.float64)
    x_1td = torch.randn(1, T, shape.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = _input_gradient(wide, x_1td)
    repeat_grouped_heads()
    ours, on = wide.to(device, torch.float32), x_1td.to(device, torch.float32)
    taken = peak_bytes(lambda: _input_gradient(ours, on), device)
    yield Check("grouped heads", "float32", relative(_input_gradient(ours, on), theirs), EXACT)
    if taken is not None:
        yield Check("grouped heads, bytes over those of [T, T]", "float32", taken / (4 * shape.heads * T * T), 0.5)


def _input_gradient(module: Any, x_btd: Tensor) -> Tensor:
    x_btd = x_btd.clone().requires_grad_()
    logits_btv = module(inputs_embeds=x_btd, use_cache=False).logits
    return torch.autograd.grad(logits_btv.square().sum(), x_btd)[0]


def _lambda(s: Tensor, a: Tensor, Q_S: Tensor, Q_A: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    total = torch.zeros(s.shape[-1], a.shape[-1], dtype=dtype, device=s.device)
    bases = (BlockDiagonal((Q.to(s.device, dtype),)) for Q in (Q_S, Q_A))
    add_squared_gradients(total, s, a, *bases)
    return total


def _moment(x_btn: Tensor) -> Tensor:
    dtype = torch.promote_types(x_btn.dtype, torch.float32)
    total = BlockDiagonal.zeros(x_btn.shape[-1], 1, dtype=dtype, device=str(x_btn.device))
    add_second_moment(total, x_btn)
    return mirror(total).blocks[0]


def _factor(store: Store, kind: str, layer: str) -> Tensor:
    return read_tensors(store, f"{kind}/{layer}.safetensors")[kind].double()


def _worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    return max(relative(a, b) for a, b in zip(ours, theirs, strict=True))


def _pearson(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(min(np.corrcoef(a, b)[0, 1] for a, b in zip(ours, theirs, strict=True)))


def _recall(ours: np.ndarray, theirs: np.ndarray, top: int, candidates: int) -> float:
    """Of the truly strongest `top`, the share among our strongest `candidates`, the worst query's."""
    found = [
        len(set(np.argsort(-b)[:top].tolist()) & set(np.argsort(-a)[:candidates].tolist())) / top
        for a, b in zip(ours, theirs, strict=True)
    ]
    return min(found)
