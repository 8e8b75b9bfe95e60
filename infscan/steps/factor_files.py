"""Where factors lie, and the plan that fixes how they are computed.

plan.json              fingerprint and fields, slices, layer groups: created once, then read back
labels/                pseudo-labels per slice (sampled Fisher only)
covariance/, lambda/   partial sums per (slice, layer group); removed when the factors are complete
A/ S/ Lambda/          one safetensors file per layer (layers that share an input share the file in A/)
factors.json           written last: its presence is the fact that the factors are complete
damping/, moments/     with factors.damping.auto, after that: a number per layer, and the sums that it is found from

Keys: A/ has `A`, `Q_A` and `eigenvalues`, S/ has `S`, `Q_S` and `eigenvalues`, Lambda/ has `Lambda` (and `stack_mean`
for an expert); covariance/ has `tokens`, `A|<layer>` and `S|<layer>`, and `tokens|<layer>` for an expert; lambda/ has
`<layer>`. A matrix in several diagonal blocks (factors.blocks) is a square tensor per block, the first under the
matrix's own key, the others numbered: `A`, `A.1`, `A.2`, and among the partial sums `A.1|<layer>`. `eigenvalues` goes
through the blocks in order. Of a layer with a span (infscan.influence.span) S/ has `eigenvalues`, `reflectors` and
`weights`, Lambda/ a row for each of the span and one for the rest, covariance/ `sketch|<layer>` and `trace|<layer>`.
"""

from __future__ import annotations

import json
import logging
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from infscan.config import checksum_ok, fingerprint, seal_of, with_checksum
from infscan.corpus.plan import Selection
from infscan.corpus.reading import AS_STORED
from infscan.errors import ConfigError, FactorsError, UnwritableError
from infscan.influence.blocks import BlockDiagonal, block_sizes
from infscan.influence.eigenbasis import check_finite
from infscan.influence.layers import Layer, LayerFactors
from infscan.influence.precision import Multiply
from infscan.influence.span import SpannedBasis, for_all_outputs, sketch_columns
from infscan.results.tensor_files import FINISHED_FACTORS, check_seal, damaged, read_seal, read_tensor, read_tensors
from infscan.storage import Identity, MissingError, Store
from infscan.storage.prefetch import prefetch

log = logging.getLogger("infscan")

PLAN, COMPLETE = "plan.json", "factors.json"
SCHEMA_VERSION = 1
# Raised whenever the same inputs come out as other factors. Of 1, those of a sharded model may be of another one: what
# is stored in buffers was not read, nor a head that the configuration ties.
FITTING = 2


