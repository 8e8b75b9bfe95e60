"""Safetensors files whose header carries facts and a digest of every tensor, checked whenever they are read."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from infscan.config import checksum_ok, seal_of, with_checksum
from infscan.errors import DamagedError
from infscan.storage import Store
from infscan.storage.foreign import parse_json

_CHECKSUMS = "infscan"
_OF = "of"
# Files that only a new fit can make again.
FINISHED_FACTORS = ("A/", "S/", "Lambda/", "labels/", "factors.json")


def write_tensors(
    store: Store, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None
) -> None:
    store.write(name, tensor_bytes(tensors, facts, name))


def tensor_bytes(tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None, name: str = "") -> bytes:
    """Safetensors bytes; `facts` go to the header as strings, with a digest of every tensor and of all of this.

    name: what the file is called in its store, so that a sibling put in its place shows; empty: it may be called
    anything.
    """
    plain = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    digests = {key: _digest(tensor) for key, tensor in plain.items()}
    known = with_checksum({"facts": dict(facts or {}), "digests": digests} | ({_OF: of_name(name)} if name else {}))
    # Under one key: safetensors writes several in no fixed order, and equal content must be equal bytes.
    return save_tensors(plain, metadata={_CHECKSUMS: json.dumps(known, sort_keys=True)})


def of_name(name: str) -> str:
    """A name's digest: of one length whatever the name, so that a file's bytes follow from its shapes."""
    return hashlib.sha256(name.encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(store: Store, name: str, seal: str | None = None) -> dict[str, Tensor]:
    """All tensors of a file, each held to its digest. seal: as of `read_seal`, where it is known which file it must be.

    Raises:
        DamagedError: where the file does not hold what was written, or is another one.
    """
    data = store.read(name)
    header = _header(io.BytesIO(data), store, name)
    check_seal(store, name, seal_of(header[_CHECKSUMS]), seal)
    digests = _digests(header)
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise damaged(store, name, str(error)) from error
    if tensors.keys() != digests.keys():
        raise damaged(store, name, "tensors are missing")
    for key, tensor in tensors.items():
        _check(store, name, key, tensor, digests)
    return tensors


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}


def read_tensor(store: Store, name: str, key: str) -> Tensor:
    """One tensor out of a safetensors file, by its byte range and held to its digest: the rest is not read.

    Raises:
        DamagedError: where the file does not hold what was written.
    """
    return read_some(store, name, [key])[key]


def read_some(store: Store, name: str, keys: Sequence[str]) -> dict[str, Tensor]:
    """Some tensors of a safetensors file, each held to its digest. Those that lie side by side are read at once.

    Raises:
        DamagedError: where the file does not hold what was written.
    """
    found: dict[str, Tensor] = {}
    with store.open(name) as stream:
        header = _header(stream, store, name)
        base = stream.tell()
        for stretch in _stretches(store, name, header, keys):
            start, stop = header[stretch[0]]["data_offsets"][0], header[stretch[-1]]["data_offsets"][1]
            stream.seek(base + start)
            data = memoryview(bytearray(stream.read(stop - start)))
            for key in stretch:
                begin, end = header[key]["data_offsets"]
                found[key] = _tensor(store, name, key, header[key], data[begin - start : end - start])
    for key, tensor in found.items():
        _check(store, name, key, tensor, _digests(header))
    return found


def _stretches(store: Store, name: str, header: Mapping[str, Any], keys: Sequence[str]) -> list[list[str]]:
    """The keys as their bytes lie, those without a gap between them together."""
    stretches: list[list[str]] = []
    end = -1
    try:
        for key in sorted(keys, key=lambda key: header[key]["data_offsets"]):
            begin, stop = header[key]["data_offsets"]
            if begin != end:
                stretches.append([])
            stretches[-1].append(key)
            end = stop
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(store, name, f"{', '.join(keys)}: {error}") from error
    return stretches


def _tensor(store: Store, name: str, key: str, entry: Mapping[str, Any], data: memoryview) -> Tensor:
    try:
        if not len(data):
            return torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
        return torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise damaged(store, name, f"{key}: {error}") from error


def tensor_shapes(store: Store, name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, by its header alone.

    Raises:
        DamagedError: where that is not what was written.
    """
    with store.open(name) as stream:
        header = _header(stream, store, name)
    return {key: tuple(entry["shape"]) for key, entry in header.items() if key != _CHECKSUMS}


