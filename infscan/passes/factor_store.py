"""Where factors lie, and the plan that fixes how they are computed.

plan.json              fingerprint and fields, slices, layer groups: created once, then read back
labels/                pseudo-labels per slice (sampled Fisher only)
covariance/, lambda/   partial sums per (slice, layer group); removed when the factors are complete
A/ S/ Lambda/          one safetensors file per layer (layers that share an input share the file in A/)
factors.json           written last: its presence is the fact that the factors are complete

Keys: A/ has `A`, `Q_A` and `eigenvalues`, S/ has `S`, `Q_S` and `eigenvalues`, Lambda/ has `Lambda`; covariance/ has
`tokens`, `A|<layer>` and `S|<layer>`; lambda/ has `<layer>`. A matrix in several diagonal blocks (factors.blocks) is a
square tensor per block, the first under the matrix's own key, the others numbered: `A`, `A.1`, `A.2`, and among the
partial sums `A.1|<layer>`. `eigenvalues` goes through the blocks in order.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from infscan.config import fingerprint, is_intact, sealed
from infscan.corpus.plan import Selection
from infscan.errors import ConfigError, DamagedError, FactorsError
from infscan.influence.blocks import BlockDiagonal, block_sizes
from infscan.influence.eigenbasis import check_finite
from infscan.influence.layers import Layer, LayerFactors
from infscan.storage import Store

PLAN, COMPLETE = "plan.json", "factors.json"
SCHEMA_VERSION = 1
_SEALED = "infscan"
_FINISHED = ("A/", "S/", "Lambda/", "labels/")


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

    def group(self, index: int) -> tuple[Layer, ...]:
        names = set(self.groups[index])
        return tuple(layer for layer in self.layers if layer.name in names)

    def partial_bytes(self) -> int:
        """Bytes of all partial sums (float32): they stay in storage until the factors are complete."""
        return partial_bytes(self.layers, self.blocks, len(self.slices))

    def to_json(self) -> dict[str, Any]:
        return sealed({"schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint, **asdict(self)})

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> FactorsPlan:
        return FactorsPlan(
            fields=dict(value["fields"]),
            layers=tuple(Layer(**layer) for layer in value["layers"]),
            selection=Selection(**value["selection"]),
            slices=tuple((start, stop) for start, stop in value["slices"]),
            groups=tuple(tuple(group) for group in value["groups"]),
            tokens_per_batch=value["tokens_per_batch"],
        )


def partial_bytes(layers: Sequence[Layer], blocks: int, slices: int) -> int:
    """Bytes of all partial sums (float32) of so many slices, headers apart."""
    covariance = sum(
        _entries(layer.outputs, blocks) + (layer.input_of == layer.name) * _entries(layer.inputs, blocks)
        for layer in layers
    )
    return 4 * slices * (covariance + sum(layer.size for layer in layers))


def _entries(n: int, blocks: int) -> int:
    """Entries of an [n, n] matrix that lie in its diagonal blocks."""
    return sum(size**2 for size in block_sizes(n, blocks))


def _layer_bytes(layer: Layer, blocks: int) -> int:
    """Bytes of a layer's A, S (or Q_A, Q_S) and Lambda in float32."""
    return 4 * (_entries(layer.inputs, blocks) + _entries(layer.outputs, blocks) + layer.size)


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
    if not is_intact(value):
        raise FactorsError(
            f"{store.uri}/{PLAN} is not what was written, or of another version of infscan; restore it, or remove "
            f"{store.uri} and fit again."
        )
    return FactorsPlan.from_json(value)


def complete(store: Store, plan: FactorsPlan, **facts: Any) -> dict[str, Any]:
    """What factors.json says: what the factors are of, the sizes of their files, and `facts`."""
    files = {entry.name: entry.size for entry in store.list(suffix=".safetensors") if entry.name.startswith(_FINISHED)}
    return sealed({"fingerprint": plan.fingerprint, "fields": plan.fields, "files": files} | facts)


def check_files(store: Store) -> dict[str, Any]:
    """What `complete` gave, after one listing of the files that it names.

    Raises:
        DamagedError: with the first that is missing or has another size.
    """
    value = store.read_json(COMPLETE)
    if not is_intact(value):
        raise _damaged(store, COMPLETE, "it is not what was written")
    there = {entry.name: entry.size for entry in store.list(suffix=".safetensors")}
    for name, size in value["files"].items():
        if there.get(name) != size:
            found = "it is missing" if name not in there else f"{there[name]} bytes where {size} were written"
            raise _damaged(store, name, found)
    facts: dict[str, Any] = value
    return facts


def labels_path(slice_index: int) -> str:
    return f"labels/slice-{slice_index:04d}.safetensors"


def partial_path(kind: str, group: int, slice_index: int) -> str:
    """kind: `covariance` or `lambda`."""
    return f"{kind}/group-{group:03d}-slice-{slice_index:04d}.safetensors"