@dataclass(frozen=True)
class FactorsPlan:
    """What is fitted and in which pieces; it never changes once it is in storage.

    fields: what the fingerprint covers (model, tokenizer, tracked layers, corpus, labels, blocks, seed, ...), by name.
    slices: bounds of the slices as positions of the selection. groups: names of the layers summed together.
    """

    fields: dict[str, Any]
    layers: tuple[Layer, ...]
    selection: Selection
    slices: tuple[tuple[int, int], ...]
    groups: tuple[tuple[str, ...], ...]
    tokens_per_batch: int

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.fields)

    @property
    def blocks(self) -> int:
        """Diagonal blocks of every A and S; a plan that does not say has one."""
        return int(self.fields.get("blocks", 1))

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks that experts among the layers lie in."""
        return tuple(dict.fromkeys(layer.stack for layer in self.layers if layer.stack))

    @property
    def matmul(self) -> Multiply:
        """How a GPU multiplies for Lambda."""
        return "tf32" if self.fields.get("matmul") == "tf32" else "exact"

    def group(self, index: int) -> tuple[Layer, ...]:
        names = set(self.groups[index])
        return tuple(layer for layer in self.layers if layer.name in names)

    def partial_bytes(self) -> int:
        """Bytes of all partial sums (float32): they stay in storage until the factors are complete."""
        return partial_bytes(self.layers, self.blocks, len(self.slices))

    def to_json(self) -> dict[str, Any]:
        return with_checksum({"schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint, **asdict(self)})

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> FactorsPlan:
        return FactorsPlan(
            fields=dict(value["fields"]),
            layers=tuple(Layer(**layer) for layer in value["layers"]),
            selection=Selection.stored(**value["selection"]),
            slices=tuple((start, stop) for start, stop in value["slices"]),
            groups=tuple(tuple(group) for group in value["groups"]),
            tokens_per_batch=value["tokens_per_batch"],
        )


def slice_count(asked: int | None, sequences: int, layers: Sequence[Layer], blocks: int) -> int:
    """How many slices a fit has: as asked for; else 8, halved down to 2 while they are small and take much storage."""
    if asked is not None:
        return asked
    count = _SLICES
    while (
        count > _FEWEST_SLICES
        and sequences < _SMALL_SLICE * count
        and partial_bytes(layers, blocks, count) > _MUCH_STORAGE
    ):
        count //= 2
    return count


# A slice of fewer sequences is soon done again; partial sums of more bytes take as long to write as to compute.
_SLICES, _FEWEST_SLICES, _SMALL_SLICE, _MUCH_STORAGE = 8, 2, 32, 1 << 30


def partial_bytes(layers: Sequence[Layer], blocks: int, slices: int) -> int:
    """Bytes of all partial sums (float32) of so many slices, headers apart."""
    covariance = sum(
        _summed_outputs(layer, blocks) + (layer.input_of == layer.name) * _entries(layer.inputs, blocks)
        for layer in layers
    )
    return 4 * slices * (covariance + sum(layer.kept_outputs * layer.inputs for layer in layers))


def _summed_outputs(layer: Layer, blocks: int) -> int:
    """Entries of S as it is summed: of a layer with a span, of its sketch and its trace."""
    if layer.span:
        return layer.outputs * sketch_columns(layer.outputs, layer.span) + 1
    return _entries(layer.outputs, blocks)


def _entries(n: int, blocks: int) -> int:
    """Entries of an [n, n] matrix that lie in its diagonal blocks."""
    return sum(size**2 for size in block_sizes(n, blocks))


def products(layer: Layer) -> int:
    """Multiplications per token that a layer's factors take, up to a constant."""
    outputs = layer.outputs * sketch_columns(layer.outputs, layer.span) if layer.span else layer.outputs**2
    return outputs + layer.inputs**2 + layer.size


def widest_block(layer: Layer, blocks: int) -> int:
    """Rows of the widest matrix of a layer that is decomposed."""
    return max(block_sizes(layer.inputs if layer.span else max(layer.outputs, layer.inputs), blocks))


def _layer_bytes(layer: Layer, blocks: int) -> int:
    """Bytes of a layer's A, S (or Q_A, Q_S) and Lambda in float32; of a layer with a span, of its sketch and the
    Gaussian matrix, which are more than its reflectors."""
    outputs = 2 * _summed_outputs(layer, blocks) if layer.span else _entries(layer.outputs, blocks)
    return 4 * (_entries(layer.inputs, blocks) + outputs + layer.kept_outputs * layer.inputs)


def layer_groups(layers: Sequence[Layer], max_bytes: int, blocks: int = 1) -> tuple[tuple[str, ...], ...]:
    """Consecutive layers whose A, S (or Q_A, Q_S) and Lambda fit `max_bytes` in float32 together; at least one each.

    Raises:
        ConfigError: where a layer has fewer outputs or inputs than there are to be blocks.
        FactorsError: where a single layer needs more than `max_bytes`.
    """
    groups: list[list[str]] = []
    used = 0
    for layer in layers:
        if blocks > min(layer.outputs, layer.inputs):
            raise ConfigError(
                f"factors.blocks={blocks}: {layer.name} is {layer.outputs} x {layer.inputs} and cannot be cut into so "
                f"many; give at most {_most_blocks(layers)}, or leave the layer out with model.tracked=<regex>."
            )
        need = _layer_bytes(layer, blocks)
        if need > max_bytes:
            raise FactorsError(
                f"{layer.name} ({layer.outputs} x {layer.inputs}) needs {_size(need)} of factors, more than "
                f"factors.max_group_bytes={max_bytes}; raise it, {_with_blocks(layers, layer, max_bytes)}or leave the "
                "layer out with model.tracked=<regex>."
            )
        if not groups or used + need > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(layer.name)
        used += need
    return tuple(tuple(group) for group in groups)


def _most_blocks(layers: Sequence[Layer]) -> int:
    return min(min(layer.outputs, layer.inputs) for layer in layers)


