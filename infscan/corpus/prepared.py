"""Write a prepared corpus: documents tokenised, packed, numbered and laid down as Parquet that can be read by number.

part-00000.parquet ...   one per input file, in the inputs' order; sequences are numbered through the parts
manifest.json            written last: its presence is the fact that the corpus is complete
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Row
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infscan.config import CorpusConfig, TextRecords, fingerprint
from infscan.corpus.documents import Document, read_documents
from infscan.corpus.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    PartSummary,
    footer_digest,
    left_out_of,
    part_name,
    part_schema,
)
from infscan.corpus.packing import Counts, Packer, PackSettings
from infscan.corpus.sequences import Sequence
from infscan.corpus.tally import LeftOut, Tally
from infscan.corpus.tokenizer import Tokenizer
from infscan.errors import BadFileError, CorpusError
from infscan.storage import InputFile, MissingError, Store

ROW_GROUP_SEQUENCES = 1024
_FOOTER_KEY = b"infscan"
_PART = re.compile(r"part-(\d{5,})\.parquet")
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 4 << 20


def prepare_settings(config: CorpusConfig, pack: PackSettings, tokenizer_digest: str | None) -> dict[str, Any]:
    """Everything besides the files that decides what a prepared corpus holds, as plain JSON."""
    fields = {key: getattr(config, key) for key in ("format", "text_field", "id_field", "source_field", "tokens_field")}
    if config.text_records is not TextRecords.file:
        fields["text_records"] = config.text_records.value
    settings = {**fields, **asdict(pack), "packing": pack.packing.value, "tokenizer": tokenizer_digest}
    del settings["masked"]
    # Where the loss is everywhere, nothing is said of it.
    masks = {"prompt_field": config.prompt_field, "mask_field": config.mask_field} if pack.masked else {}
    return settings | masks


def prepare_part(
    file: InputFile, index: int, config: CorpusConfig, pack: PackSettings, tokenizer: Tokenizer | None, store: Store
) -> PartSummary:
    """Read, tokenise, pack and write one input file; a part already there, of the same file and settings, is kept.

    The same file gives the same bytes. Documents stream through, but the finished part is held in memory, compressed
    (about two bytes per token), because it is written by one put: split inputs of many GB.

    A file that cannot be read to its end is left out whole where corpus.allow_bad_files lets it: its part is empty.

    Raises:
        CorpusError: naming file and line, for anything that cannot be read; nothing is written then.
    """
    settings = fingerprint(prepare_settings(config, pack, tokenizer.digest if tokenizer else None))
    done = finished_part(store, index)
    if done is not None and (done.input, done.settings) == (file, settings):
        return done
    try:
        data, summary = _prepared(file, index, config, pack, tokenizer, settings)
    except BadFileError as error:
        if not config.allow_bad_files:
            raise
        left_out = LeftOut({"file cannot be read": 1}, [str(error)])
        data, summary = _part(iter(()), Packer(pack), index, file, settings, lambda: (Counts(files_bad=1), left_out))
    store.write(part_name(index), data)
    return replace(summary, bytes=len(data), footer=footer_digest(io.BytesIO(data)))


def _prepared(
    file: InputFile,
    index: int,
    config: CorpusConfig,
    pack: PackSettings,
    tokenizer: Tokenizer | None,
    settings: str,
) -> tuple[bytes, PartSummary]:
    tally = Tally(config.allow_bad_documents)
    packer = Packer(pack, tally)

    def found() -> tuple[Counts, LeftOut]:
        records = Counts(files_read=1, records_read=tally.records, records_blank=tally.blank, documents_bad=tally.bad)
        return packer.counts + records, tally.left_out()

    documents = read_documents(file, config, tally)
    return _part(packer.pack(_with_tokens(documents, tokenizer)), packer, index, file, settings, found)


def _part(
    sequences: Iterator[Sequence],
    packer: Packer,
    index: int,
    file: InputFile,
    settings: str,
    found: Callable[[], tuple[Counts, LeftOut]],
) -> tuple[bytes, PartSummary]:
    """A part's bytes, and what its footer says; `found` is asked once the sequences are exhausted."""
    digest = sha256()
    sink = pa.BufferOutputStream()
    schema = part_schema(packer.settings.vocab_size, masked=packer.settings.masked)
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True) as writer:
        while rows := list(islice(sequences, ROW_GROUP_SEQUENCES)):
            writer.write_table(_table(rows, schema), row_group_size=ROW_GROUP_SEQUENCES)
            for row in rows:
                _digest_row(digest, row)
        counts, left_out = found()
        summary = PartSummary(
            index=index,
            sequences=packer.counts.sequences,
            tokens=packer.counts.tokens,
            digest=digest.hexdigest(),
            bytes=0,
            input=file,
            settings=settings,
            counts=counts,
            left_out=left_out,
        )
        footer = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(summary)}, sort_keys=True)
        writer.add_key_value_metadata({_FOOTER_KEY: footer.encode()})
    return sink.getvalue().to_pybytes(), summary


