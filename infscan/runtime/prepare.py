"""Make a corpus addressable: its files' pieces tokenised, packed and written as parts, in parallel on Ray Data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import ray.data

from infscan import errors
from infscan.config import Attention, CorpusConfig, fingerprint
from infscan.corpus.addressable import AddressableCorpus, PreparedCorpus, check_told_apart, is_prepared, open_corpus
from infscan.corpus.describe import FORMATS as ARRAYS
from infscan.corpus.describe import describe, difference, token_files
from infscan.corpus.documents import document_files, document_pieces, file_format
from infscan.corpus.duplicates import HASH, duplicates
from infscan.corpus.in_place import DESCRIPTION, Description
from infscan.corpus.joined import describe_joined
from infscan.corpus.manifest import MANIFEST, read_inputs
from infscan.corpus.packing import PackSettings, pack_settings
from infscan.corpus.parts import open_prepared
from infscan.corpus.pieces import Piece
from infscan.corpus.prepared import (
    NOTHING,
    check_allowed,
    finished_parts,
    hash_piece,
    prepare_part,
    prepare_settings,
    write_manifest,
)
from infscan.corpus.tokenizer import Tokenizer, load_tokenizer
from infscan.errors import CorpusError, InfscanError, RunError
from infscan.model.architecture import Architecture
from infscan.model.attention import refusal
from infscan.storage import InputFile, Store
from infscan.telemetry import Telemetry

_HASHES = "duplicates"
_MOST_BLOCKS = 4096


def settings_for(config: CorpusConfig, architecture: Architecture, tokenizer: Tokenizer | None) -> PackSettings:
    """How this corpus is packed for this model: T, vocabulary, and the EOS and BOS that join documents.

    Raises:
        ModelError: where documents are to be kept apart, and the model cannot.
        CorpusError: where a separator is needed that the model does not have.
    """
    if config.attention is Attention.within and not architecture.takes_positions:
        raise refusal(architecture.family)
    eos_id = _eos_id(config, architecture, tokenizer)
    bos_id = tokenizer.bos_id if tokenizer and tokenizer.bos_id is not None else architecture.bos_id
    length = architecture.sequence_length(config.sequence_length)
    return pack_settings(config, length, architecture.vocab_size, eos_id, bos_id)


def _eos_id(config: CorpusConfig, architecture: Architecture, tokenizer: Tokenizer | None) -> int | None:
    if config.eos_id is not None:
        return config.eos_id
    return tokenizer.eos_id if tokenizer and tokenizer.eos_id is not None else architecture.eos_id


def input_files(config: CorpusConfig) -> list[InputFile]:
    """The files to prepare, found before anything runs; none for a corpus that is addressable already.

    Raises:
        StorageError: where there is no such file.
        CorpusError: where a file's format is unknown.
    """
    if config.paths:
        return [file for one in config.several.values() for file in input_files(one)]
    if is_prepared(config.path) or token_files(config) is not None:
        return []
    files = document_files(config)
    if config.masked and any(file_format(file.uri, config.format) in ("text", *ARRAYS) for file in files):
        raise _no_rows(config)
    return files


def prepare(
    config: CorpusConfig,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
    store: Store,
    telemetry: Telemetry,
) -> AddressableCorpus:
    """The corpus as an addressable one: where it lies if it is one already, else prepared into `store`.

    Token arrays are read where they lie; `store` then holds their description alone. Parts that are there already are
    kept, so preparing again finishes what is missing.

    Raises:
        CorpusError: naming file and line, for input that cannot be read; where documents are to be kept apart, and
            nothing says where they begin.
        RunError: where `store` holds a corpus of other files or settings.
    """
    corpus = _addressable(config, architecture, tokenizer, store, telemetry)
    # Of several corpora each was looked at as it was prepared.
    if config.attention is Attention.within and not config.paths:
        check_told_apart(corpus)
    return corpus


def _addressable(
    config: CorpusConfig,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
    store: Store,
    telemetry: Telemetry,
) -> AddressableCorpus:
    if config.paths:
        return _joined(config, architecture, tokenizer, store, telemetry)
    if is_prepared(config.path):
        there = open_corpus(Store(config.path))
        _check_fits(config, there, architecture, tokenizer)
        if isinstance(there, PreparedCorpus):
            _warn_of_left_out(there, telemetry)
        return there
    pack = settings_for(config, architecture, tokenizer)
    arrays = token_files(config)
    if arrays is not None:
        if config.masked:
            raise _no_rows(config)
        return _described(config, pack, store, *arrays)
    files = document_files(config)
    config = reading(config, architecture, tokenizer, files)
    digest = tokenizer.digest if tokenizer else None
    if is_prepared(store.uri):
        try:
            corpus = open_prepared(store)
            known = read_inputs(store, corpus.manifest)
        except CorpusError as error:
            # What is missing or cut off is made again from the same files; whole parts are kept.
            telemetry.warn(f"{error} It is prepared again now.")
        else:
            _check_same(config, corpus, known, files, prepare_settings(config, pack, digest))
            check_allowed(config, corpus.manifest.counts, corpus.manifest.left_out)
            _warn_of_left_out(corpus, telemetry)
            return corpus
    pieces = document_pieces(files, config)
    dropped = [NOTHING] * len(pieces)
    if config.deduplicate:
        settings = fingerprint(prepare_settings(config, pack, digest))
        dropped = _duplicates(config, settings, store, pieces, telemetry)
    folder = architecture.folder

    def one(row: dict[str, Any]) -> dict[str, Any]:
        index, drops = row["index"], np.frombuffer(row["drops"], np.int64)
        part = prepare_part(row["piece"], index, config, pack, load_tokenizer(folder), store, drops)
        return {"sequences": part.sequences, "tokens": part.tokens}

    with telemetry.phase("prepare", len(pieces), "parts") as phase:
        rows = [{"drops": drops.tobytes()} for drops in dropped]
        for summary in _on_ray(pieces, rows, one):
            phase.advance(sequences=summary["sequences"], tokens=summary["tokens"])
        write_manifest(store, config, pack, digest, finished_parts(store, pieces))
    if config.deduplicate:
        for entry in store.list(_HASHES):
            store.remove(entry.name)
    corpus = open_prepared(store)
    _warn_of_left_out(corpus, telemetry)
    return corpus


def _joined(
    config: CorpusConfig,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
    store: Store,
    telemetry: Telemetry,
) -> AddressableCorpus:
    """Several corpora, each where it lies or in a folder of its label, and the description that joins them."""
    parts = {
        label: prepare(one, architecture, tokenizer, store / label, telemetry.within(f"{label} "))
        for label, one in config.several.items()
    }
    value = describe_joined(store, parts)
    store.create(DESCRIPTION, json.dumps(value, indent=1).encode())
    if store.read_json(DESCRIPTION) != value:
        raise RunError(f"{store.uri} joins other corpora than corpus.paths; put those back, or start a new output.")
    return open_corpus(store)


def reading(
    config: CorpusConfig, architecture: Architecture, tokenizer: Tokenizer | None, files: Sequence[InputFile]
) -> CorpusConfig:
    """Token arrays that are prepared: what ends their documents, and npy's dtype, where the model has to say it."""
    kind = file_format(files[0].uri, config.format)
    if kind not in ARRAYS:
        return config
    narrow = architecture.vocab_size <= 1 << 16
    dtype = config.dtype or ("uint16" if narrow else "uint32") if kind == "npy" else config.dtype
    return replace(config, eos_id=_eos_id(config, architecture, tokenizer), dtype=dtype)