def _with_blocks(layers: Sequence[Layer], layer: Layer, max_bytes: int) -> str:
    """The fewest blocks with which every layer fits, and what `layer` then needs; nothing where none are enough."""
    counts = range(1, _most_blocks(layers) + 1)
    # More blocks never need more bytes.
    at = bisect_left(counts, True, key=lambda blocks: all(_layer_bytes(each, blocks) <= max_bytes for each in layers))
    return f"give factors.blocks={counts[at]} ({_size(_layer_bytes(layer, counts[at]))}), " if at < len(counts) else ""


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def read_plan(store: Store) -> FactorsPlan:
    """The plan that is in storage.

    Raises:
        FactorsError: where it is not what was written.
    """
    value = store.read_json(PLAN)
    try:
        if checksum_ok(value):
            return FactorsPlan.from_json(value)
    except (KeyError, TypeError, ValueError):
        pass
    raise FactorsError(
        f"{store.uri}/{PLAN} is not what was written, or of another version of infscan; restore it, or remove "
        f"{store.uri} and fit again."
    )


def store_plan(store: Store, made: FactorsPlan) -> FactorsPlan:
    """The plan in storage: created if absent, then read back and compared.

    Raises:
        FactorsError: where it is for something else, naming what differs.
    """
    store.create(PLAN, json.dumps(made.to_json(), indent=2).encode() + b"\n")
    plan = read_plan(store)
    # Factors that were fitted before there was a choice.
    stored = AS_STORED.fields() | {"fitting": 1} | plan.fields | {"blocks": plan.blocks, "matmul": plan.matmul}
    asked = made.fields | {"matmul": made.matmul}
    differing = [f"{key}: {stored.get(key)!r} -> {value!r}" for key, value in asked.items() if stored.get(key) != value]
    if differing:
        raise FactorsError(
            f"{store.uri} holds factors for something else ({'; '.join(differing)}). Give another factors.path, or the "
            "settings they were fitted with."
        )
    return plan


def complete(store: Store, plan: FactorsPlan, **facts: Any) -> dict[str, Any]:
    """The content of factors.json: what the factors are of, sizes and digests of their files, and `facts`."""
    files = {
        entry.name: entry.size for entry in store.list(suffix=".safetensors") if entry.name.startswith(FINISHED_FACTORS)
    }
    known = {"fingerprint": plan.fingerprint, "fields": plan.fields, "files": files, "digests": _digests(store, files)}
    return with_checksum(known | facts)


def _digests(store: Store, names: Iterable[str]) -> dict[str, str]:
    """By file, what its header says of all that is in it: the rest is not read."""
    return dict(prefetch(store, lambda name: (name, read_seal(store, name)), names))


def check_files(store: Store) -> dict[str, Any]:
    """What `complete` gave, after one listing of the files that it names and a look at the header of each.

    Raises:
        DamagedError: with the first that is missing, has another size, or is another file.
    """
    value = store.read_json(COMPLETE)
    if not checksum_ok(value):
        raise damaged(store, COMPLETE, "it is not what was written")
    there = {entry.name: entry.size for entry in store.list(suffix=".safetensors")}
    for name, size in value["files"].items():
        if there.get(name) != size:
            found = "it is missing" if name not in there else f"{there[name]} bytes where {size} were written"
            raise damaged(store, name, found)
    # Factors of infscan 0.1 say sizes alone.
    digests: dict[str, str] = value.get("digests", {})
    for name, found in _digests(store, digests).items():
        check_seal(store, name, found, digests[name])
    facts: dict[str, Any] = value
    return facts


def identity_of(store: Store) -> Identity | None:
    """Complete factors as they travel with units of work; None where they are not complete.

    Raises:
        DamagedError: where factors.json is not what was written.
    """
    try:
        value = store.read_json(COMPLETE)
    except MissingError:
        return None
    if not checksum_ok(value):
        raise damaged(store, COMPLETE, "it is not what was written")
    return Identity("factors", store.uri, seal_of(value), "factors.json; every file by the digest in its header")


def remove_partials(store: Store, kinds: tuple[str, ...] = ("covariance", "lambda")) -> None:
    """Partial sums of complete factors: this process's, or those that an earlier one left when it died."""
    for kind in kinds:
        for entry in store.list(kind):
            try:
                store.remove(entry.name)
            except UnwritableError as error:
                log.warning("factors     finished, and a partial sum is left: %s", error)
                return


