"""Factors of one layer from its partial sums: eigenbases, and Lambda (docs/method.md#ek-fac, steps 3 and 4).

Partial sums are added in slice order, so the factors do not depend on which worker did what. No model is needed, and
nothing of one is imported: these tasks have processes of their own, which are to start quickly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from infscan.config import DampingConfig
from infscan.influence.blocks import BlockDiagonal
from infscan.influence.eigenbasis import check_finite, eigenbasis, threads_for
from infscan.influence.even_damping import even_damping
from infscan.influence.layers import Layer
from infscan.influence.span import spanned_eigenbasis
from infscan.results.tensor_files import damaged, read_facts, read_tensor, tensor_bytes, write_tensors
from infscan.steps.factor_files import (
    FactorsPlan,
    block_keys,
    damping_path,
    named_blocks,
    partial_path,
    pooled_path,
    sketch_key,
    tokens_key,
    trace_key,
)
from infscan.storage import Store

# Partial sums of squared gradients of true labels (`infscan.steps.damping`).
MOMENTS = "moments"


def eigenbases_digest(factors: Store, layers: tuple[Layer, ...]) -> str:
    """SHA-256 over the eigenbases' own digests, which stand in their files' headers."""
    digest = hashlib.sha256()
    for layer in layers:
        for name in (f"A/{layer.input_of}.safetensors", f"S/{layer.name}.safetensors"):
            digest.update(read_facts(factors, name)["digest"].encode())
    return digest.hexdigest()


@contextmanager
def _with_threads(count: int = 1) -> Iterator[None]:
    """Threads of several tasks on one core wait for each other; and a layer's bits do not depend on the machine's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_with_threads()
def pool_moments(factors: Store, plan: FactorsPlan, stack: str) -> None:
    """The mean A and S of a stack's experts over all their tokens, in which experts that saw few have a part."""
    path = pooled_path("covariance", stack)
    if factors.exists(path):
        return
    totals: dict[str, Tensor] = {}
    tokens = 0
    for layer in _experts(plan, stack):
        sums, count = _moment_sums(factors, plan, layer, ("A", "S"))
        tokens += count
        for key, total in sums.items():
            totals[key] = total if key not in totals else totals[key] + total
    write_tensors(factors, path, {key: total / max(tokens, 1) for key, total in totals.items()})


def decompose_layer(factors: Store, plan: FactorsPlan, layer: Layer, device: str = "cpu") -> None:
    """A, S of one layer from their partial sums, with eigenvalues and eigenvectors; created if absent, never replaced.

    device: where they are decomposed.

    Raises:
        FactorsError: where a sum is NaN or infinite.
    """
    for kind in ("S", "A") if layer.input_of == layer.name else ("S",):
        path = f"{kind}/{layer.name}.safetensors"
        if factors.exists(path):
            continue
        if kind == "S" and layer.span:
            _find_span(factors, plan, layer, path)
            continue
        sums, tokens = _moment_sums(factors, plan, layer, (kind,))
        means = list(sums.values())
        means = _shrunk(factors, layer, sums, tokens) if layer.stack else [total / tokens for total in means]
        moment = BlockDiagonal(tuple((block + block.T) / 2 for block in means))
        with _with_threads(threads_for(max(moment.sizes))):
            values, vectors = eigenbasis(moment, f"{kind} of {layer.name}", device)
        digest = hashlib.sha256()
        for block in vectors.blocks:
            digest.update(block.numpy().tobytes())
        tensors = named_blocks(kind, moment) | named_blocks(f"Q_{kind}", vectors) | {"eigenvalues": values}
        facts = {"digest": digest.hexdigest(), "tokens": str(tokens)}
        factors.create(path, tensor_bytes(tensors, facts, path))


def _find_span(factors: Store, plan: FactorsPlan, layer: Layer, path: str) -> None:
    """The leading eigenvectors of S from the sums of its sketch, on the CPU."""
    partials, tokens = _partials(plan, layer), _tokens(factors, plan, layer)
    sketch_oc = _sum_in_order(factors, partials, sketch_key(layer.name)) / tokens
    trace = float(_sum_in_order(factors, partials, trace_key(layer.name))) / tokens
    check_finite([sketch_oc, torch.tensor(trace)], f"S of {layer.name}")
    with _with_threads(threads_for(layer.outputs)):
        values, basis = spanned_eigenbasis(sketch_oc, trace, layer.span)
    digest = hashlib.sha256(basis.Y_nk.contiguous().numpy().tobytes())
    digest.update(basis.W_kk.contiguous().numpy().tobytes())
    tensors = {"reflectors": basis.Y_nk, "weights": basis.W_kk, "eigenvalues": values}
    facts = {"digest": digest.hexdigest(), "tokens": str(tokens)}
    factors.create(path, tensor_bytes(tensors, facts, path))


def has_bases(factors: Store, layer: Layer) -> bool:
    """Whether a layer's eigenbases are in storage."""
    own = [f"S/{layer.name}.safetensors"] + [f"A/{layer.name}.safetensors"] * (layer.input_of == layer.name)
    return all(factors.exists(path) for path in own)


def _moment_sums(
    factors: Store, plan: FactorsPlan, layer: Layer, kinds: tuple[str, ...]
) -> tuple[dict[str, Tensor], int]:
    """The blocks of a layer's summed A or S by key, and the tokens that they are of."""
    partials, tokens = _partials(plan, layer), _tokens(factors, plan, layer)
    keys = [key for kind in kinds for key in block_keys(kind, plan.blocks)]
    return {key: _sum_in_order(factors, partials, f"{key}|{layer.name}") for key in keys}, tokens


