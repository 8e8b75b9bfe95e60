"""Sizes that go by a device's memory, settled once for a run, before its first unit: on a CPU they are constants.

A GPU of M bytes has R = 0.9 M - 2 GiB - weights (a rank's share of them, and what it gathers) for all else: the
allocator's fragments take the tenth, the context and the libraries the 2 GiB. A micro-batch may have half of what the
query batch leaves of R, or three quarters where ranks gather each other's weights for every one. What is left then are
queries' at full rank, or half of it where that is more than one needs; while candidates are scored again, they have the
query batch's room too. A layer group's sums, eigenbases and Lambda have all that a micro-batch leaves of R.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from infscan.config import ON_A_CPU, Config, Dtype
from infscan.engine.executor import RankMemory
from infscan.influence.layout import stored_dense
from infscan.model.architecture import Architecture
from infscan.model.gathered import GatherLimits

_USED, _CONTEXT_BYTES = 0.9, 2 << 30
# Entries that a decoder block keeps for a token until the backward pass, over its parameters / width: some 22 widths of
# 13 widths^2 (Llama, GPT-NeoX: 8 of the width and 4 of the inner one).
_KEPT = 1.7
_LEAST_TOKENS, _MOST_TOKENS = 512, 32768
# A layer group's sums are serialised in the host's memory, three times at most; half of it is others'.
_MOST_GROUP_BYTES, _OF_THE_HOST = 64 << 30, 1 / 6


def settled(
    config: Config,
    architecture: Architecture,
    itemsize: int,
    queries: int,
    memory: RankMemory | None,
    kept: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration with every size that was not given.

    itemsize: bytes of a parameter. memory: None is a CPU. kept: the stored settings of a run that
    is resumed, whose micro-batches stay as they are.
    """
    sizes = dict(ON_A_CPU) if memory is None else on_a_gpu(config, architecture, itemsize, queries, memory)
    tokens = config.scan.tokens_per_batch or _stored(kept) or sizes["scan.tokens_per_batch"]
    groups = config.factors.max_group_bytes or sizes["factors.max_group_bytes"]
    at_full_rank = config.scan.query_group_bytes or sizes["scan.query_group_bytes"]
    refining = config.scan.refine_group_bytes
    if not refining and not config.scan.query_group_bytes:
        refining = sizes.get("scan.refine_group_bytes")
    return replace(
        config,
        factors=replace(config.factors, max_group_bytes=groups),
        scan=replace(config.scan, tokens_per_batch=tokens, query_group_bytes=at_full_rank, refine_group_bytes=refining),
    )


def on_a_gpu(
    config: Config, architecture: Architecture, itemsize: int, queries: int, memory: RankMemory
) -> dict[str, int]:
    """The sizes by key. Groups are never smaller than a CPU's: what does not fit then is said to, not cut finer."""
    weights = _weights(config, architecture) * itemsize
    room = int(_USED * memory.device) - _CONTEXT_BYTES - weights
    batch = _query_bytes(config, architecture, itemsize, queries)
    beside = room - batch
    of_a_token = _of_a_token(config, architecture, itemsize)
    share = 0.75 if config.sharded else 0.5
    blocks = int(max(0, beside) * share / of_a_token) // _LEAST_TOKENS
    tokens = _LEAST_TOKENS * min(_MOST_TOKENS // _LEAST_TOKENS, max(1, blocks))
    used = int(tokens * of_a_token)
    left = beside - used
    most = _MOST_GROUP_BYTES if memory.host is None else min(_MOST_GROUP_BYTES, int(memory.host * _OF_THE_HOST))
    # The check holds a group's gradients beside the batch's matrices, which may have as much.
    whole = 4 * sum(layer.size for layer in architecture.layers)
    at_full_rank = _gradient_bytes(left, whole)
    # A model that scores candidates in a wider dtype takes so much more, and so do its activations.
    wider = (_refine_itemsize(config, itemsize) / itemsize - 1) * (weights + used)
    refining = max(ON_A_CPU["scan.query_group_bytes"], at_full_rank, _gradient_bytes(left + batch - int(wider), whole))
    return {
        "factors.max_group_bytes": max(ON_A_CPU["factors.max_group_bytes"], min(most, room - used)),
        "scan.query_group_bytes": max(ON_A_CPU["scan.query_group_bytes"], at_full_rank),
        "scan.refine_group_bytes": refining,
        "scan.tokens_per_batch": tokens,
    }


def _gradient_bytes(left: int, whole: int) -> int:
    """Of the bytes that are left, those for queries at full rank. whole: what one query takes."""
    return left if left < whole else max(whole, left // 2)


def _refine_itemsize(config: Config, itemsize: int) -> int:
    """Bytes of a parameter while candidates are scored again."""
    asked = config.scan.refine_dtype
    return itemsize if asked in (None, Dtype.auto) else {Dtype.bfloat16: 2, Dtype.float64: 8}.get(asked, 4)


def _weights(config: Config, architecture: Architecture) -> int:
    """Parameters that a rank has at once: all, or its share and what is gathered of the others'."""
    if not config.sharded:
        return architecture.parameters
    largest = max(map(math.prod, architecture.shapes.values()), default=0)
    gathered = GatherLimits.of(config.model.zero, architecture.block).most(largest)
    return architecture.parameters // config.cluster.ranks_per_worker + min(architecture.parameters, gathered)


def _query_bytes(config: Config, architecture: Architecture, itemsize: int, queries: int) -> int:
    """Of the query batch in columns; matrices are held to what is left."""
    r = config.most_rank
    sizes = [one.size if stored_dense(one, r) else (r or 0) * (one.outputs + one.inputs) for one in architecture.layers]
    return queries * sum(sizes) * itemsize


def _of_a_token(config: Config, architecture: Architecture, itemsize: int) -> float:
    width = min(min(layer.outputs, layer.inputs) for layer in architecture.layers)
    kept = _KEPT * architecture.parameters / width * itemsize
    # Checkpointed, a block's input stays, and one block at a time is made again.
    return kept / 8 if config.model.gradient_checkpointing else kept


def as_stored(config: Config, stored: Mapping[str, Any]) -> Config:
    """The configuration with a stored one's micro-batches, where it gives none of its own."""
    tokens = config.scan.tokens_per_batch or _stored(stored)
    return replace(config, scan=replace(config.scan, tokens_per_batch=tokens))


def _stored(settings: Mapping[str, Any] | None) -> int | None:
    found: int | None = (settings or {}).get("scan", {}).get("tokens_per_batch")
    return found