def block_keys(key: str, blocks: int) -> list[str]:
    """The keys of a matrix's blocks: its own, then numbered ones."""
    return [key, *(f"{key}.{index}" for index in range(1, blocks))]


def named_blocks(key: str, matrix: BlockDiagonal) -> dict[str, Tensor]:
    return dict(zip(block_keys(key, len(matrix.blocks)), matrix.blocks, strict=True))


def write_tensors(
    store: Store, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None
) -> None:
    store.write(name, tensor_bytes(tensors, facts))


def tensor_bytes(tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> bytes:
    """Safetensors bytes; `facts` go to the header as strings, with a digest of every tensor and of all of this."""
    plain = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    digests = {key: _digest(tensor) for key, tensor in plain.items()}
    known = sealed({"facts": dict(facts or {}), "digests": digests})
    # Under one key: safetensors writes several in no fixed order, and equal content must be equal bytes.
    return save_tensors(plain, metadata={_SEALED: json.dumps(known, sort_keys=True)})


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(store: Store, name: str) -> dict[str, Tensor]:
    """All tensors of a file, each held to its digest.

    Raises:
        DamagedError: where the file does not hold what was written.
    """
    data = store.read(name)
    digests = _digests(_header(io.BytesIO(data), store, name))
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(store, name, str(error)) from error
    if tensors.keys() != digests.keys():
        raise _damaged(store, name, "tensors are missing")
    for key, tensor in tensors.items():
        _check(store, name, key, tensor, digests)
    return tensors


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}


def read_tensor(store: Store, name: str, key: str) -> Tensor:
    """One tensor out of a safetensors file, by its byte range and held to its digest: the rest is not read.

    Raises:
        DamagedError: where the file does not hold what was written.
    """
    with store.open(name) as stream:
        header = _header(stream, store, name)
        base = stream.tell()
        try:
            entry = header[key]
            begin, end = entry["data_offsets"]
            stream.seek(base + begin)
            data = bytearray(stream.read(end - begin))
            tensor = torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _damaged(store, name, f"{key}: {error}") from error
    _check(store, name, key, tensor, _digests(header))
    return tensor


def read_facts(store: Store, name: str) -> dict[str, str]:
    """The strings in a safetensors file's header.

    Raises:
        DamagedError: where they are not what was written.
    """
    with store.open(name) as stream:
        facts: dict[str, str] = _header(stream, store, name)[_SEALED]["facts"]
    return facts


def _header(stream: BinaryIO, store: Store, name: str) -> dict[str, Any]:
    """A file's header, and under `_SEALED` its facts and digests, intact; leaves the stream where the tensors begin."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 + length:
        raise _damaged(store, name, f"it is cut off at {size} bytes")
    try:
        header = json.loads(stream.read(length))
        header[_SEALED] = json.loads(header.pop("__metadata__")[_SEALED])
        intact = is_intact(header[_SEALED])
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise _damaged(store, name, "its header is not what was written")
    return header


def _digests(header: Mapping[str, Any]) -> dict[str, str]:
    digests: dict[str, str] = header[_SEALED]["digests"]
    return digests


def _check(store: Store, name: str, key: str, tensor: Tensor, digests: Mapping[str, str]) -> None:
    if digests.get(key) != _digest(tensor):
        raise _damaged(store, name, f"{key} is not what was written")


def _damaged(store: Store, name: str, reason: str) -> DamagedError:
    mend = "remove it and run the same command again"
    if name.startswith(_FINISHED) or name == COMPLETE:
        mend = f"restore it, or remove {store.uri} and fit again"
    return DamagedError(f"{store.uri}/{name} is damaged ({reason}); {mend}.")


def read_layer_factors(store: Store, layer: Layer) -> LayerFactors:
    """One layer's finished factors, on the CPU.

    Raises:
        DamagedError: where a file does not hold what was written.
        FactorsError: where an entry is NaN or infinite.
    """
    A = read_tensors(store, f"A/{layer.input_of}.safetensors")
    S = read_tensors(store, f"S/{layer.name}.safetensors")
    Lambda = read_tensors(store, f"Lambda/{layer.name}.safetensors")
    for kind, tensors in (("A", A), ("S", S), ("Lambda", Lambda)):
        check_finite(tensors.values(), f"{kind} of {layer.name}")
    return LayerFactors(
        A=_from_blocks(A, "A"),
        S=_from_blocks(S, "S"),
        Q_A=_from_blocks(A, "Q_A"),
        Q_S=_from_blocks(S, "Q_S"),
        A_eigenvalues=A["eigenvalues"],
        S_eigenvalues=S["eigenvalues"],
        Lambda=Lambda["Lambda"],
    )


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
            f"{uri} has no {COMPLETE}: its factors are not complete; run jobs/fit.py again to finish them."
        )
    plan = read_plan(store)
    return {layer.name: read_layer_factors(store, layer) for layer in plan.layers}