def _no_rows(config: CorpusConfig) -> CorpusError:
    return CorpusError(
        f"{config.path} has no rows that could have a prompt_field or mask_field; leave both null, or give JSONL, "
        "Parquet or Arrow."
    )


def _warn_of_left_out(corpus: PreparedCorpus, telemetry: Telemetry) -> None:
    left_out = corpus.manifest.left_out
    if left_out.by_reason:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.by_reason.items())
        telemetry.warn(
            f"{corpus.store.uri} leaves out what could not be used ({reasons}); the first: {left_out.first[0]} "
            f"More in {MANIFEST}."
        )


def _described(
    config: CorpusConfig, pack: PackSettings, store: Store, kind: str, files: list[InputFile]
) -> AddressableCorpus:
    """Token arrays, with their description in `store`; one that is there already must be of the same content."""
    now = describe(kind, files, config, pack)
    if store.exists(MANIFEST):
        raise RunError(f"{store.uri} holds a corpus that was prepared of other files; start a new output.")
    store.create(DESCRIPTION, json.dumps(now.to_json(), indent=1).encode())
    before = Description.from_json(store.read_json(DESCRIPTION), f"{store.uri}/{DESCRIPTION}")
    found = difference(before, now)
    if found is not None:
        raise RunError(f"{store.uri} was made for another corpus ({found}). Put it back, or start a new output.")
    store.write_json(DESCRIPTION, now.to_json())
    return open_corpus(store)


