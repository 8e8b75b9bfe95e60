"""The tables that people read, and the rows that shards keep. The version is in every file's footer.

Compatibility: within one version columns are only added. Readers of this package refuse a newer version.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from infscan.config import checksum_ok, with_checksum, without_checksum
from infscan.errors import DamagedError, RunError
from infscan.storage import Store
from infscan.storage.foreign import parse_json

SCHEMA_VERSION = 1
_FOOTER = b"infscan"
_COLUMNS = "columns"
OF = "of"
# Below, Arrow's threads cost more than they save: a shard's file is a few kB, and there may be a million of them.
_THREADS_FROM = 1 << 20

DOCUMENTS = pa.list_(
    pa.struct([("id", pa.string()), ("source", pa.string()), ("start", pa.int32()), ("end", pa.int32())])
)

# shards/: one row per kept sequence; its hits say for which queries and sides it was kept.
CANDIDATES = pa.schema(
    [
        ("sequence_id", pa.int64()),
        ("token_ids", pa.list_(pa.int32())),
        ("documents", DOCUMENTS),
        ("path", pa.string()),
        ("byte_offset", pa.int64()),
        ("loss", pa.float32()),
        # On which tokens training had its loss; null where on all of them.
        ("loss_mask", pa.list_(pa.bool_())),
        # Where attention began anew (corpus.attention=within); null where it ran through.
        ("document_starts", pa.list_(pa.int32())),
        (
            "hits",
            pa.list_(pa.struct([("query_id", pa.string()), ("side", pa.string()), ("scan_score", pa.float32())])),
        ),
    ]
)

# refined/: one row per re-scored (query, sequence); scores by tracked layer and by input position.
REFINED = pa.schema(
    [
        ("query_id", pa.string()),
        ("sequence_id", pa.int64()),
        ("layer_scores", pa.list_(pa.float32())),
        ("token_scores", pa.list_(pa.float32())),
    ]
)

TOP = pa.schema(
    [
        ("query_id", pa.string()),
        ("side", pa.string()),
        ("rank", pa.int32()),
        ("sequence_id", pa.int64()),
        ("score", pa.float32()),
        ("scan_score", pa.float32()),
        # Among all scanned sequences: robust standard deviations from the median, the part of all scores of its sign,
        # and whether the row stands out (`infscan.results.answers`). Null where the scan does not say.
        ("z", pa.float32()),
        ("share", pa.float32()),
        ("stands_out", pa.bool_()),
        # By |score| over both sides of the query, from 1.
        ("size_rank", pa.int32()),
        # score / -log p of the completion: per nat of what the model lacks.
        ("score_per_nat", pa.float32()),
        # Whether the completion's words (or tokens) occur in the sequence, and at which token; null where it does not.
        ("states_completion", pa.bool_()),
        ("states_at", pa.int32()),
        # The lowest and the highest score over several contexts before the sequence, and whether all have one sign;
        # null for rows beyond scan.stability.
        ("score_low", pa.float32()),
        ("score_high", pa.float32()),
        ("sign_sure", pa.bool_()),
        # Of what the model reads in the sequence and in the query: mean over the query's tokens of the best whitened
        # cosine of hidden states, from -1 to 1; null for rows beyond scan.similarity.
        ("similarity", pa.float32()),
        # The same in robust standard deviations from its median over a sample of the corpus.
        ("similarity_z", pa.float32()),
        # g' (G + lambda)^-1 g of the sequence's own gradient; and the rank by |score| / sqrt of it (l-RelatIF), among
        # those of the query and side that have it, from 1. Null for rows beyond scan.self_influence.
        ("self_influence", pa.float32()),
        ("relatif_rank", pa.int32()),
        # How many of the run's other questions have the sequence among the ten strongest of this side.
        ("hub", pa.int32()),
        ("spurious", pa.bool_()),
        # Of a packed sequence, the document that carries the row, and its part of the score.
        ("document_id", pa.string()),
        ("document_share", pa.float32()),
        ("source", pa.string()),
        # The label of a corpus among several; null where there is one.
        ("corpus", pa.string()),
    ]
)

SEQUENCES = pa.schema(
    [
        ("sequence_id", pa.int64()),
        # The document that carries most of the sequence's published rows.
        ("document_id", pa.string()),
        ("documents", DOCUMENTS),
        ("source", pa.string()),
        ("path", pa.string()),
        ("byte_offset", pa.int64()),
        ("loss", pa.float32()),
        ("token_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        # Each token's text; null without a tokenizer.
        ("tokens", pa.list_(pa.string())),
        # As in CANDIDATES.
        ("loss_mask", pa.list_(pa.bool_())),
        # As in TOP.
        ("corpus", pa.string()),
    ]
)

# answers/: one row per query, its strongest proponent among all scanned sequences.
ANSWERS = pa.schema(
    [
        ("query_id", pa.string()),
        # Whether a published row stands out (`infscan.results.answers`); null where the scan does not say, or the model
        # hardly knows the completion.
        ("found", pa.bool_()),
        # What to say where it is not found.
        ("verdict", pa.string()),
        ("document_id", pa.string()),
        ("source", pa.string()),
        ("score", pa.float32()),
        ("z", pa.float32()),
        # Of its score to that of the strongest row of another document.
        ("ratio", pa.float32()),
        # Of its score to all positive ones.
        ("share", pa.float32()),
        # The rank of the strongest proponent that states the completion; null where no published one does.
        ("stating_rank", pa.int32()),
        # Of the published row that is the most like the question, whichever its side; null where none was compared.
        ("similar_document_id", pa.string()),
        ("similarity_z", pa.float32()),
        # Of the scan scores: how many are finite, their median, 1.4826 MAD, and the sums of either sign.
        ("sequences", pa.int64()),
        ("median", pa.float64()),
        ("scale", pa.float64()),
        ("positive", pa.float64()),
        ("negative", pa.float64()),
    ]
)

# documents/: one row per published row and document of its sequence.
ROW_DOCUMENTS = pa.schema(
    [
        ("query_id", pa.string()),
        ("sequence_id", pa.int64()),
        ("document_id", pa.string()),
        ("source", pa.string()),
        # Its tokens' positions, and the sum of their scores.
        ("start", pa.int32()),
        ("end", pa.int32()),
        ("score", pa.float32()),
    ]
)

LAYERS = pa.schema(
    [("query_id", pa.string()), ("sequence_id", pa.int64()), ("layer", pa.string()), ("score", pa.float32())]
)

# run.parquet: one row, what was asked of which inputs, and what answered. Nothing in it says where or how fast: runs
# that ask the same of the same software and kind of machine have the same row.
RUN = pa.schema(
    [
        ("model", pa.string()),
        ("corpus", pa.string()),
        ("queries", pa.string()),
        ("model_fingerprint", pa.string()),
        ("corpus_fingerprint", pa.string()),
        ("queries_fingerprint", pa.string()),
        ("parameters", pa.int64()),
        ("sequences", pa.int64()),
        ("tokens", pa.int64()),
        ("num_queries", pa.int32()),
        ("quarantined_shards", pa.int32()),
        # Every key of config.yaml that a resume may not change.
        ("settings", pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())]))),
        # What made it (`infscan.steps.provenance`); null in runs of infscan 0.1.
        ("arithmetic", pa.int32()),
        *((name, pa.string()) for name in ("infscan", "commit", "torch", "transformers", "tokenizers", "numpy")),
        *((name, pa.string()) for name in ("python", "cpu", "device", "dtype", "refine_dtype", "model_revision")),
        # What is known to be missing, in a sentence; null where every sequence was scanned in full.
        ("certificate", pa.string()),
    ]
)

# queries/queries.parquet: one row per measured query; what a contrast adds is null where there is none.
_PART = [
    ("token_ids", pa.list_(pa.int32())),
    # Each token's text; null without a tokenizer.
    ("tokens", pa.list_(pa.string())),
    # Positions of the tokens that are measured.
    ("measured", pa.list_(pa.int32())),
    # Of the measured tokens together, nats.
    ("log_probability", pa.float64()),
    # Frobenius norm over the tracked layers.
    ("gradient_norm", pa.float64()),
]
QUERIES = pa.schema(
    [
        *((name, pa.string()) for name in ("query_id", "prompt", "completion", "contrast", "measure")),
        *_PART,
        *((f"contrast_{name}", kind) for name, kind in _PART),
    ]
)

TOKENS = pa.schema(
    [
        ("query_id", pa.string()),
        ("sequence_id", pa.int64()),
        ("scores", pa.list_(pa.float32())),
        # By token: what predicting it taught; they add up to the score too. Null for rows beyond scan.targets.
        ("targets", pa.list_(pa.float32())),
    ]
)


def to_parquet(table: pa.Table, footer: dict[str, Any]) -> bytes:
    """A table as complete Parquet bytes: zstd, statistics, page checksums, and `footer` as JSON.

    footer: with `of`, the name of the file in its store, a sibling put in its place is refused.

    The schema version and a digest of each column go into the footer too: `read_parquet` holds what it reads to them.
    """
    columns = {name: _digest(table.column(name)) for name in table.column_names}
    facts = with_checksum({"schema_version": SCHEMA_VERSION, **footer, _COLUMNS: columns})
    table = table.replace_schema_metadata({_FOOTER: json.dumps(facts).encode()})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_statistics=True, write_page_checksum=True)
    return sink.getvalue()


Check = Callable[[str, bytes], None]


def read_parquet(store: Store, name: str, columns: list[str] | None = None, check: Check | None = None) -> pa.Table:
    """A table that `to_parquet` wrote, with its footer in the schema's metadata.

    check: given the address and the file's bytes; raises where they are not the ones that are wanted.

    Raises:
        StorageError: where the file is missing or refused.
        DamagedError: where it does not hold what was written.
        RunError: as `footer_of`.
    """
    return read_with_footer(store, name, columns, check)[0]


def read_with_footer(
    store: Store, name: str, columns: list[str] | None = None, check: Check | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """`read_parquet`, and what `footer_of` says of the table: the footer is verified once for both."""
    where = f"{store.uri}/{name}"
    try:
        table = read_any_parquet(store, name, columns, check)
        digests = {column: _digest(table.column(column)) for column in table.column_names}
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        raise damaged(where, " ".join(str(error).split())) from error
    footer = _footer(table.schema, where)
    _check_name(footer, store, name)
    known = footer[_COLUMNS]
    for column, digest in digests.items():
        if known.get(column) != digest:
            raise damaged(where, f"the column {column!r} is not what was written")
    return table, _given(footer)


def read_any_parquet(store: Store, name: str, columns: list[str] | None = None, check: Check | None = None) -> pa.Table:
    """A Parquet file, whoever wrote it, as a table.

    Read from memory that Arrow owns: its threads may let go of a Python object's memory while the interpreter ends,
    which aborts the process after its work is done.

    Raises:
        StorageError: where the file is missing or refused.
        pa.ArrowException, OSError, ValueError: where it is no Parquet file, or damaged.
    """
    data = store.read(name)
    if check is not None:
        check(f"{store.uri}/{name}", data)
    owned = pa.allocate_buffer(len(data))
    np.frombuffer(owned, np.uint8)[:] = np.frombuffer(data, np.uint8)
    # Not pq.read_table, whose machinery for folders of files takes 1 ms for each.
    table = pq.ParquetFile(pa.BufferReader(owned)).read(columns, use_threads=len(data) >= _THREADS_FROM)
    if columns is None:
        return table
    # Columns that are not there are left out without a word, and the others come in the file's order.
    if missing := sorted(set(columns) - set(table.column_names)):
        raise pa.ArrowInvalid(f"it has no column {missing[0]!r}")
    return table.select(columns)


def footer_of(schema: pa.Schema, name: str) -> dict[str, Any]:
    """What `to_parquet` put beside the rows.

    Raises:
        RunError: for a file of a newer schema, or one that infscan did not write.
        DamagedError: where it is not what was written.
    """
    return _given(_footer(schema, name))


def _check_name(footer: dict[str, Any], store: Store, name: str) -> None:
    """Raises DamagedError where another file's content was put under a name. Files of infscan 0.1 do not say theirs."""
    if footer.get(OF, name) != name:
        raise damaged(f"{store.uri}/{name}", f"it was written as {footer[OF]}")


