"""Small corpora for the tests: rows, the files they are written to, and what is read from them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from infscan.config import CorpusConfig, Packing
from infscan.corpus.addressable import PreparedCorpus, open_corpus
from infscan.corpus.documents import document_files, document_splits
from infscan.corpus.duplicates import duplicates
from infscan.corpus.manifest import Manifest
from infscan.corpus.packing import PackSettings, pack_settings
from infscan.corpus.prepared import NOTHING, hash_piece, prepare_part, write_manifest
from infscan.corpus.rows import Document
from infscan.corpus.sequences import Sequence
from infscan.storage import Store

VOCAB = 50
EOS = 0
BOS = 1


def corpus_config(path: Path | str = "corpus", **changes: Any) -> CorpusConfig:
    return CorpusConfig(**{"path": str(path), "tokens_field": "tokens", **changes})


def settings(packing: Packing, sequence_length: int, *, bos: bool = False) -> PackSettings:
    return pack_settings(corpus_config(packing=packing, bos=bos), sequence_length, VOCAB, EOS, BOS)


def documents(rows: Iterable[Iterable[int]]) -> list[Document]:
    """Documents d0, d1, ... with these token ids, at offsets 0, 10, 20, ..."""
    return [
        Document(f"d{n}", f"s{n % 3}", None, np.array(list(tokens), np.int64), "file", 10 * n)
        for n, tokens in enumerate(rows)
    ]


def token_rows(count: int, *, seed: int = 0, longest: int = 20) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"id": f"d{n}", "source": f"s{n % 3}", "tokens": rng.integers(2, VOCAB, rng.integers(0, longest)).tolist()}
        for n in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as the name's suffix says: .jsonl (also .gz, .zst), .parquet, .arrow (a file), .ipc (a stream)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7, write_page_checksum=True)
    elif path.suffix in (".arrow", ".ipc"):
        table = pa.Table.from_pylist(rows)
        kind = pa.ipc.new_file if path.suffix == ".arrow" else pa.ipc.new_stream
        with path.open("wb") as sink, kind(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        half = lines.index(b"\n") + 1 if lines else 0
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
        path.write_bytes(compress(lines[:half]) + compress(lines[half:]))
    else:
        path.write_bytes(lines)
    return path


def prepare(
    source: Path | str, target: Path | str, pack: PackSettings, **changes: Any
) -> tuple[Manifest, PreparedCorpus]:
    """Prepare every file below `source` into `target` and open what came of it."""
    config = corpus_config(source, packing=pack.packing, **changes)
    store = Store(str(target))
    pieces = document_splits(document_files(config), config)
    dropped = duplicates([hash_piece(piece, config) for piece in pieces]) if config.deduplicate else repeat(NOTHING)
    parts = [
        prepare_part(piece, n, config, pack, None, store, drops)
        for n, (piece, drops) in enumerate(zip(pieces, dropped, strict=False))
    ]
    return write_manifest(store, config, pack, None, parts), open_corpus(store)


def plain(sequence: Sequence) -> dict[str, Any]:
    """A sequence as values that compare; `path` is left out, since it says where the corpus happened to lie."""
    return {
        "sequence_id": sequence.sequence_id,
        "token_ids": sequence.token_ids.tolist(),
        "documents": sequence.documents,
        "byte_offset": sequence.byte_offset,
    }
