"""Make a corpus addressable: its files' pieces tokenised, packed and written as parts, one process each.

The pieces need no streaming between steps, no shuffle and no backpressure: each is one file in, one file out, as many
at once as there are cores. So they are tasks like any other work without a model, and Ray Data has no place here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from infscan.config import Attention, CorpusConfig, Solver, fingerprint
from infscan.corpus.addressable import (
    AddressableCorpus,
    PreparedCorpus,
    is_prepared,
    open_corpus,
    require_document_boundaries,
)
from infscan.corpus.describe import describe, difference, token_files
from infscan.corpus.documents import data_and_beside, document_files, document_splits
from infscan.corpus.duplicates import HASH, duplicates
from infscan.corpus.files import file_name
from infscan.corpus.filtered import FilteredCorpus
from infscan.corpus.in_place import DESCRIPTION, Description
from infscan.corpus.joined import describe_joined
from infscan.corpus.manifest import MANIFEST, read_inputs
from infscan.corpus.named_fields import asked_fields, check_named_fields
from infscan.corpus.packing import PackSettings
from infscan.corpus.parts import open_prepared
from infscan.corpus.prepared import (
    NOTHING,
    check_allowed,
    earlier_rules,
    finished_parts,
    prepare_part,
    prepare_settings,
    prepare_task,
    store_hashes,
    write_manifest,
)
from infscan.corpus.reading import Reading
from infscan.corpus.splits import InputSplit
from infscan.corpus.tokenizer import Tokenizer
from infscan.engine.executor import Executor, TaskMap
from infscan.errors import CorpusError, RunError
from infscan.model.architecture import Architecture
from infscan.steps.corpus_inputs import no_rows, settings_for, with_array_settings
from infscan.steps.run import Run
from infscan.storage import InputFile, Store, remember_written
from infscan.telemetry import Telemetry

_HASHES = "duplicates"


def prepare_corpora(run: Run) -> AddressableCorpus:
    """Every corpus that the run will read, so that one that cannot be read ends it before anything is kept.

    Returns the scanned one.
    """
    corpus = prepare_corpus(run)
    for stage in (run, *run.later):
        if stage.config.factors.solver is not Solver.identity:
            prepare_factors_corpus(stage)
    return corpus


def prepare_corpus(run: Run) -> AddressableCorpus:
    """The scanned corpus, addressable: prepared into <output>/corpus unless it is prepared already."""
    inputs = run.inputs
    return prepare(run.config.corpus, inputs.architecture, inputs.tokenizer, run.store / "corpus", run.executor)


def prepare_factors_corpus(run: Run) -> AddressableCorpus:
    """What the factors are fitted on: the scanned corpus, or one of its own, prepared beside the factors."""
    inputs, config = run.inputs, run.config.factors.corpus
    if config.same_corpus(run.config.corpus):
        corpus = prepare_corpus(run)
    else:
        corpus = prepare(config, inputs.architecture, inputs.tokenizer, run.folder.factors / "corpus", run.executor)
    # What a filter chose looks like the queries: curvature is the whole corpus's.
    return corpus.base if isinstance(corpus, FilteredCorpus) else corpus


def prepare(
    config: CorpusConfig,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
    store: Store,
    executor: Executor,
    prefix: str = "",
) -> AddressableCorpus:
    """The corpus as an addressable one: where it is if it is one already, else prepared into `store`.

    Token arrays are read where they lie; `store` then holds their description alone. Parts that are there already are
    kept, so preparing again finishes what is missing.

    Raises:
        CorpusError: naming file and line, for input that cannot be read; where documents are to be kept apart, and
            nothing says where they begin.
        RunError: where `store` holds a corpus of other files or settings.
    """
    corpus = _addressable(config, architecture, tokenizer, store, executor, prefix)
    # Of several corpora each was looked at as it was prepared.
    if config.attention is Attention.within and not config.paths:
        require_document_boundaries(corpus)
    return corpus


def _addressable(
    config: CorpusConfig,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
    store: Store,
    executor: Executor,
    prefix: str = "",
) -> AddressableCorpus:
    if config.paths:
        return _joined(config, architecture, tokenizer, store, executor)
    if is_prepared(config.path):
        there = open_corpus(Store(config.path), Reading.of(config), foreign=True)
        _check_fits(config, there, architecture, tokenizer)
        if isinstance(there, PreparedCorpus):
            _warn_of(there, executor.telemetry)
        return there
    pack = settings_for(config, architecture, tokenizer)
    arrays = token_files(config)
    if arrays is not None:
        if config.masked:
            raise no_rows(config)
        if arrays[0] != "mds" and not prefix and (asked := asked_fields(config)):
            key, field = next(iter(asked.items()))
            raise CorpusError(
                f"corpus.{key}={field}: {config.path} holds token arrays, which have no fields; leave it out."
            )
        return _described(config, pack, store, *arrays)
    files, aside = data_and_beside(config)
    config = with_array_settings(config, architecture, tokenizer, files)
    digest = tokenizer.digest if tokenizer else None
    if is_prepared(store.uri):
        try:
            corpus = open_prepared(store, Reading.of(config))
            known = read_inputs(store, corpus.manifest)
        except CorpusError as error:
            # What is missing or cut off is made again from the same files; whole parts are kept.
            executor.telemetry.warn(f"{error} It is prepared again now.")
        else:
            _check_same(config, corpus, known, files, prepare_settings(config, pack, digest))
            check_allowed(config, corpus.manifest.counts, corpus.manifest.left_out)
            _warn_of(corpus, executor.telemetry)
            return corpus
    if not prefix:
        check_named_fields([(config, files)])
    pieces = document_splits(files, config)
    return prepare_pieces(config, pack, architecture.folder, tokenizer, pieces, store, executor, prefix, aside)


def prepare_pieces(
    config: CorpusConfig,
    pack: PackSettings,
    folder: str,
    tokenizer: Tokenizer | None,
    pieces: Sequence[InputSplit],
    store: Store,
    executor: Executor,
    prefix: str = "",
    aside: Sequence[InputFile] = (),
) -> PreparedCorpus:
    """Prepare these pieces of a corpus's files. folder: the model's, which has the tokenizer. aside: files beside the
    data, which are none."""
    digest = tokenizer.digest if tokenizer else None
    dropped = [NOTHING] * len(pieces)
    if config.deduplicate:
        settings = fingerprint(prepare_settings(config, pack, digest))
        dropped = _duplicates(config, settings, store, pieces, executor, prefix)
    executor.map_tasks(
        TaskMap(
            name=f"{prefix}prepare",
            unit_name="parts",
            items=range(len(pieces)),
            function=prepare_task,
            arguments=lambda index: (pieces[index], index, config, pack, folder, digest, store, dropped[index]),
            progress=lambda index, done: done,
        )
    )
    if aside:
        names = ", ".join(file_name(file.uri) for file in aside[:4]) + (", ..." if len(aside) > 4 else "")
        executor.telemetry.warn(f"{config.path}: {len(aside)} files lie beside the data and are left aside ({names})")
    corpus = _of_parts(config, pack, digest, pieces, store, executor.telemetry, len(aside))
    if config.deduplicate:
        for entry in store.list(_HASHES):
            store.remove(entry.name)
    return corpus


def prepare_here(
    config: CorpusConfig, pack: PackSettings, tokenizer: Tokenizer | None, pieces: Sequence[InputSplit], store: Store
) -> PreparedCorpus:
    """`prepare_pieces` in this process, with the tokenizer that it has; duplicates are not looked for."""
    for index, piece in enumerate(pieces):
        prepare_part(piece, index, config, pack, tokenizer, store, NOTHING)
    return _of_parts(config, pack, tokenizer.digest if tokenizer else None, pieces, store, Telemetry())


def _of_parts(
    config: CorpusConfig,
    pack: PackSettings,
    digest: str | None,
    pieces: Sequence[InputSplit],
    store: Store,
    telemetry: Telemetry,
    files_aside: int = 0,
) -> PreparedCorpus:
    """The corpus whose parts are all there: numbered, opened, and what is odd about it said."""
    write_manifest(store, config, pack, digest, finished_parts(store, pieces), files_aside=files_aside)
    corpus = open_prepared(store, Reading.of(config))
    _warn_of(corpus, telemetry)
    return corpus


def _joined(
    config: CorpusConfig,
    architecture: Architecture,
    tokenizer: Tokenizer | None,
    store: Store,
    executor: Executor,
    prefix: str = "",
) -> AddressableCorpus:
    """Several corpora, each where it is or in a folder of its label, and the description that joins them."""
    _refuse_files_twice(config)
    check_named_fields([(one, _documents(one)) for one in config.several.values()])
    parts = {
        label: prepare(one, architecture, tokenizer, store / label, executor, f"{label} ")
        for label, one in config.several.items()
    }
    value = describe_joined(store, parts)
    store.create(DESCRIPTION, json.dumps(value, indent=1).encode())
    if store.read_json(DESCRIPTION) != value:
        raise RunError(f"{store.uri} joins other corpora than corpus.paths; put those back, or start a new output.")
    remember_written(store.read(DESCRIPTION))
    return open_corpus(store, Reading.of(config))


def _refuse_files_twice(config: CorpusConfig) -> None:
    """Refuse a file that two labels have: its sequences would count twice."""
    seen: dict[str, str] = {}
    for label, one in config.several.items():
        arrays = None if is_prepared(one.path) else token_files(one)
        for uri in [one.path, *(file.uri for file in (arrays[1] if arrays else _documents(one)))]:
            if seen.setdefault(uri, label) != label:
                raise CorpusError(
                    f"corpus.paths.{seen[uri]} and corpus.paths.{label} both have {uri}, whose sequences would count "
                    "twice; leave it out of one."
                )


def _documents(config: CorpusConfig) -> list[InputFile]:
    """The files of a corpus that have rows."""
    return [] if is_prepared(config.path) or token_files(config) is not None else document_files(config)


def _warn_of(corpus: PreparedCorpus, telemetry: Telemetry) -> None:
    """Say what was left out, and what is probably not as it was meant."""
    left_out, spanning = corpus.manifest.left_out, corpus.manifest.counts.documents_spanning
    if aside := corpus.manifest.counts.labels_aside:
        telemetry.warn(
            f"{corpus.store.uri}: {aside} ids or sources are missing where they were named, or neither texts nor whole "
            "numbers, and are made of the file's name; name another field in corpus.id_field or corpus.source_field (a "
            "dotted path leads into objects)"
        )
    if spanning:
        telemetry.warn(
            f"{corpus.store.uri}: in {spanning} documents a token spans the end of the prompt, as where it ends in a "
            "space; it counts as the rest's and has a loss"
        )
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
    remember_written(store.read(DESCRIPTION))
    return open_corpus(store, Reading.of(config))


def _duplicates(
    config: CorpusConfig, settings: str, store: Store, pieces: Sequence[InputSplit], executor: Executor, prefix: str
) -> list[np.ndarray]:
    """Of every piece, which documents an earlier one equals; hashes that an earlier process left are kept, where they
    are of the same settings."""
    names = [f"{_HASHES}/{fingerprint([piece, settings])[:32]}.bin" for piece in pieces]
    executor.map_tasks(
        TaskMap(
            name=f"{prefix}duplicates",
            unit_name="parts",
            items=range(len(pieces)),
            function=store_hashes,
            arguments=lambda index: (pieces[index], config, store, names[index]),
            is_done=lambda index: store.exists(names[index]),
        )
    )
    return duplicates([np.frombuffer(store.read(name), HASH) for name in names])


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
        raise no_rows(config)
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
    if (earlier := earlier_rules(before, config, files)) is not None:
        raise RunError(
            f"{corpus.store.uri} was prepared by an earlier version, in which {earlier}; start a new output, or scan "
            f"it as it is with corpus.path={corpus.store.uri}."
        )
    before["rules"] = settings["rules"]
    changed = [
        f"{key}: {before.get(key)!r} -> {value!r}" for key, value in settings.items() if before.get(key) != value
    ]
    if changed:
        raise RunError(
            f"{corpus.store.uri} was prepared with other settings ({'; '.join(changed)}); start a new output."
        )
