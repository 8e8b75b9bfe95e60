"""Make a corpus addressable: every input file tokenised, packed and written as one part, in parallel on Ray Data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ray
import ray.data

from infscan import errors
from infscan.config import CorpusConfig
from infscan.corpus.addressable import AddressableCorpus, PreparedCorpus, is_prepared, open_corpus
from infscan.corpus.describe import describe, difference, token_files
from infscan.corpus.documents import document_files, file_format
from infscan.corpus.in_place import DESCRIPTION, Description
from infscan.corpus.manifest import MANIFEST
from infscan.corpus.packing import PackSettings, pack_settings
from infscan.corpus.parts import open_prepared
from infscan.corpus.prepared import check_allowed, finished_parts, prepare_part, prepare_settings, write_manifest
from infscan.corpus.tokenizer import Tokenizer, load_tokenizer
from infscan.errors import CorpusError, InfscanError, RunError
from infscan.model.architecture import Architecture
from infscan.storage import InputFile, Store
from infscan.telemetry import Telemetry


def settings_for(config: CorpusConfig, architecture: Architecture, tokenizer: Tokenizer | None) -> PackSettings:
    """How this corpus is packed for this model: T, vocabulary, and the EOS and BOS that join documents."""
    eos_id = tokenizer.eos_id if tokenizer and tokenizer.eos_id is not None else architecture.eos_id
    eos_id = eos_id if config.eos_id is None else config.eos_id
    bos_id = tokenizer.bos_id if tokenizer and tokenizer.bos_id is not None else architecture.bos_id
    length = architecture.sequence_length(config.sequence_length)
    return pack_settings(config, length, architecture.vocab_size, eos_id, bos_id)


def input_files(config: CorpusConfig) -> list[InputFile]:
    """The files to prepare, found before anything runs; none for a corpus that is addressable already.

    Raises:
        StorageError: where there is no such file.
        CorpusError: where a file's format is unknown.
    """
    if is_prepared(config.path) or token_files(config) is not None:
        return []
    files = document_files(config)
    if config.masked and any(file_format(file.uri, config.format) == "text" for file in files):
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
        CorpusError: naming file and line, for input that cannot be read.
        RunError: where `store` holds a corpus of other files or settings.
    """
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
    digest = tokenizer.digest if tokenizer else None
    if is_prepared(store.uri):
        try:
            corpus = open_prepared(store)
        except CorpusError as error:
            # What is missing or cut off is made again from the same files; whole parts are kept.
            telemetry.warn(f"{error} It is prepared again now.")
        else:
            _check_same(config, corpus, files, prepare_settings(config, pack, digest))
            check_allowed(config, corpus.manifest.counts, corpus.manifest.left_out)
            _warn_of_left_out(corpus, telemetry)
            return corpus
    with telemetry.phase("prepare", len(files), "files") as phase:
        for summary in _on_ray(config, pack, architecture.folder, store, files):
            phase.advance(sequences=summary["sequences"], tokens=summary["tokens"])
        write_manifest(store, config, pack, digest, finished_parts(store, files))
    corpus = open_prepared(store)
    _warn_of_left_out(corpus, telemetry)
    return corpus


def _no_rows(config: CorpusConfig) -> CorpusError:
    return CorpusError(
        f"{config.path} has no rows that could have a prompt_field or mask_field; leave both null, or give JSONL or "
        "Parquet."
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


def _on_ray(
    config: CorpusConfig, pack: PackSettings, folder: str, store: Store, files: list[InputFile]
) -> Iterator[dict[str, Any]]:
    def one(row: dict[str, Any]) -> dict[str, Any]:
        index = int(row["index"])
        try:
            part = prepare_part(files[index], index, config, pack, load_tokenizer(folder), store)
        except InfscanError as error:
            # As a row: raised, Ray Data would lose its type and print stacks of its own beside the sentence.
            return {"error": type(error).__name__, "reason": str(error), "sequences": 0, "tokens": 0}
        return {"error": "", "reason": "", "sequences": part.sequences, "tokens": part.tokens}

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = ray.data.from_items([{"index": index} for index in range(len(files))], override_num_blocks=len(files))
    for row in rows.map(one).iter_rows():
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


def _check_same(config: CorpusConfig, corpus: PreparedCorpus, files: list[InputFile], settings: dict[str, Any]) -> None:
    known = {file.uri: (file.size, file.etag) for file in corpus.manifest.inputs}
    for file in files:
        if known.get(file.uri, (file.size, file.etag)) != (file.size, file.etag):
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