def check_seal(store: Store, name: str, found: str, wanted: str | None) -> None:
    """Raises DamagedError where a file has another digest than the one that was written; None: any is right."""
    if wanted is not None and found != wanted:
        raise damaged(store, name, "it is whole, and another file than the one that was written")


def read_facts(store: Store, name: str) -> dict[str, str]:
    """The strings in a safetensors file's header.

    Raises:
        DamagedError: where they are not what was written.
    """
    with store.open(name) as stream:
        facts: dict[str, str] = _header(stream, store, name)[_CHECKSUMS]["facts"]
    return facts


def read_seal(store: Store, name: str) -> str:
    """The digest in a safetensors file's header that covers every tensor's digest and the facts.

    Raises:
        DamagedError: where the header is not what was written.
    """
    with store.open(name) as stream:
        return seal_of(_header(stream, store, name)[_CHECKSUMS])


def _header(stream: BinaryIO, store: Store, name: str) -> dict[str, Any]:
    """A file's header, its facts and digests intact under `_CHECKSUMS`; leaves the stream where the tensors begin."""
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 + length:
        raise damaged(store, name, f"it is cut off at {size} bytes")
    try:
        header = parse_json(stream.read(length))
        header[_CHECKSUMS] = parse_json(header.pop("__metadata__")[_CHECKSUMS])
        intact = checksum_ok(header[_CHECKSUMS])
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise damaged(store, name, "its header is not what was written")
    # Files of infscan 0.1 do not say what they are called.
    if header[_CHECKSUMS].get(_OF, of_name(name)) != of_name(name):
        raise damaged(store, name, "it was written under another name")
    return header


def _digests(header: Mapping[str, Any]) -> dict[str, str]:
    digests: dict[str, str] = header[_CHECKSUMS]["digests"]
    return digests


def _check(store: Store, name: str, key: str, tensor: Tensor, digests: Mapping[str, str]) -> None:
    if digests.get(key) != _digest(tensor):
        raise damaged(store, name, f"{key} is not what was written")


def damaged(store: Store, name: str, reason: str) -> DamagedError:
    """The error for a file that does not hold what was written, with what is to be done about it."""
    fix = "remove it and run the same command again"
    if name.startswith(FINISHED_FACTORS):
        fix = f"restore it, or remove {store.uri} and fit again"
    return DamagedError(f"{store.uri}/{name} is damaged ({reason}); {fix}.")


DIGEST = "0" * 64
_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4}
# Safetensors pads its header with spaces to this.
_ALIGNMENT = 8

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def tensors_file_bytes(shapes: Shapes, facts: Mapping[str, str] | None = None) -> int:
    """Bytes of the file that `tensor_bytes` makes of tensors of these dtypes and shapes.

    facts: strings of the same lengths as those that will be written.
    """
    known = with_checksum({"facts": dict(facts or {}), "digests": dict.fromkeys(shapes, DIGEST), _OF: DIGEST})
    header: dict[str, object] = {"__metadata__": {_CHECKSUMS: json.dumps(known, sort_keys=True)}}
    at = 0
    # In safetensors' order: wide dtypes first, then by name.
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: (-_order(item[1][0]), item[0])):
        size = _SIZES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // _ALIGNMENT) * _ALIGNMENT + at


def _order(dtype: str) -> int:
    return ("I32", "F32", "F64", "I64").index(dtype)