def labels_path(slice_index: int) -> str:
    return f"labels/slice-{slice_index:04d}.safetensors"


def partial_path(kind: str, group: int, slice_index: int) -> str:
    """kind: `covariance`, `lambda` or `moments`."""
    return f"{kind}/group-{group:03d}-slice-{slice_index:04d}.safetensors"


def pooled_path(kind: str, stack: str) -> str:
    """What the experts of a stack have together, beside the partial sums of a kind."""
    return f"{kind}/pooled-{stack}.safetensors"


def damping_path(layer: Layer) -> str:
    """Of a layer's automatic damping."""
    return f"damping/{layer.name}.safetensors"


def found_damping(store: Store, layer: Layer) -> float:
    """A layer's automatic damping, as a multiple of the mean of its Lambda (`infscan.steps.damping`)."""
    return float(read_tensor(store, damping_path(layer), "relative"))


def block_keys(key: str, blocks: int) -> list[str]:
    """The keys of a matrix's blocks: its own, then numbered ones."""
    return [key, *(f"{key}.{index}" for index in range(1, blocks))]


def tokens_key(layer: str) -> str:
    """Of a covariance partial: the tokens that went to an expert."""
    return f"tokens|{layer}"


def sketch_key(layer: str) -> str:
    """Of a covariance partial: S Omega of a layer with a span."""
    return f"sketch|{layer}"


def trace_key(layer: str) -> str:
    """Beside it: the trace of S."""
    return f"trace|{layer}"


def named_blocks(key: str, matrix: BlockDiagonal) -> dict[str, Tensor]:
    return dict(zip(block_keys(key, len(matrix.blocks)), matrix.blocks, strict=True))


def read_layer_factors(store: Store, layer: Layer, identity: Identity | None = None) -> LayerFactors:
    """One layer's finished factors, on the CPU. identity: what the factors must be.

    Raises:
        DamagedError: where a file does not hold what was written, or is another fit's.
        FactorsError: where an entry is NaN or infinite, or other factors lie there.
    """
    digests = _known_digests(store, identity)
    O = layer.outputs
    paths = f"A/{layer.input_of}.safetensors", f"S/{layer.name}.safetensors", f"Lambda/{layer.name}.safetensors"
    A, S, Lambda = (read_tensors(store, path, digests.get(path)) for path in paths)
    mean = Lambda.pop("stack_mean", None)
    for kind, tensors in (("A", A), ("S", S), ("Lambda", Lambda)):
        check_finite(tensors.values(), f"{kind} of {layer.name}")
    return LayerFactors(
        A=_from_blocks(A, "A"),
        S=_from_blocks(S, "S") if "S" in S else None,
        Q_A=_from_blocks(A, "Q_A"),
        Q_S=SpannedBasis(S["reflectors"], S["weights"]) if "reflectors" in S else _from_blocks(S, "Q_S"),
        A_eigenvalues=A["eigenvalues"],
        S_eigenvalues=for_all_outputs(S["eigenvalues"], O),
        Lambda=for_all_outputs(Lambda["Lambda"], O),
        stack_mean=None if mean is None else float(mean),
    )


def _known_digests(store: Store, identity: Identity | None) -> dict[str, str]:
    """The digests that factors.json lists, once it is known to be the one that was planned with; else none."""
    if identity is None:
        return {}
    value = store.read_json(COMPLETE)
    identity.check(seal_of(value) if checksum_ok(value) else "a damaged one", FactorsError)
    digests: dict[str, str] = value.get("digests", {})
    return digests


def _from_blocks(tensors: Mapping[str, Tensor], key: str) -> BlockDiagonal:
    blocks = sum(name.partition(".")[0] == key for name in tensors)
    return BlockDiagonal(tuple(tensors[name] for name in block_keys(key, blocks)))


def read_factors(uri: str) -> dict[str, LayerFactors]:
    """All finished factors of a folder or URI, by layer.

    Raises:
        FactorsError: where they are not complete.
    """
    store = Store(uri)
    if not store.exists(COMPLETE):
        raise FactorsError(
            f"{uri} has no {COMPLETE}: its factors are not complete; run infscan fit again to finish them."
        )
    plan = read_plan(store)
    return {layer.name: read_layer_factors(store, layer) for layer in plan.layers}
