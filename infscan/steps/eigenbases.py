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

from infscan.influence.blocks import BlockDiagonal
from infscan.influence.eigenbasis import check_finite, eigenbasis
from infscan.influence.layers import Layer
from infscan.results.tensor_files import damaged, read_facts, read_tensor, tensor_bytes, write_tensors
from infscan.steps.factor_files import FactorsPlan, block_keys, named_blocks, partial_path
from infscan.storage import Store


def eigenbases_digest(factors: Store, layers: tuple[Layer, ...]) -> str:
    """SHA-256 over the eigenbases' own digests, which stand in their files' headers."""
    digest = hashlib.sha256()
    for layer in layers:
        for name in (f"A/{layer.input_of}.safetensors", f"S/{layer.name}.safetensors"):
            digest.update(read_facts(factors, name)["digest"].encode())
    return digest.hexdigest()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads of several tasks on one core wait for each other; and a layer's bits do not depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def decompose_layer(factors: Store, plan: FactorsPlan, layer: Layer) -> None:
    """A, S of one layer from their partial sums, with eigenvalues and eigenvectors; created if absent, never replaced.

    Raises:
        FactorsError: where a sum is NaN or infinite.
    """
    group = next(index for index, names in enumerate(plan.groups) if layer.name in names)
    moments = [("S", layer.name)] + ([("A", layer.name)] if layer.input_of == layer.name else [])
    for kind, name in moments:
        path = f"{kind}/{name}.safetensors"
        if factors.exists(path):
            continue
        partials = [partial_path("covariance", group, index) for index in range(len(plan.slices))]
        tokens = sum(int(read_tensor(factors, partial, "tokens")) for partial in partials)
        means = [_sum_in_order(factors, partials, f"{key}|{name}") / tokens for key in block_keys(kind, plan.blocks)]
        moment = BlockDiagonal(tuple((block + block.T) / 2 for block in means))
        values, vectors = eigenbasis(moment, f"{kind} of {name}")
        digest = hashlib.sha256()
        for block in vectors.blocks:
            digest.update(block.numpy().tobytes())
        tensors = named_blocks(kind, moment) | named_blocks(f"Q_{kind}", vectors) | {"eigenvalues": values}
        facts = {"digest": digest.hexdigest(), "tokens": str(tokens)}
        factors.create(path, tensor_bytes(tensors, facts, path))


@_one_thread()
def finish_layer(factors: Store, plan: FactorsPlan, layer: Layer) -> None:
    """Lambda of one layer: the mean over sequences of its partial sums.

    The file carries the digest of the layer's eigenbases.

    Raises:
        DamagedError: where a partial was made in other eigenbases than those in storage.
        FactorsError: where a sum is NaN or infinite.
    """
    group = next(index for index, names in enumerate(plan.groups) if layer.name in names)
    partials = [partial_path("lambda", group, index) for index in range(len(plan.slices))]
    expected = eigenbases_digest(factors, plan.group(group))
    for partial in partials:
        if read_facts(factors, partial)["eigenbases"] != expected:
            raise damaged(factors, partial, "it was summed in other eigenbases than those in A/ and S/")
    Lambda = _sum_in_order(factors, partials, layer.name) / plan.selection.size
    check_finite([Lambda], f"Lambda of {layer.name}")
    facts = {"eigenbases": eigenbases_digest(factors, (layer,))}
    write_tensors(factors, f"Lambda/{layer.name}.safetensors", {"Lambda": Lambda}, facts)


def check_eigenbases(factors: Store, layers: tuple[Layer, ...]) -> None:
    """Raises DamagedError where a layer's Lambda is of other eigenbases than those in storage."""
    for layer in layers:
        name = f"Lambda/{layer.name}.safetensors"
        if read_facts(factors, name).get("eigenbases") != eigenbases_digest(factors, (layer,)):
            raise damaged(factors, name, "it is of other eigenbases than those in A/ and S/")


def _sum_in_order(factors: Store, partials: list[str], key: str) -> Tensor:
    total = read_tensor(factors, partials[0], key).clone()
    for partial in partials[1:]:
        total += read_tensor(factors, partial, key)
    return total