def _duplicates(
    config: CorpusConfig, settings: str, store: Store, pieces: Sequence[Piece], telemetry: Telemetry
) -> list[np.ndarray]:
    """Of every piece, which documents an earlier one equals; hashes that an earlier process left are kept, where they
    are of the same settings."""
    names = [f"{_HASHES}/{fingerprint([piece, settings])[:32]}.bin" for piece in pieces]

    def one(row: dict[str, Any]) -> dict[str, Any]:
        name = names[row["index"]]
        if not store.exists(name):
            store.write(name, hash_piece(row["piece"], config).tobytes())
        return {"sequences": 0, "tokens": 0}

    with telemetry.phase("duplicates", len(pieces), "parts") as phase:
        for _ in _on_ray(pieces, [{} for _ in pieces], one):
            phase.advance()
        return duplicates([np.frombuffer(store.read(name), HASH) for name in names])


def _on_ray(
    pieces: Sequence[Piece], rows: Sequence[dict[str, Any]], function: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """What `function` makes of every piece and the row beside it: `sequences` and `tokens`; the rows get `index` and
    `piece`."""

    def one(row: dict[str, Any]) -> dict[str, Any]:
        try:
            done = function(row | {"index": int(row["index"]), "piece": Piece.of(json.loads(row["piece"]))})
        except InfscanError as error:
            # As a row: raised, Ray Data would lose its type and print stacks of its own beside the sentence.
            return {"error": type(error).__name__, "reason": str(error), "sequences": 0, "tokens": 0}
        return {"error": "", "reason": "", **done}

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    items = [
        {"index": index, "piece": piece.to_json(), **row}
        for index, (piece, row) in enumerate(zip(pieces, rows, strict=True))
    ]
    for row in ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS)).map(one).iter_rows():
        if row["error"]:
            raise getattr(errors, row["error"], InfscanError)(row["reason"])
        yield row


def _check_fits(
    config: CorpusConfig, corpus: AddressableCorpus, architecture: Architecture, tokenizer: Tokenizer | None
) -> None:
    where = corpus.store.uri
    if corpus.sequence_length > architecture.context:
        raise CorpusError(
            f"{where}: sequences of {corpus.sequence_length} tokens are longer than the model's context of "
            f"{architecture.context}; prepare the corpus again with corpus.sequence_length={architecture.context}."
        )
    if config.sequence_length is not None and config.sequence_length != corpus.sequence_length:
        raise CorpusError(
            f"corpus.sequence_length={config.sequence_length}, and {where} was prepared with {corpus.sequence_length}; "
            "leave it null, or prepare the corpus again."
        )
    if corpus.vocab_size > architecture.vocab_size:
        raise CorpusError(
            f"{where}: token ids of a vocabulary of {corpus.vocab_size}, and the model has {architecture.vocab_size}; "
            "prepare the corpus with this model's tokenizer."
        )
    if config.masked and not isinstance(corpus, PreparedCorpus):
        raise _no_rows(config)
    given = (config.prompt_field, config.mask_field)
    known = dict(corpus.manifest.settings) if isinstance(corpus, PreparedCorpus) else {}
    if config.masked and given != (known.get("prompt_field"), known.get("mask_field")):
        raise CorpusError(
            f"corpus.prompt_field={given[0]}, corpus.mask_field={given[1]}, and {where} was prepared with another or "
            "none; leave both null, or prepare the corpus again."
        )
    if tokenizer and corpus.tokenizer and tokenizer.digest != corpus.tokenizer:
        raise CorpusError(f"{where} was made with another tokenizer than the model's; prepare the corpus again.")


def _check_same(
    config: CorpusConfig,
    corpus: PreparedCorpus,
    known: dict[str, InputFile],
    files: list[InputFile],
    settings: dict[str, Any],
) -> None:
    for file in files:
        if known.get(file.uri, file) != file:
            raise RunError(
                f"{file.uri} changed after it was prepared into {corpus.store.uri}; put the old file back, or start "
                "a new output."
            )
    if len(files) != len(known):
        raise RunError(
            f"{config.path} has {len(files)} files now, and {corpus.store.uri} was prepared from {len(known)}; start a "
            "new output."
        )
    before = dict(corpus.manifest.settings)
    changed = [
        f"{key}: {before.get(key)!r} -> {value!r}" for key, value in settings.items() if before.get(key) != value
    ]
    if changed:
        raise RunError(
            f"{corpus.store.uri} was prepared with other settings ({'; '.join(changed)}); start a new output."
        )
