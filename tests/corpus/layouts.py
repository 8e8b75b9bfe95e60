"""Write token ids as other tools lay them down, in any store: Megatron, npy, MDS."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard

from infscan.config import CorpusConfig
from infscan.corpus.addressable import AddressableCorpus, open_corpus
from infscan.corpus.describe import describe, token_files
from infscan.corpus.in_place import DESCRIPTION
from infscan.corpus.packing import PackSettings
from infscan.storage import Store

CODES = {"|u1": 1, "<i2": 3, "<i4": 4, "<i8": 5, "<u2": 8}


def megatron(
    store: Store, stem: str, documents: Sequence[Sequence[int]], dtype: str = "<u2", *, pieces: int = 1
) -> None:
    """stem.bin and stem.idx as Megatron's preprocessing writes them; `pieces`: sequences a document is cut into."""
    cut = [[list(piece) for piece in np.array_split(np.array(tokens, np.int64), pieces)] for tokens in documents]
    sequences = [piece for document in cut for piece in document]
    lengths = np.array([len(piece) for piece in sequences], "<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * np.dtype(dtype).itemsize
    indices = np.arange(len(documents) + 1) * pieces
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, CODES[dtype], len(sequences), len(indices))
    body = lengths.tobytes() + pointers[: len(sequences)].astype("<i8").tobytes() + indices.astype("<i8").tobytes()
    store.write(f"{stem}.idx", header + body)
    flat = [token for piece in sequences for token in piece]
    store.write(f"{stem}.bin", np.array(flat, np.int64).astype(dtype).tobytes())


def npy(
    store: Store, name: str, tokens: Sequence[int] | np.ndarray, dtype: str = "<u2", *, header: bool = False
) -> None:
    array = np.array(tokens, np.int64).astype(dtype)
    if not header:
        store.write(name, array.tobytes())
        return
    stream = io.BytesIO()
    np.save(stream, array)
    store.write(name, stream.getvalue())


def mds(
    store: Store,
    samples: Sequence[dict[str, Any]],
    encodings: dict[str, str],
    *,
    per_shard: int = 5,
    compress: bool = False,
    **changes: Any,
) -> None:
    """index.json and shards of `per_shard` samples; values are bytes already, or what the encoding encodes."""
    names = sorted(encodings)
    sizes = [_fixed_size(encodings[name]) for name in names]
    shards = []
    for number, start in enumerate(range(0, len(samples), per_shard)):
        rows = []
        for sample in samples[start : start + per_shard]:
            values = [_encoded(encodings[name], sample[name]) for name in names]
            own = [len(value) for value, size in zip(values, sizes, strict=True) if size is None]
            rows.append(np.array(own, "<u4").tobytes() + b"".join(values))
        config = json.dumps({"column_names": names}).encode()
        first = 4 + 4 * (len(rows) + 1) + len(config)
        offsets = np.cumsum([first, *map(len, rows)]).astype("<u4")
        raw = struct.pack("<I", len(rows)) + offsets.tobytes() + config + b"".join(rows)
        stored = zstandard.compress(raw) if compress else raw
        basename = f"shard.{number:05d}.mds"
        store.write(basename + (".zstd" if compress else ""), stored)
        zip_data = {"basename": f"{basename}.zstd", "bytes": len(stored), "hashes": {}} if compress else None
        shards.append(
            {
                "column_encodings": [encodings[name] for name in names],
                "column_names": names,
                "column_sizes": sizes,
                "compression": "zstd" if compress else None,
                "format": "mds",
                "hashes": [],
                "raw_data": {"basename": basename, "bytes": len(raw), "hashes": {}},
                "samples": len(rows),
                "size_limit": 1 << 26,
                "version": 2,
                "zip_data": zip_data,
                **changes,
            }
        )
    store.write_json("index.json", {"shards": shards, "version": 2})


def _fixed_size(encoding: str) -> int | None:
    kind, _, rest = encoding.partition(":")
    if kind == "ndarray" and ":" in rest:
        dtype, shape = rest.split(":")
        return int(np.dtype(dtype).itemsize * np.prod([int(n) for n in shape.split(",")]))
    return np.dtype(kind).itemsize if kind.startswith(("int", "uint")) else None


def _encoded(encoding: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    kind, _, rest = encoding.partition(":")
    if kind == "str":
        return str(value).encode()
    if kind == "ndarray":
        dtype, _, shape = rest.partition(":")
        array = np.array(value, dtype or "<i4")
        head = b"" if dtype else bytes([33])
        head += b"" if shape else bytes([1 << 2 | 1]) + struct.pack("<H", len(array))
        return head + array.tobytes()
    return np.array(value, kind).tobytes()


def described(store: Store, config: CorpusConfig, pack: PackSettings, target: Store | None = None) -> AddressableCorpus:
    """The corpus in place, its description in `target` (the folder `described` beside it)."""
    target = target or Store(f"{store.uri}-described")
    found = token_files(config)
    assert found is not None
    kind, files = found
    target.write_json(DESCRIPTION, describe(kind, files, config, pack).to_json())
    return open_corpus(target)