def finished_part(store: Store, index: int) -> PartSummary | None:
    """What the footer of a part that is already there says; None where there is none, or none of this schema."""
    try:
        with store.open(part_name(index)) as stream:
            size, digest = stream.seek(0, io.SEEK_END), footer_digest(stream)
            footer = pq.read_metadata(stream).metadata or {}
    except (MissingError, pa.ArrowException, OSError, ValueError):
        return None
    try:
        value = json.loads(footer.get(_FOOTER_KEY, b"{}"))
        if value.pop("schema_version", None) != SCHEMA_VERSION or value["index"] != index:
            return None
        value |= {"bytes": size, "input": InputFile(**value["input"]), "counts": Counts(**value["counts"])}
        return PartSummary(**value | {"left_out": left_out_of(value), "footer": digest})
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def finished_parts(store: Store, files: Row[InputFile]) -> list[PartSummary]:
    """The parts of these files, all of which are there by now.

    Raises:
        CorpusError: where one is missing, or is of another file: something else writes to the same folder.
    """
    found: list[PartSummary] = []
    for index, file in enumerate(files):
        part = finished_part(store, index)
        if part is None or part.input != file:
            raise CorpusError(
                f"{store}/{part_name(index)}: the part of {file.uri} is gone or another file's, though it was written; "
                "does another job prepare into this folder? Run this one again when it alone does."
            )
        found.append(part)
    return found


def write_manifest(
    store: Store, config: CorpusConfig, pack: PackSettings, tokenizer_digest: str | None, parts: Iterable[PartSummary]
) -> Manifest:
    """Number the parts through and write manifest.json; every part must be there.

    The fingerprint is of the content (token ids, document ids, T): the same documents prepared elsewhere have the same.

    Raises:
        CorpusError: if the parts hold no sequence at all, or leave out more than corpus.allow_bad_* allow.
    """
    ordered = tuple(sorted(parts, key=lambda part: part.index))
    settings = prepare_settings(config, pack, tokenizer_digest)
    assert [part.index for part in ordered] == list(range(len(ordered))), "a part is missing or twice"
    assert {part.settings for part in ordered} <= {fingerprint(settings)}, "parts of different settings"
    counts = sum((part.counts for part in ordered), Counts())
    check_allowed(config, counts, LeftOut.together(part.left_out for part in ordered))
    if not counts.sequences:
        raise CorpusError(
            f"{config.path}: {len(ordered)} files with {counts.documents_read} documents hold no token; "
            f"check the files and corpus.text_field={config.text_field!r}."
        )
    digests = [part.digest for part in ordered if part.sequences]
    manifest = Manifest(
        fingerprint=fingerprint({"sequence_length": pack.sequence_length, "parts": digests}),
        settings=settings,
        sequence_length=pack.sequence_length,
        vocab_size=pack.vocab_size,
        tokenizer=tokenizer_digest,
        sequences=counts.sequences,
        tokens=counts.tokens,
        counts=counts,
        parts=ordered,
    )
    store.write_json(MANIFEST, manifest.to_json())
    _remove_stale(store, len(ordered))
    return manifest


def check_allowed(config: CorpusConfig, counts: Counts, left_out: LeftOut) -> None:
    """Refuse a corpus of which more was left out than its settings allow: the limits count over all files.

    Raises:
        CorpusError: with both numbers and the first sentence.
    """
    for bad, allowed, key in (
        (counts.documents_bad, config.allow_bad_documents, "documents"),
        (counts.files_bad, config.allow_bad_files, "files"),
    ):
        if bad > allowed:
            raise CorpusError(
                f"{config.path}: {bad} {key} cannot be used, more than corpus.allow_bad_{key}={allowed}. The first: "
                f"{left_out.first[0]}"
            )