def _given(footer: dict[str, Any]) -> dict[str, Any]:
    return without_checksum({key: value for key, value in footer.items() if key not in (_COLUMNS, OF)})


def _footer(schema: pa.Schema, name: str) -> dict[str, Any]:
    raw = (schema.metadata or {}).get(_FOOTER)
    if raw is None:
        raise RunError(f"{name} was not written by infscan (its footer says nothing); take it out of the run folder.")
    try:
        footer = parse_json(raw)
    except ValueError:
        footer = None
    if not checksum_ok(footer):
        raise damaged(name, "its footer is not what was written")
    version: int = footer["schema_version"]
    if version > SCHEMA_VERSION:
        raise RunError(
            f"{name} has schema version {version}, newer than this infscan's {SCHEMA_VERSION}; upgrade infscan."
        )
    facts: dict[str, Any] = footer
    return facts


def damaged(where: str, reason: str) -> DamagedError:
    """The error for a table that does not hold what was written."""
    return DamagedError(
        f"{where} is damaged ({reason}); remove it (of scores/, the shards/ file of the same name too) and give the "
        "run's own command again."
    )


def other_scan(store: Store, path: str) -> RunError:
    """The error for a file of a scan with other inputs, whatever its name."""
    return RunError(
        f"{store.uri}/{path} was made of other inputs or settings than this run's (its footer has another "
        "fingerprint); put back what it was made of, or remove it and run the same command again."
    )