def _partials(plan: FactorsPlan, layer: Layer) -> list[str]:
    return [partial_path("covariance", _group_of(plan, layer), index) for index in range(len(plan.slices))]


def _tokens(factors: Store, plan: FactorsPlan, layer: Layer) -> int:
    """The tokens that a layer's sums are of."""
    counted = tokens_key(layer.name) if layer.stack else "tokens"
    return sum(int(read_tensor(factors, partial, counted)) for partial in _partials(plan, layer))


def _shrunk(factors: Store, layer: Layer, sums: dict[str, Tensor], tokens: int) -> list[Tensor]:
    """An expert's moment with its stack's mean counted as n further tokens, n the moment's width: of few tokens the
    mean's eigenvectors remain, of many its own (docs/method.md#ek-fac)."""
    width = sum(len(total) for total in sums.values())
    path = pooled_path("covariance", layer.stack)
    return [(total + width * read_tensor(factors, path, key)) / (tokens + width) for key, total in sums.items()]


@_with_threads()
def pool_lambda(factors: Store, plan: FactorsPlan, stack: str) -> None:
    """The mean of Lambda over all experts of a stack, which their damping is of."""
    experts = _experts(plan, stack)
    groups = {_group_of(plan, layer) for layer in experts}
    bases = {group: eigenbases_digest(factors, plan.group(group)) for group in groups}
    sums = (_squares_sum(factors, plan, layer, bases[_group_of(plan, layer)], "lambda") for layer in experts)
    total = sum(float(one.sum(dtype=torch.float64)) for one in sums)
    mean = total / plan.selection.size / sum(layer.size for layer in experts)
    write_tensors(factors, pooled_path("lambda", stack), {"mean": torch.tensor(mean, dtype=torch.float64)})


@_with_threads()
def finish_layer(factors: Store, plan: FactorsPlan, layer: Layer, bases: str | None = None) -> None:
    """Lambda of one layer: the mean over sequences of its partial sums.

    The file carries the digest of the layer's eigenbases. bases: `eigenbases_digest` of its layer group, where that is
    known.

    Raises:
        DamagedError: where a partial was made in other eigenbases than those in storage.
        FactorsError: where a sum is NaN or infinite.
    """
    bases = bases or eigenbases_digest(factors, plan.group(_group_of(plan, layer)))
    Lambda = _squares_mean(factors, plan, layer, bases, "lambda", plan.selection.size)
    check_finite([Lambda], f"Lambda of {layer.name}")
    mean = {"stack_mean": read_tensor(factors, pooled_path("lambda", layer.stack), "mean")} if layer.stack else {}
    facts = {"eigenbases": eigenbases_digest(factors, (layer,))}
    write_tensors(factors, f"Lambda/{layer.name}.safetensors", {"Lambda": Lambda} | mean, facts)


@_with_threads()
def damp_layer(factors: Store, plan: FactorsPlan, layer: Layer) -> None:
    """A layer's automatic damping (`infscan.influence.even_damping`), as a multiple of the mean of its Lambda.

    plan: its slices are those that the moments were summed over. Where nothing can be said, as of an expert without
    tokens, it is the default's.
    """
    count = sum(stop - start for start, stop in plan.slices)
    bases = eigenbases_digest(factors, plan.group(_group_of(plan, layer)))
    moments = _squares_mean(factors, plan, layer, bases, MOMENTS, count)
    Lambda = read_tensor(factors, f"Lambda/{layer.name}.safetensors", "Lambda")
    times_k = torch.ones(len(Lambda), dtype=torch.float64)
    times_k[-1] += layer.outputs - len(Lambda)
    found = even_damping(Lambda, moments, times_k)
    relative = torch.tensor(DampingConfig().relative if found is None else found, dtype=torch.float64)
    facts = {"eigenbases": eigenbases_digest(factors, (layer,))}
    write_tensors(factors, damping_path(layer), {"relative": relative}, facts)


def _group_of(plan: FactorsPlan, layer: Layer) -> int:
    return next(index for index, names in enumerate(plan.groups) if layer.name in names)


def _squares_mean(factors: Store, plan: FactorsPlan, layer: Layer, bases: str, kind: str, sequences: int) -> Tensor:
    """Over sequences; and the last row of a layer with a span, which is a sum, over the directions it stands for."""
    mean = _squares_sum(factors, plan, layer, bases, kind) / sequences
    mean[-1] /= 1 + layer.outputs - len(mean)
    return mean


def _squares_sum(factors: Store, plan: FactorsPlan, layer: Layer, bases: str, kind: str) -> Tensor:
    partials = [partial_path(kind, _group_of(plan, layer), index) for index in range(len(plan.slices))]
    for partial in partials:
        if read_facts(factors, partial)["eigenbases"] != bases:
            raise damaged(factors, partial, "it was summed in other eigenbases than those in A/ and S/")
    return _sum_in_order(factors, partials, layer.name)


def check_eigenbases(factors: Store, layers: tuple[Layer, ...]) -> None:
    """Raises DamagedError where a layer's Lambda is of other eigenbases than those in storage."""
    for layer in layers:
        name = f"Lambda/{layer.name}.safetensors"
        if read_facts(factors, name).get("eigenbases") != eigenbases_digest(factors, (layer,)):
            raise damaged(factors, name, "it is of other eigenbases than those in A/ and S/")


def _experts(plan: FactorsPlan, stack: str) -> list[Layer]:
    return [layer for layer in plan.layers if layer.stack == stack]


def _sum_in_order(factors: Store, partials: list[str], key: str) -> Tensor:
    total = read_tensor(factors, partials[0], key).clone()
    for partial in partials[1:]:
        total += read_tensor(factors, partial, key)
    return total