def _remove_stale(store: Store, parts: int) -> None:
    """Parts of ours that an earlier attempt with more input files left; a folder is often read as a whole."""
    known = {part_name(index) for index in range(parts)}
    for entry in store.list(suffix=".parquet"):
        match = _PART.fullmatch(entry.name)
        if match and entry.name not in known and finished_part(store, int(match[1])) is not None:
            store.remove(entry.name)


def _with_tokens(documents: Iterable[Document], tokenizer: Tokenizer | None) -> Iterator[Document]:
    """Tokenise in batches, in order; documents that bring token ids pass as they are."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        if document.text is not None and tokenizer is None:
            raise CorpusError(
                f"{document.path}: document {document.id!r} is text, and the model's folder has no tokenizer; add one, "
                "or name a field of token ids in corpus.tokens_field."
            )
        batch.append(document)
        characters += len(document.text or "")
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield from _encoded(batch, tokenizer)
            batch, characters = [], 0
    yield from _encoded(batch, tokenizer)


def _encoded(batch: list[Document], tokenizer: Tokenizer | None) -> Iterator[Document]:
    texts = [document.text for document in batch if document.text is not None]
    rows = iter(tokenizer.encode_batch(texts) if tokenizer else [])
    prompts = [document.prompt for document in batch if document.prompt is not None]
    before = iter(tokenizer.encode_batch(prompts) if tokenizer else [])
    for document in batch:
        if document.text is None:
            yield document
            continue
        token_ids = next(rows)
        if document.prompt is None:
            yield replace(document, text=None, token_ids=token_ids)
            continue
        # Apart, as a query's prompt and completion are; without a completion there is nothing to learn.
        prompt_ids = next(before) if len(token_ids) else next(before)[:0]
        yield replace(
            document,
            text=None,
            prompt=None,
            token_ids=np.concatenate([prompt_ids, token_ids]),
            loss=np.arange(len(prompt_ids) + len(token_ids)) >= len(prompt_ids),
        )


def _table(rows: Row[Sequence], schema: pa.Schema) -> pa.Table:
    token = schema.field("token_ids").type.value_type.to_pandas_dtype()
    span = schema.field("documents").type.value_type
    spans = [document for row in rows for document in row.documents]
    columns = (
        pa.array([s.id for s in spans], pa.string()),
        pa.array([s.source for s in spans], pa.string()),
        pa.array([s.start for s in spans], pa.int32()),
        pa.array([s.end for s in spans], pa.int32()),
    )
    token_ids = np.concatenate([row.token_ids for row in rows]).astype(token)
    return pa.Table.from_arrays(
        [
            pa.ListArray.from_arrays(_offsets(len(row) for row in rows), token_ids),
            pa.ListArray.from_arrays(
                _offsets(len(row.documents) for row in rows), pa.StructArray.from_arrays(columns, fields=list(span))
            ),
            pa.array([row.byte_offset for row in rows], pa.int64()),
            pa.array([row.path for row in rows], pa.string()),
            *([_masks(rows)] if "loss_mask" in schema.names else []),
        ],
        schema=schema,
    )


def _masks(rows: Row[Sequence]) -> pa.Array:
    masks = [row.loss if row.loss is not None else np.ones(len(row), np.bool_) for row in rows]
    return pa.ListArray.from_arrays(_offsets(len(row) for row in rows), pa.array(np.concatenate(masks), pa.bool_()))


def _offsets(lengths: Iterable[int]) -> pa.Array:
    return pa.array(np.cumsum([0, *lengths]), pa.int32())


def _digest_row(digest: Any, row: Sequence) -> None:
    digest.update(struct.pack("<qq", len(row), len(row.documents)))
    digest.update(row.token_ids.astype("<u4").tobytes())
    for span in row.documents:
        name = span.id.encode()
        digest.update(struct.pack("<qqq", len(name), span.start, span.end) + name)
    if row.loss is not None:
        digest.update(b"loss" + row.loss.astype(np.uint8).tobytes())