def _digest(column: pa.ChunkedArray) -> str:
    """SHA-256 of a column's values: the same however they are chunked, sliced or encoded."""
    digest = sha256()
    _feed(digest, column.chunk(0) if column.num_chunks == 1 else column.combine_chunks())
    return digest.hexdigest()


def _feed(digest: Any, array: pa.Array) -> None:
    digest.update(f"{len(array)}:{array.null_count}:".encode())
    if array.null_count:
        digest.update(array.is_null().cast(pa.uint8()).to_numpy().tobytes())
    if pa.types.is_list(array.type):
        lengths = pc.list_value_length(array)
        digest.update((lengths.fill_null(0) if array.null_count else lengths).to_numpy().tobytes())
        _feed(digest, array.flatten())
    elif pa.types.is_struct(array.type):
        for index, child in enumerate(array.flatten()):
            digest.update(array.type.field(index).name.encode())
            _feed(digest, child)
    elif pa.types.is_string(array.type):
        if array.null_count:
            array = array.fill_null("")
        _, offsets, values = array.buffers()
        ends = np.zeros(1, np.int32) if offsets is None else np.frombuffer(offsets, np.int32)
        ends = ends[array.offset : array.offset + len(array) + 1]
        digest.update(np.diff(ends).tobytes())
        if values is not None:
            digest.update(memoryview(values)[ends[0] : ends[-1]])
    elif pa.types.is_boolean(array.type):
        _feed(digest, array.cast(pa.uint8()))
    else:
        values = (array.fill_null(0) if array.null_count else array).to_numpy(zero_copy_only=False)
        if pa.types.is_floating(array.type):
            # Encodings may merge NaNs of other bits, and zeros of other signs.
            values = np.where(np.isnan(values), np.float32(np.nan), values) + np.float32(0)
        digest.update(np.ascontiguousarray(values).tobytes())
