"""Where factors lie, and the plan that fixes how they are computed.

plan.json              fingerprint and fields, slices, layer groups: created once, then read back
labels/                pseudo-labels per slice (sampled Fisher only)
covariance/, lambda/   partial sums per (slice, layer group); removed when the factors are complete
A/ S/ Lambda/          one safetensors file per layer (layers that share an input share the file in A/)
factors.json           written last: its presence is the fact that the factors are complete
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from infscan.config import fingerprint
from infscan.corpus.plan import Selection
from infscan.errors import FactorsError
from infscan.influence.layers import Layer, LayerFactors
from infscan.storage import Store

PLAN, COMPLETE = "plan.json", "factors.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class FactorsPlan:
    """What is fitted and in which pieces; it never changes once it is in storage.

    fields: what the fingerprint covers (model, tokenizer, tracked layers, corpus, labels, seed, ...), by name.
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

    def group(self, index: int) -> tuple[Layer, ...]:
        names = set(self.groups[index])
        return tuple(layer for layer in self.layers if layer.name in names)

    def partial_bytes(self) -> int:
        """Bytes of all partial sums in storage at once (float32): the covariance pass's are the larger ones."""
        covariance = sum(layer.outputs**2 + (layer.input_of == layer.name) * layer.inputs**2 for layer in self.layers)
        return 4 * len(self.slices) * max(covariance, sum(layer.size for layer in self.layers))

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint, **asdict(self)}

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


def layer_groups(layers: Sequence[Layer], max_bytes: int) -> tuple[tuple[str, ...], ...]:
    """Consecutive layers whose A, S (or Q_A, Q_S) and Lambda fit `max_bytes` in float32 together; at least one each.

    Raises:
        FactorsError: where a single layer needs more.
    """
    groups: list[list[str]] = []
    used = 0
    for layer in layers:
        need = 4 * (layer.inputs**2 + layer.outputs**2 + layer.size)
        if need > max_bytes:
            raise FactorsError(
                f"{layer.name} ({layer.outputs} x {layer.inputs}) needs {need / 2**30:.1f} GiB of factors, more than "
                f"factors.max_group_bytes={max_bytes}; raise it, or leave the layer out with model.tracked=<regex>."
            )
        if not groups or used + need > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(layer.name)
        used += need
    return tuple(tuple(group) for group in groups)


def labels_path(slice_index: int) -> str:
    return f"labels/slice-{slice_index:04d}.safetensors"


def partial_path(kind: str, group: int, slice_index: int) -> str:
    """kind: `covariance` or `lambda`."""
    return f"{kind}/group-{group:03d}-slice-{slice_index:04d}.safetensors"


def write_tensors(
    store: Store, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None
) -> None:
    store.write(name, tensor_bytes(tensors, facts))


def tensor_bytes(tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None) -> bytes:
    """Safetensors bytes; `facts` go to the header as strings."""
    plain = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    return save_tensors(plain, metadata=dict(facts) if facts else None)


def read_tensors(store: Store, name: str) -> dict[str, Tensor]:
    return load_tensors(store.read(name))


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}


def read_tensor(store: Store, name: str, key: str) -> Tensor:
    """One tensor out of a safetensors file, by its byte range: the rest of the file is not read."""
    with store.open(name) as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        entry = header[key]
        begin, end = entry["data_offsets"]
        base = stream.tell()
        stream.seek(base + begin)
        data = bytearray(stream.read(end - begin))
    return torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])


def read_facts(store: Store, name: str) -> dict[str, str]:
    """The strings in a safetensors file's header."""
    with store.open(name) as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    facts: dict[str, str] = header.get("__metadata__", {})
    return facts


def read_layer_factors(store: Store, layer: Layer) -> LayerFactors:
    """One layer's finished factors, on the CPU."""
    A = read_tensors(store, f"A/{layer.input_of}.safetensors")
    S = read_tensors(store, f"S/{layer.name}.safetensors")
    return LayerFactors(
        A=A["A"],
        S=S["S"],
        Q_A=A["Q_A"],
        Q_S=S["Q_S"],
        A_eigenvalues=A["eigenvalues"],
        S_eigenvalues=S["eigenvalues"],
        Lambda=read_tensors(store, f"Lambda/{layer.name}.safetensors")["Lambda"],
    )


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
    plan = FactorsPlan.from_json(store.read_json(PLAN))
    return {layer.name: read_layer_factors(store, layer) for layer in plan.layers}
